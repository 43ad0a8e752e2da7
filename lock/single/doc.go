// Package single keeps the reboot semaphore in one file, for a cluster that has a server but no etcd.
//
// # Who opens the file
//
// One process does, the one that answers the hosts ("flipside fleet serve", "flipside serve"); the file is locked. It lends the
// store to the programs of the same user on the same machine over a socket beside the file ([Serve]), so that an operator can look and
// change things meanwhile. [Open] takes the file, [Dial] takes the socket, and [Attach] whichever there is: all are a
// [lock.Store], and the same suite passes on both.
//
// # Durability
//
// Every change is one transaction of a bbolt file, which is flushed before the change is answered. A process that is killed at any
// moment leaves the state before or after a change. Revisions are counted in the file and only grow.
//
// # Layout
//
// A bucket for each group, with the keys state (8 bytes revision, JSON), signal and joined (8 bytes revision each), and three
// buckets: queue (8 bytes revision of the arrival -> host, 0, data), places (host -> arrival), history (8 bytes number -> entry).
package single
