package config

import (
	"errors"
	"fmt"
	"net/url"
	"reflect"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// Setting is one key with its value.
type Setting struct {
	Key   string // as in "update.server"
	Value string // as it is written in TOML, without passwords in addresses

	field reflect.Value // where the value is
	whole string        // Value with passwords
}

// Settings lists every key there is, in the order of the reference, with its value in c.
func (c Config) Settings() []Setting { return settings(&c) }

func settings(c *Config) []Setting {
	var all []Setting
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		section, table := v.Field(i), v.Type().Field(i).Tag.Get("toml")
		for j := range section.NumField() {
			f := section.Field(j)
			key := table + "." + section.Type().Field(j).Tag.Get("toml")
			all = append(all, Setting{Key: key, Value: literal(f, redacted), field: f, whole: literal(f, func(s string) string { return s })})
		}
	}
	return all
}

func literal(v reflect.Value, show func(string) string) string {
	if s, ok := v.Interface().(fmt.Stringer); ok {
		return strconv.Quote(s.String())
	}
	switch v.Kind() {
	case reflect.String:
		return strconv.Quote(show(v.String()))
	case reflect.Slice:
		var parts []string
		for i := range v.Len() {
			parts = append(parts, literal(v.Index(i), show))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case reflect.Struct:
		var parts []string
		for i := range v.NumField() {
			if !v.Field(i).IsZero() {
				parts = append(parts, v.Type().Field(i).Tag.Get("toml")+" = "+literal(v.Field(i), show))
			}
		}
		return "{" + strings.Join(parts, ", ") + "}"
	}
	return fmt.Sprint(v.Interface())
}

// redacted takes the password out of an address.
func redacted(s string) string {
	if u, err := url.Parse(s); err == nil && u.User != nil {
		return u.Redacted()
	}
	return s
}

// Document writes the settings that have an origin as a file that [Read] reads, each under a comment that says where it is from. Settings that have
// none are left at their defaults.
func (l *Loaded) Document(head string) ([]byte, error) {
	if err := l.check(""); err != nil {
		return nil, err
	}
	var b strings.Builder
	b.WriteString(head)
	table := ""
	for _, s := range settings(&l.Config) {
		o, ok := l.Origins[s.Key]
		if !ok {
			continue
		}
		section, key, _ := strings.Cut(s.Key, ".")
		if section != table {
			table = section
			fmt.Fprintf(&b, "\n[%s]\n", section)
		}
		fmt.Fprintf(&b, "# %s\n%s = %s\n", o, key, s.whole)
	}
	back, err := Parse("what is to be written", []byte(b.String()))
	if err != nil {
		return nil, err
	}
	if !reflect.DeepEqual(back, l.Config) {
		return nil, errors.New("the settings cannot be written as a file that says the same")
	}
	return []byte(b.String()), nil
}

// known reports whether there is such a key, a table, or a key of a table in a list.
func known(k toml.Key) bool {
	t := reflect.TypeFor[Config]()
	for _, part := range k {
		if t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return false
		}
		i := 0
		for i < t.NumField() && t.Field(i).Tag.Get("toml") != part {
			i++
		}
		if i == t.NumField() {
			return false
		}
		t = t.Field(i).Type
	}
	return true
}

// nearest returns the known key that a mistyped one most likely means, "" if none is near.
func nearest(key string) string {
	best, least := "", 3
	key = strings.ToLower(key)
	for _, s := range (Config{}).Settings() {
		table, _, _ := strings.Cut(s.Key, ".")
		for _, k := range []string{table, s.Key} {
			if d := distance(key, k); d < least {
				best, least = k, d
			}
		}
	}
	return best
}

// distance is the number of letters to change, add or take away between a and b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
