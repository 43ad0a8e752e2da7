// Package writer is the part of the daemon that may write to the disk: a process of its own, small, that believes nothing of what it is told.
//
// The daemon is two. The agent talks to the network, reads XML and D-Bus, decodes payloads, and decides when something happens; it opens the disk for
// reading only. The writer is started when something is to be written and ends when that is done. It alone opens the disk for writing, writes the
// files beside a slot, runs the release's post-install program and the host's trust.unlock, and changes boot bits and the floor of releases. Between them is one socket.
//
// A process of a third kind has started both: package supervisor. The agent may be another user's process then.
//
// # What crosses, and what is believed
//
// The agent sends decoded bytes, which part of the release they belong to, and where they go. The writer reads the configuration and the pinned keys itself.
// For an update it is given the header, the manifest and the metadata's signature of the payload, and decides by them alone, before anything is
// touched: who signed it, for which product, and whether it is below the floor. Bytes land in the slot that does not run, inside the image that the
// manifest describes, or in the file beside it, and nowhere else. They are worth nothing until [Writer.Finish] has read them back from
// the medium and found the hash that the manifest names. Only then, and once, can the slot be armed.
//
// A payload of major 1 has no signature over its manifest; unless the server sent one, the signature at its end, which only the agent
// sees, is what its manifest rests on.
//
// # How it ends
//
// If the agent ends, the socket is at its end, and the writer gives up what it does without arming anything. If the writer ends, every call of the agent's [Client]
// is an error that is [ErrGone], the update goes on from its checkpoint with another writer, and a slot that was not armed stays unbootable.
package writer
