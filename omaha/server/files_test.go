package server

import (
	"strings"
	"testing"
)

// A file, or a bundle from somewhere else, cannot make the decoder take gigabytes; what looks a little like such a key can be read.
func TestDeepKeys(t *testing.T) {
	for _, text := range []string{
		strings.Repeat("a.", 20_000) + "a = 1", strings.Repeat(`"#" . `, 20_000) + "a = 1", "[" + strings.Repeat("a.", 20_000) + "a]\n", "x = { " + strings.Repeat("a.", 20_000) + "a = 1 }",
	} {
		var v map[string]any
		if err := decodeTOML([]byte(text), &v); err == nil || !strings.Contains(err.Error(), "more than 64 parts") {
			t.Errorf("%.40s...: %v", text, err)
		}
	}
	for _, text := range []string{
		"# " + strings.Repeat(".", 1000) + "\n\n", "x = [" + strings.Repeat(`"10.0.0.1", `, 1000) + "]", "x = [\n" + strings.Repeat("\"10.0.0.1\",\n", 1000) + "]",
		strings.Repeat("a", 1000) + " = 1.5", strings.Repeat("a.", maxDots) + "a = 1",
	} {
		if isDeep([]byte(text)) {
			t.Errorf("%.40s... is said to have a key of many parts", text)
		}
	}
}
