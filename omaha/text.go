package omaha

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxText is how much of a text from outside is shown to people.
const maxText = 200

// Printable makes a text from outside safe for a log line or a terminal: control characters, invisible formatting
// (such as the marks that turn the writing direction around) and invalid UTF-8 become U+FFFD, and it is cut after 200 bytes.
func Printable(s string) string {
	var b strings.Builder
	for i, r := range s {
		if b.Len() >= maxText {
			b.WriteString("...")
			break
		}
		switch {
		case r == utf8.RuneError, unicode.IsControl(r), unicode.Is(unicode.Cf, r), r == '\u2028', r == '\u2029':
			b.WriteRune(utf8.RuneError)
		case i == 0 && unicode.Is(unicode.Mn, r): // would combine with whatever is printed before it
			b.WriteRune(utf8.RuneError)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// plain says whether s consists of printable ASCII, which is all that an identifier on the wire needs.
func plain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
