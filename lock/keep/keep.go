// Package keep decodes JSON objects that several versions of a program write, and keeps the fields that this version does not know.
//
// What is shared by a fleet is rewritten by hosts of different ages. An older host that changes one field must not take away what a
// newer one has put beside it. A type embeds nothing for that: it has a [Fields] and two methods of one line each,
//
//	func (p *Policy) UnmarshalJSON(data []byte) (err error) {
//		type plain Policy
//		p.extra, err = keep.Decode(data, (*plain)(p))
//		return err
//	}
//
//	func (p Policy) MarshalJSON() ([]byte, error) {
//		type plain Policy
//		return keep.Encode(plain(p), p.extra)
//	}
package keep

import (
	"bytes"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// Fields are those of an object that its type has no place for.
type Fields map[string]json.RawMessage

// Names returns the names of the fields in order.
func (f Fields) Names() []string { return slices.Sorted(maps.Keys(f)) }

// Decode decodes an object into v, a pointer to a struct, and returns the fields that v has no place for.
func Decode(data []byte, v any) (Fields, error) {
	strict := json.NewDecoder(bytes.NewReader(data))
	strict.DisallowUnknownFields()
	if strict.Decode(v) == nil && !strict.More() {
		return nil, nil // the usual case: there are none
	}
	if err := json.Unmarshal(data, v); err != nil {
		return nil, err
	}
	var all Fields
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

// Encode encodes v, a struct, together with the fields that Decode could not place.
func Encode(v any, extra Fields) ([]byte, error) {
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
