package kepttest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// The check finds what was lost, and what came to it.
func TestWhole(t *testing.T) {
	type now struct {
		A int      `json:"a,omitempty"`
		B []string `json:"b,omitempty"`
		C string   `json:"c"`
	}
	for text, ok := range map[string]bool{
		`{"a": 1, "b": ["x"], "c": ""}`:          true,
		"{\n\t\"c\": \"x\",\n\t\"a\": 2\n}\n":    true,
		`{"a": 1, "c": "", "gone": true}`:        false,
		`{"a": 0, "c": ""}`:                      false,
		`{"a": 1}`:                               false,
		`{"a": 1, "b": [], "c": ""}`:             false,
		`{"a": 1, "b": ["x"], "c": ""} and more`: false,
	} {
		path := filepath.Join(t.TempDir(), "state.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var v now
		json.Unmarshal([]byte(text), &v)
		if err := Whole(path, v); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := Whole(filepath.Join(t.TempDir(), "nothing"), now{}); err == nil {
		t.Error("what is not there is whole")
	}
}
