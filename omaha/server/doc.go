// Package server is a release server for Omaha clients: it hands out releases, watches how hosts get on with them, and
// serves the payloads.
//
// # The directory
//
// Everything that an operator decides is in small TOML files that can be read, edited and kept in version control:
//
//	DIR/channels/stable.toml     version = "1.2.3", and how it is rolled out
//	DIR/releases/1.2.3.toml      payload, size, sha256, metadata_size; written once, never changed
//	DIR/payloads/1.2.3.payload
//
// Publishing writes the payload, then the release, then the channel, each whole and flushed before the next begins, so
// that a reader (or a crash) between any two sees either the old state or the new one. A running server notices the
// files by itself. A file that cannot be read leaves the last good state in force and shows in the status.
//
// What the server decides is its own: that a rollout went wrong and is stopped holds from the moment of the decision, in memory, whether or not a disk
// takes it. It is saved in state.db with the failures that it follows from, and DIR/stopped.toml tells it those who read the directory. Only a later
// "resumed" in the channel's file lifts it, which moving the channel and resuming the rollout write: no absence of anything does.
//
// # A host's state
//
// It follows from the events that the host sends: granted, downloading, downloaded, installed, complete, failed. A
// check that comes again while an update is granted gets the same answer again: a host that was interrupted is never
// stuck, and asking twice does not count twice. All decisions about one request are taken under one lock, so that ten
// hosts that ask at the same moment do not get the five grants that a policy allows eleven times.
//
// A host that has to wait gets "noupdate", which every client understands, and the reason beside it in an attribute
// that this project's own client shows.
package server
