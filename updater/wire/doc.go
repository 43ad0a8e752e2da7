// Package wire is what the processes of the daemon talk over: a socket that only its two ends have, and frames on it.
//
// # Sockets
//
// [Pair] makes one without a name in any directory, so nobody else can connect to it. One end stays, the other is given to a process that is being started, as an
// open file that [Conn] takes over there. A process that ends closes its end, and the other one sees that: there is nothing to clean up.
//
// # Frames
//
// A frame is a head of 20 bytes and a body. Numbers are big-endian.
//
//	byte    0      kind: what the body is, as the two that talk have agreed
//	byte    1      part: which one of several things it belongs to
//	bytes   2-3    zero
//	bytes   4-7    number of a call, for its reply to name it
//	bytes   8-15   offset of the body
//	bytes  16-19   size of the body
//
// Either end may be another user's process that lies. So whoever reads says how long a body may be, and a longer one is refused by its head alone, before any
// memory is taken for it; and JSON has to be one value with no key that is unknown ([Decode]). After an [ErrFrame] nobody knows where the next
// frame begins: the connection is only good to be closed.
package wire
