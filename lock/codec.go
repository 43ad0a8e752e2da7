package lock

import (
	"encoding/json"
	"fmt"

	"github.com/flipside-linux/flipside/lock/keep"
)

// The types of the shared state keep the fields that they do not know; see package keep.

// UnmarshalJSON keeps the fields that it does not know.
func (p *Policy) UnmarshalJSON(data []byte) (err error) {
	type plain Policy
	p.extra, err = keep.Decode(data, (*plain)(p))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (p Policy) MarshalJSON() ([]byte, error) {
	type plain Policy
	return keep.Encode(plain(p), p.extra)
}

// UnmarshalJSON keeps the fields that it does not know.
func (h *Holder) UnmarshalJSON(data []byte) (err error) {
	type plain Holder
	h.extra, err = keep.Decode(data, (*plain)(h))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (h Holder) MarshalJSON() ([]byte, error) {
	type plain Holder
	return keep.Encode(plain(h), h.extra)
}

// UnmarshalJSON keeps the fields that it does not know.
func (f *Failure) UnmarshalJSON(data []byte) (err error) {
	type plain Failure
	f.extra, err = keep.Decode(data, (*plain)(f))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (f Failure) MarshalJSON() ([]byte, error) {
	type plain Failure
	return keep.Encode(plain(f), f.extra)
}

// UnmarshalJSON keeps the fields that it does not know.
func (h *Halt) UnmarshalJSON(data []byte) (err error) {
	type plain Halt
	h.extra, err = keep.Decode(data, (*plain)(h))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (h Halt) MarshalJSON() ([]byte, error) {
	type plain Halt
	return keep.Encode(plain(h), h.extra)
}

// UnmarshalJSON keeps the fields that it does not know.
func (s *State) UnmarshalJSON(data []byte) (err error) {
	type plain State
	s.extra, err = keep.Decode(data, (*plain)(s))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (s State) MarshalJSON() ([]byte, error) {
	type plain State
	return keep.Encode(plain(s), s.extra)
}

// decodeState reads what a store holds of a group. rev is the revision at which it was written, 0 for a group that nobody has used.
func decodeState(data []byte, rev int64) (State, error) {
	if rev == 0 {
		return State{Schema: schema, Policy: DefaultPolicy()}, nil
	}
	s := State{Policy: DefaultPolicy()}
	if err := json.Unmarshal(data, &s); err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrSchema, err)
	}
	if s.Schema < 1 || s.Schema > signedSchema {
		return State{}, fmt.Errorf("%w: it has schema %d, this version knows %d", ErrSchema, s.Schema, signedSchema)
	}
	if err := s.Policy.Check(); err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrSchema, err)
	}
	for i := range s.Holders {
		if s.Holders[i].Token == 0 { // the revision of a grant is only known when the grant is committed
			s.Holders[i].Token = rev
		}
	}
	return s, nil
}
