// Package shallow decodes TOML that nobody need be trusted to have written: what is nested deeper than a person would write it is refused before the
// decoder sees it, because the decoder's memory grows with the square of the depth. A line of 16 KB that is one key takes it a gigabyte.
package shallow

import (
	"bytes"
	"errors"

	"github.com/BurntSushi/toml"
)

// most is more parts than any key of ours has.
const most = 64

// ErrDeep means that something is nested too deep.
var ErrDeep = errors.New("it has a key of more than 64 parts, or is nested as deep")

// Decode is [toml.Decode] for what is not deep.
func Decode(data []byte, v any) (toml.MetaData, error) {
	if isDeep(data) {
		return toml.MetaData{}, ErrDeep
	}
	return toml.Decode(string(data), v)
}

// isDeep counts the dots of each key, and the tables and lists that are open around it. Within a string and a comment nothing counts.
func isDeep(data []byte) bool {
	open, dots := 0, 0
	for len(data) > 0 {
		c := data[0]
		switch c {
		case '"', '\'':
			data = data[quoted(data):]
			continue
		case '#':
			end := bytes.IndexByte(data, '\n')
			if end < 0 {
				return false
			}
			data = data[end:]
			continue
		case '[', '{':
			open++
			dots = 0
		case ']', '}':
			open = max(open-1, 0)
			dots = 0
		case '=', ',', '\n':
			dots = 0
		case '.':
			dots++
		}
		if open+dots >= most {
			return true
		}
		data = data[1:]
	}
	return false
}

// quoted is the length of the string that data begins with. One that does not end is where the decoder stops as well.
func quoted(data []byte) int {
	quote, end := data[:1], data[:1]
	if triple := bytes.Repeat(quote, 3); bytes.HasPrefix(data, triple) {
		end = triple
	}
	for i := len(end); i < len(data); i++ {
		switch {
		case quote[0] == '"' && data[i] == '\\':
			i++
		case len(end) == 1 && data[i] == '\n':
			return i
		case bytes.HasPrefix(data[i:], end):
			for i += len(end); len(end) == 3 && i < len(data) && data[i] == quote[0]; i++ { // """He said "yes""""" ends with two of its own
			}
			return i
		}
	}
	return len(data)
}
