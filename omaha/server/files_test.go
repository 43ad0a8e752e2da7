package server

import (
	"strings"
	"testing"
)

// A file, or a bundle from somewhere else, cannot make the decoder take gigabytes.
func TestDeepKeys(t *testing.T) {
	for _, part := range []string{"a.", `"#" . `, `"=".`, `",".`, `"..".`, "'{'."} {
		deep := strings.Repeat(part, 20_000) + "a"
		for _, text := range []string{deep + " = 1", "[" + deep + "]\n", "x = { " + deep + " = 1 }"} {
			var v map[string]any
			if err := decodeTOML([]byte("y = 1\n"+text), &v); err == nil || !strings.Contains(err.Error(), "line 2 has more than 256 dots") {
				t.Errorf("%.40s...: %v", text, err)
			}
		}
	}
	var v struct{ X []string }
	if err := decodeTOML([]byte("x = [\n"+strings.Repeat("\"10.0.0.1\",\n", 1000)+"]"), &v); err != nil || len(v.X) != 1000 {
		t.Errorf("%d, %v", len(v.X), err)
	}
}
