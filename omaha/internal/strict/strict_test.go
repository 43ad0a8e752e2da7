package strict

import (
	"encoding/xml"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func limits() Limits {
	return Limits{Bytes: 1000, Depth: 4, Elements: 10, Attributes: 3, Value: 20, Text: 30, Children: map[string]int{"r/one": 1}}
}

func TestCheck(t *testing.T) {
	for doc, want := range map[string]string{
		`<r/>`:                                "",
		`<?xml version="1.0"?><r a="1">x</r>`: "",
		"\n<r><!-- fine --><one/></r>\n\n":    "",
		`<!-- before --><r/>`:                 "",
		``:                                    "holds no <r>",
		`   `:                                 "holds no <r>",
		`<s/>`:                                `root is "s"`,
		`<r/><r/>`:                            "second root",
		`<r/>x`:                               "outside",
		`x<r/>`:                               "outside",
		`<r/><!-- after -->`:                  "follows",
		`<r/><?x?>`:                           "processing",
		`<r><?x?></r>`:                        "processing",
		` <?xml version="1.0"?><r/>`:          "processing",
		`<!DOCTYPE r><r/>`:                    "directive",
		`<r><!ENTITY x "y"></r>`:              "directive",
		`<r xmlns="u"/>`:                      "name space",
		`<r xmlns:x="u"/>`:                    "name space",
		`<x:r/>`:                              "name space",
		`<r><x:a/></r>`:                       "name space",
		`<r x:a="1"/>`:                        "name space",
		`<r a="1" a="2"/>`:                    "two attributes",
		`<r a="1" b="2" c="3" d="4"/>`:        "4 attributes",
		`<r a="123456789012345678901"/>`:      "longer than",
		`<r><a12345678901234567890/></r>`:     "element name",
		`<r><a><b><c><d/></c></b></a></r>`:    "deeper",
		`<r><one/><one/></r>`:                 "more than 1",
		`<r><a><one/></a><one/></r>`:          "",
		`<r>` + strings.Repeat("<a/>", 10) + `</r>`: "more than 10 elements",
		`<r>` + strings.Repeat("x", 31) + `</r>`:    "a text of 31",
		`<r>` + strings.Repeat(" ", 1000) + `</r>`:  "larger than",
		`<r>&x;</r>`:  "refused",
		`<r`:          "refused",
		`<r>`:         "refused",
		`<r></s>`:     "refused",
		`<r a=1/>`:    "refused",
		"<r>\xff</r>": "UTF-8",
		"\ufeff<r/>":  "outside",
		"<r>\x01</r>": "refused",
		`<?xml version="1.0" encoding="latin1"?><r/>`: "refused",
	} {
		err := Check([]byte(doc), "r", limits())
		switch {
		case want == "" && err != nil:
			t.Errorf("%q: %v", doc, err)
		case want != "" && (!errors.Is(err, ErrXML) || !strings.Contains(err.Error(), want)):
			t.Errorf("%q: %v, want %q", doc, err, want)
		}
	}
}

func TestRead(t *testing.T) {
	if data, err := Read(strings.NewReader("12345"), 5); err != nil || len(data) != 5 {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := Read(strings.NewReader("123456"), 5); !errors.Is(err, ErrXML) {
		t.Errorf("one byte too many: %v", err)
	}
}

// FuzzCheck: what passes holds none of the things that decoders take in different ways.
func FuzzCheck(f *testing.F) {
	f.Add([]byte(`<?xml version="1.0"?><r a="1">x<one/></r>`))
	f.Add([]byte(`<!DOCTYPE r><r/>`))
	f.Add([]byte(`<r a="1" a="2"/>`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var one, two struct {
			A    string `xml:"a,attr"`
			Text string `xml:",chardata"`
			In   []struct {
				Text string `xml:",chardata"`
			} `xml:"one"`
		}
		err := Decode(data, "r", limits(), &one)
		if Check(data, "r", limits()) != nil {
			if err == nil {
				t.Errorf("%q is refused, and was decoded", data)
			}
			return
		}
		// What passes means to this decoder what it means to Go's own.
		if plain := xml.Unmarshal(data, &two); (plain == nil) != (err == nil) || err == nil && !reflect.DeepEqual(one, two) {
			t.Errorf("%q: %+v, %v; without the check %+v, %v", data, one, err, two, plain)
		}
		if s := string(data); strings.Contains(s, "<!DOCTYPE") && !strings.Contains(s, "<!--") && !strings.Contains(s, "<![CDATA[") {
			t.Errorf("%q passed", s)
		}
	})
}
