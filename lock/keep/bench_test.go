package keep

import (
	"encoding/json"
	"testing"
)

// BenchmarkDecode is measured against decoding without keeping anything.
func BenchmarkDecode(b *testing.B) {
	data := []byte(`{"a":1,"b":"a text of some length"}`)
	b.Run("keep", func(b *testing.B) {
		for b.Loop() {
			var v thing
			if err := json.Unmarshal(data, &v); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("plain", func(b *testing.B) {
		type plain thing
		for b.Loop() {
			var v plain
			if err := json.Unmarshal(data, &v); err != nil {
				b.Fatal(err)
			}
		}
	})
}
