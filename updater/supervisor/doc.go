// Package supervisor is the process that the daemon is started as. It keeps the rights that it was started with, and does nothing with them but start the others.
//
// # Who is who
//
//	service manager ── starts ──▶ supervisor ── starts ──▶ agent: the network, the message bus, every decision
//	                                  │                      │
//	                                  │◀─── asks for one ────┘
//	                                  └── starts ──▶ parts: a writer, or an errand, as long as one is needed
//
// The agent may be another user's process, and is confined. What it cannot do itself it asks a part for, which has the supervisor's rights and believes nothing of
// what it is told: see package writer, and the errands of package host. What they say to each other does not pass through the supervisor. All that it takes from the agent are
// one byte with a socket, and lines for the service manager: there is little in it that an agent that has been taken over could turn, and what it starts it would start anyway.
//
// # What crosses
//
// [Run] starts the agent with one end of two sockets, as open files. [Connect] is how the agent takes them over.
//
// On the first, a stream, the agent sends the number of a [Part] together with one end of a new socket, which the part is started with ([Inherited]); the other end stays with the
// agent. Back come the numbers of signals: to send one to another user's process takes a right that the supervisor need not have. Whatever else comes is an agent that is not to be trusted any
// more, and the end of it.
//
// On the second, which keeps messages apart, the agent says what the service manager shall know. It is passed on if it is about how the service is, and not which
// process it is.
//
// # How it ends
//
// The supervisor and the agent end together, with the agent's status. A part ends when its work is done or the agent's end of its socket is closed; so none
// outlives the agent by more than it takes to give up what is under way, and none is ended by a signal that is meant for the service as a whole.
package supervisor
