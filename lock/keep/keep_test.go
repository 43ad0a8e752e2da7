package keep

import (
	"encoding/json"
	"slices"
	"testing"
)

type thing struct {
	A int    `json:"a"`
	B string `json:"b,omitempty"`

	extra Fields
}

func (v *thing) UnmarshalJSON(data []byte) (err error) {
	type plain thing
	v.extra, err = Decode(data, (*plain)(v))
	return err
}

func (v thing) MarshalJSON() ([]byte, error) {
	type plain thing
	return Encode(plain(v), v.extra)
}

func TestRoundTrip(t *testing.T) {
	for _, tt := range []struct {
		in, out string
		names   []string
	}{
		{`{"a":1}`, `{"a":1}`, nil},
		{`{"z":[1,{"y":2}],"a":1,"b":"x","c":null}`, `{"a":1,"b":"x","c":null,"z":[1,{"y":2}]}`, []string{"c", "z"}},
		{`{"A":3}`, `{"a":3}`, nil}, // as encoding/json matches names
		{`null`, `{"a":0}`, nil},
	} {
		var v thing
		if err := json.Unmarshal([]byte(tt.in), &v); err != nil {
			t.Fatal(err)
		}
		out, err := json.Marshal(v)
		if err != nil || string(out) != tt.out || !slices.Equal(v.extra.Names(), tt.names) {
			t.Errorf("%s came back as %s with %v, %v", tt.in, out, v.extra.Names(), err)
		}
	}
	var v thing
	if err := json.Unmarshal([]byte(`[]`), &v); err == nil {
		t.Error("a list was taken for an object")
	}
}
