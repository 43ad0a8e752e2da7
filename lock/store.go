package lock

import "context"

// Store keeps groups: a state, a queue and an audit trail each. It knows nothing of what they mean. Every method is bounded in time
// and wraps [ErrUnavailable] if the store could not be asked.
//
// Revisions count the changes of the store. They only grow, over all groups.
type Store interface {
	// Read returns the state of a group, and the place of host in its queue ("" asks for none). Of the queue it returns the
	// first limit items in order of arrival; 0 none, -1 all.
	Read(ctx context.Context, group, host string, limit int) (View, error)
	// Enqueue puts host at the end of the queue; if it is in the queue it keeps its place and gets the new data. It may
	// leave the queue by itself when this client is gone for good.
	Enqueue(ctx context.Context, group, host string, data []byte) (View, error)
	// Ahead counts the items that arrived before a revision.
	Ahead(ctx context.Context, group string, arrival int64) (int, error)
	// Commit makes a change as a whole if the state is still the one of the view, if each record that it writes is still the one that it
	// replaces, and if nobody has joined the queue since if the change is exclusive. It returns the revision of the change. Otherwise nothing has changed; it returns [ErrConflict] and
	// what Read(ctx, group, host, limit) would return now.
	Commit(ctx context.Context, group, host string, limit int, v View, c Change) (int64, View, error)
	// Watch returns nil once, after revision after, host has left the queue or a change with Signal was made, or when
	// that can no longer be told.
	Watch(ctx context.Context, group, host string, after int64) error
	// Records returns the signed records of a group that have one of these names; without names all of them, which is for an operator: anybody who may
	// write to the store can add to them. They are no older than what Read has returned before. One that is longer than any host writes may come
	// without its data; see [Record.Bounded].
	Records(ctx context.Context, group string, names ...string) ([]Record, error)
	// History returns the audit trail, each entry under the number that it was committed with.
	History(ctx context.Context, group string) ([][]byte, error)
	// Follow calls changed after every change of the state, until ctx ends or it returns false.
	Follow(ctx context.Context, group string, after int64, changed func(rev int64) bool) error
	// Groups lists the groups that have a state.
	Groups(ctx context.Context) ([]string, error)
	// Close gives up what the store holds. Places in the queue may be lost.
	Close() error
}

// View is a group at one revision.
type View struct {
	Rev      int64 // of the store when it was read
	StateRev int64 // at which the state was written; 0 if there is none
	State    []byte
	Own      *Item  // the place of the host that was asked for
	Queue    []Item // in order of arrival
	More     bool   // the queue is longer
	Length   int    // of the queue; only after Enqueue
}

// Item is a place in the queue.
type Item struct {
	Host    string
	Data    []byte
	Arrival int64 // the revision at which it was made
}

// Change is what a commit does.
type Change struct {
	State     []byte
	Remove    []string       // hosts that leave the queue
	Audit     map[int][]byte // entries of the trail by their place in it; an older one there goes
	Exclusive bool           // nobody may have joined the queue since the view
	Signal    bool           // wake everybody who waits
	Records   []Record       // to write, each with Born and Version of the one that it replaces; 0 and 0 if there is none
}

// Record is something that a host, or an owner of the group, has signed. What the store says of it no client can choose: so a record that names its own Born
// and Version is known to be the last that was written, and an older one that somebody puts in its place is not taken for it.
type Record struct {
	Name    string // the host's, or [ownerRecord]
	Data    []byte
	Born    int64  // the revision at which it was made. One that is deleted and made again has another
	Version int64  // how often it was written, 1 when it was made
	Place   string `json:",omitempty"` // what the store calls itself, "" if it has no name: what was signed for one is nothing in another
}

// maxWord bounds what is kept of what a host has said: it is a few kilobytes long.
const maxWord = 64 << 10

// Bounded is the record, without its data if it is longer than any host writes. The owner's may be long: it names every host.
func (r Record) Bounded() Record {
	if r.Name != ownerRecord && len(r.Data) > maxWord {
		r.Data = nil
	}
	return r
}
