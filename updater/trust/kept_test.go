package trust

import (
	"encoding/json"
	"os"
	"reflect"
	"testing"
)

// TestKeptFloor reads the floor that an earlier version of Flipside saved: nothing that it holds may be lost.
func TestKeptFloor(t *testing.T) {
	f := &Floor{Path: "../../testdata/host/trust.json", Mode: FileOnly}
	r, warning, err := f.load()
	if err != nil || warning != "" {
		t.Fatal(err, warning)
	}
	data, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var want, got any
	if err := json.Unmarshal(data, &want); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(again, &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(want, got) {
		t.Errorf("read and saved again it is\n%s\nand was\n%s", again, data)
	}
}
