package lock

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
)

// Memory is a [Store] in this process: for tests, for simulations, and for a server that keeps the semaphore of others.
type Memory struct {
	mu     sync.Mutex
	rev    int64
	groups map[string]*memoryGroup
	change chan struct{} // closed and replaced at every change
}

type memoryGroup struct {
	state     []byte
	stateRev  int64
	signalRev int64
	queue     []Item           // in order of arrival
	arrival   map[string]int64 // by host
	left      map[string]int64 // the revision at which a host left the queue
	untold    int64            // who left up to this revision is forgotten
	audit     map[int][]byte
	lastJoin  int64
	records   map[string]Record
}

var _ Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{groups: map[string]*memoryGroup{}, change: make(chan struct{})}
}

func (m *Memory) group(name string) *memoryGroup {
	g := m.groups[name]
	if g == nil {
		g = &memoryGroup{arrival: map[string]int64{}, left: map[string]int64{}, audit: map[int][]byte{}, records: map[string]Record{}}
		m.groups[name] = g
	}
	return g
}

func (m *Memory) changed() {
	close(m.change)
	m.change = make(chan struct{})
}

// index is how many items arrived before a revision.
func (g *memoryGroup) index(arrival int64) int {
	i, _ := slices.BinarySearchFunc(g.queue, arrival, func(it Item, a int64) int { return cmp.Compare(it.Arrival, a) })
	return i
}

func (g *memoryGroup) view(rev int64, host string, limit int) View {
	v := View{Rev: rev, StateRev: g.stateRev, State: g.state}
	if at, ok := g.arrival[host]; ok {
		it := g.queue[g.index(at)]
		v.Own = &it
	}
	if limit > 0 && len(g.queue) > limit {
		v.Queue, v.More = slices.Clone(g.queue[:limit]), true
	} else if limit != 0 {
		v.Queue = slices.Clone(g.queue)
	}
	return v
}

// Read implements [Store].
func (m *Memory) Read(ctx context.Context, group, host string, limit int) (View, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.group(group).view(m.rev, host, limit), ctx.Err()
}

// Enqueue implements [Store].
func (m *Memory) Enqueue(ctx context.Context, group, host string, data []byte) (View, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return View{}, err
	}
	g := m.group(group)
	m.rev++
	if at, ok := g.arrival[host]; ok {
		g.queue[g.index(at)].Data = data
	} else {
		g.queue = append(g.queue, Item{Host: host, Data: data, Arrival: m.rev})
		g.arrival[host], g.lastJoin = m.rev, m.rev
	}
	m.changed()
	v := g.view(m.rev, host, 0)
	v.Length = len(g.queue)
	return v, nil
}

// Ahead implements [Store].
func (m *Memory) Ahead(ctx context.Context, group string, arrival int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.group(group).index(arrival), ctx.Err()
}

// Commit implements [Store].
func (m *Memory) Commit(ctx context.Context, group, host string, limit int, v View, c Change) (int64, View, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, View{}, err
	}
	g := m.group(group)
	if g.stateRev != v.StateRev || c.Exclusive && g.lastJoin > v.Rev {
		return 0, g.view(m.rev, host, limit), ErrConflict
	}
	for _, r := range c.Records {
		if old := g.records[r.Name]; old.Born != r.Born || old.Version != r.Version {
			return 0, g.view(m.rev, host, limit), ErrConflict
		}
	}
	m.rev++
	for _, r := range c.Records {
		if r.Version++; r.Version == 1 {
			r.Born = m.rev
		}
		g.records[r.Name] = r
	}
	g.state, g.stateRev = c.State, m.rev
	if c.Signal {
		g.signalRev = m.rev
	}
	for _, host := range c.Remove {
		if at, ok := g.arrival[host]; ok {
			i := g.index(at)
			g.queue = slices.Delete(g.queue, i, i+1)
			delete(g.arrival, host)
			if len(g.left) >= maxAsked {
				clear(g.left)
				g.untold = m.rev
			}
			g.left[host] = m.rev
		}
	}
	maps.Copy(g.audit, c.Audit)
	m.changed()
	return m.rev, View{}, nil
}

// Watch implements [Store].
func (m *Memory) Watch(ctx context.Context, group, host string, after int64) error {
	for {
		m.mu.Lock()
		g := m.group(group)
		done := g.signalRev > after || g.left[host] > after || g.untold > after
		change := m.change
		m.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-change:
		}
	}
}

// Follow implements [Store].
func (m *Memory) Follow(ctx context.Context, group string, after int64, changed func(int64) bool) error {
	for {
		m.mu.Lock()
		rev := m.group(group).stateRev
		change := m.change
		m.mu.Unlock()
		if rev > after {
			if after = rev; !changed(rev) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-change:
		}
	}
}

// Records implements [Store].
func (m *Memory) Records(ctx context.Context, group string, names ...string) ([]Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	records := m.group(group).records
	if len(names) == 0 {
		return slices.Collect(maps.Values(records)), ctx.Err()
	}
	var list []Record
	for _, name := range names {
		if r, ok := records[name]; ok {
			list = append(list, r)
		}
	}
	return list, ctx.Err()
}

// History implements [Store].
func (m *Memory) History(ctx context.Context, group string) ([][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.group(group).audit)), ctx.Err()
}

// Groups implements [Store].
func (m *Memory) Groups(ctx context.Context) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for name, g := range m.groups {
		if g.stateRev > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, ctx.Err()
}

// Close implements [Store].
func (m *Memory) Close() error { return nil }
