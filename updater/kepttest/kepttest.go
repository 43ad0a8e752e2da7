// Package kepttest is for tests that read what earlier versions of Flipside saved.
package kepttest

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
)

// Whole makes sure that what the file at path held, JSON, is all in v, which was read from it: saved again it is the same, however it is spaced.
func Whole(path string, v any) error {
	was, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	is, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var want, got any
	if err := json.Unmarshal(was, &want); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := json.Unmarshal(is, &got); err != nil {
		return err
	}
	if !reflect.DeepEqual(want, got) {
		return fmt.Errorf("read and saved again it is\n%s\nand was\n%s", is, was)
	}
	return nil
}
