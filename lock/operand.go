package lock

import (
	"regexp"
	"strings"
)

var bare = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:+-]*$`)

// Operand writes a name as the last word of a command that somebody may copy: a shell takes it for one word, and the program for no option. Hosts choose what they are
// called and what they say that they update to.
func Operand(name string) string {
	if bare.MatchString(name) {
		return name
	}
	word := "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
	if strings.HasPrefix(name, "-") {
		return "-- " + word
	}
	return word
}
