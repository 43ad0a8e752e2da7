package toxz

// step is a literal or a match.
type step struct {
	back uint32
	size int
}

// segment is how many places are looked at together, at the most.
const segment = 4096

// node is a place in a segment, and the cheapest way to it that is known. A way's last part is one step, or, with first set, several: a step
// of that size, a literal unless that step is one, and a match at the last distance. Each of these alone may not be the cheapest way.
type node struct {
	history
	cost  uint32
	from  int32
	first int32
	back  uint32
}

const unreached = 1<<32 - 1

// parser chooses the steps.
type parser struct {
	nodes [segment + 1]node
	end   int    // the last node that is reached
	steps []step // the last one first
}

// reach offers a way to a node.
func (p *parser) reach(to int, cost uint32, from int, back uint32, first int) bool {
	for p.end < to {
		p.end++
		p.nodes[p.end].cost = unreached
	}
	n := &p.nodes[to]
	if cost >= n.cost {
		return false
	}
	n.cost, n.from, n.back, n.first = cost, int32(from), back, int32(first)
	return true
}

// arrive makes the history of a node whose cheapest way is known for good.
func (p *parser) arrive(i int) {
	n := &p.nodes[i]
	n.history = p.nodes[n.from].history
	if n.first == 0 {
		n.take(n.back, i-int(n.from))
		return
	}
	n.take(n.back, int(n.first))
	if n.back != literal {
		n.literal()
	}
	n.pick(8, 11)
}

// trace writes down the steps to node i.
func (p *parser) trace(i int) {
	for i > 0 {
		n := &p.nodes[i]
		from, first := int(n.from), int(n.first)
		if first > 0 {
			rest := i - from - first
			if n.back != literal {
				rest--
			}
			p.steps = append(p.steps, step{0, rest})
			if n.back != literal {
				p.steps = append(p.steps, step{literal, 1})
			}
			p.steps = append(p.steps, step{n.back, first})
		} else {
			p.steps = append(p.steps, step{n.back, i - from})
		}
		i = from
	}
}

// parse chooses the next steps from a place on, as far as they can be known to be the cheapest. There is at least one.
func (e *Encoder) parse(src []byte, at int) []step {
	p := &e.parser
	p.end, p.steps = 0, p.steps[:0]
	p.nodes[0].history, p.nodes[0].cost = e.history, 0
	for i := 0; ; i++ {
		if i > 0 {
			if i == p.end {
				break
			}
			p.arrive(i)
		}
		here := at + i
		matches := e.finder.find(here)
		if s, ok := long(src, here, matches, &p.nodes[i].history); ok {
			if i == 0 {
				e.finder.skip(s.size - 1)
				p.steps = append(p.steps, s)
				return p.steps
			}
			p.end = i // the long match is the next segment's
			break
		}
		e.goOn(src, here, i, matches)
	}
	p.trace(p.end)
	return p.steps
}

// long finds a match that is taken without looking further.
func long(src []byte, at int, matches []match, h *history) (step, bool) {
	limit := min(len(src)-at, maxMatch)
	if limit < nice {
		return step{}, false
	}
	best := step{}
	for i, d := range h.last {
		if int(d) < at {
			if n := same(src, at-int(d)-1, at, limit); n > best.size {
				best = step{uint32(i), n}
			}
		}
	}
	if best.size >= nice {
		return best, true
	}
	if k := len(matches); k > 0 && matches[k-1].size >= nice {
		d := matches[k-1].back
		return step{d + repeats, same(src, at-int(d)-1, at, limit)}, true
	}
	return step{}, false
}

// goOn offers all ways to go on from node i, which is at a place in src.
func (e *Encoder) goOn(src []byte, at, i int, matches []match) {
	p, m := &e.parser, &e.model
	n := &p.nodes[i]
	limit := min(len(src)-at, segment-i)
	if limit == 0 {
		return
	}
	h, place := &n.history, at%places
	state := h.state

	lit := n.cost + m.zero(m.match[state][place]) + m.literalCost(h, src, at)
	better := p.reach(i+1, lit, i, literal, 0)

	matched := n.cost + m.one(m.match[state][place])
	repeated := matched + m.one(m.repeat[state])
	if d := int(h.last[0]); d < at && src[at-d-1] == src[at] {
		short := repeated + m.zero(m.repeat0[state]) + m.zero(m.long[state][place])
		p.reach(i+1, short, i, 0, 0)
	} else if d < at && !better && limit > 2 { // a literal, and on at the last distance
		after := *h
		after.literal()
		e.resume(src, at+1, limit-1, d, after, lit, i, literal, 1)
	}

	longest := minMatch - 1
	for r, d := range h.last {
		if int(d) >= at {
			continue
		}
		size := same(src, at-int(d)-1, at, min(limit, maxMatch))
		if size < minMatch {
			continue
		}
		cost := repeated + m.repeatCost(state, r, place)
		for k := size; k >= minMatch; k-- {
			p.reach(i+k, cost+m.repeatSize.cost[place][k-minMatch], i, uint32(r), 0)
		}
		if r == 0 {
			longest = size
		}
		e.thenLiteral(src, at, limit, i, step{uint32(r), size}, cost+m.repeatSize.cost[place][size-minMatch])
	}

	matched += m.zero(m.repeat[state])
	k := longest + 1
	for _, f := range matches {
		size := min(f.size, limit)
		for ; k <= size; k++ {
			cost := matched + m.matchSize.cost[place][k-minMatch] + m.distanceCost(f.back, k)
			p.reach(i+k, cost, i, f.back+repeats, 0)
			if k == size {
				e.thenLiteral(src, at, limit, i, step{f.back + repeats, size}, cost)
			}
		}
	}
}

// thenLiteral offers to go on after a match with a literal and a match at the same distance: one byte was changed in what is otherwise the same.
func (e *Encoder) thenLiteral(src []byte, at, limit, i int, s step, cost uint32) {
	rest := limit - s.size - 1
	if rest < minMatch {
		return
	}
	m := &e.model
	h := e.parser.nodes[i].history
	h.take(s.back, s.size)
	at += s.size
	d := int(h.last[0])
	if same(src, at-d, at+1, minMatch) < minMatch {
		return
	}
	cost += m.zero(m.match[h.state][at%places]) + m.literalCost(&h, src, at)
	h.literal()
	e.resume(src, at+1, rest, d, h, cost, i, s.back, s.size)
}

// resume offers a match at distance d, the last one, as the end of a way that began at node i with a step.
func (e *Encoder) resume(src []byte, at, limit, d int, h history, cost uint32, i int, back uint32, first int) {
	size := same(src, at-d-1, at, min(limit, nice))
	if size < minMatch {
		return
	}
	m, place := &e.model, at%places
	cost += m.one(m.match[h.state][place]) + m.one(m.repeat[h.state]) + m.repeatCost(h.state, 0, place)
	end := i + first + size
	if back != literal {
		end++
	}
	e.parser.reach(end, cost+m.repeatSize.cost[place][size-minMatch], i, back, first)
}
