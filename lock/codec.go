package lock

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
)

// Fields that this version does not know are kept beside the value that they came with and written back with it: an older
// host that changes the state must not take away what a newer one put there.

// decodeKeep decodes an object into v, a pointer to a struct, and returns the fields that v has no place for.
func decodeKeep(data []byte, v any) (map[string]json.RawMessage, error) {
	if err := json.Unmarshal(data, v); err != nil {
		return nil, err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	t := reflect.TypeOf(v).Elem()
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		for key := range all { // as encoding/json matches: without case
			if strings.EqualFold(key, name) {
				delete(all, key)
			}
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	return all, nil
}

// encodeKeep encodes v, a struct, with the fields of extra.
func encodeKeep(v any, extra map[string]json.RawMessage) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil || len(extra) == 0 {
		return data, err
	}
	more, err := json.Marshal(extra)
	if err != nil {
		return nil, err
	}
	if len(data) <= len("{}") {
		return more, nil
	}
	return append(append(data[:len(data)-1], ','), more[1:]...), nil
}

// UnmarshalJSON keeps the fields that it does not know.
func (p *Policy) UnmarshalJSON(data []byte) (err error) {
	type plain Policy
	p.extra, err = decodeKeep(data, (*plain)(p))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (p Policy) MarshalJSON() ([]byte, error) {
	type plain Policy
	return encodeKeep(plain(p), p.extra)
}

// UnmarshalJSON keeps the fields that it does not know.
func (h *Holder) UnmarshalJSON(data []byte) (err error) {
	type plain Holder
	h.extra, err = decodeKeep(data, (*plain)(h))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (h Holder) MarshalJSON() ([]byte, error) {
	type plain Holder
	return encodeKeep(plain(h), h.extra)
}

// UnmarshalJSON keeps the fields that it does not know.
func (s *State) UnmarshalJSON(data []byte) (err error) {
	type plain State
	s.extra, err = decodeKeep(data, (*plain)(s))
	return err
}

// MarshalJSON writes the fields that UnmarshalJSON did not know.
func (s State) MarshalJSON() ([]byte, error) {
	type plain State
	return encodeKeep(plain(s), s.extra)
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
	if s.Schema < 1 || s.Schema > schema {
		return State{}, fmt.Errorf("%w: it has schema %d, this version knows %d", ErrSchema, s.Schema, schema)
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
