package server

import (
	"errors"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/omaha/shallow"
)

// A file, or a bundle from somewhere else, cannot make the decoder take gigabytes.
func TestDeepKeys(t *testing.T) {
	for _, text := range []string{strings.Repeat(`"=".`, 20_000) + "a = 1", strings.Repeat("a = { ", 5_000)} {
		var v map[string]any
		if err := decodeTOML([]byte(text), &v); !errors.Is(err, shallow.ErrDeep) {
			t.Errorf("%.40s...: %v", text, err)
		}
	}
}
