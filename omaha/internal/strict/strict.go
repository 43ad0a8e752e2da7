// Package strict looks over an XML document before anything decodes it.
//
// Go's decoder is friendly where a host that updates itself must not be: the last of two equal attributes wins, an
// element in a foreign name space matches the plain name, whatever follows the root is not read, and a megabyte of
// nesting costs fifty of memory. Check refuses all of that, so what a decoder sees afterwards has one meaning.
package strict

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// Limits bound a document. A zero field means no limit of that kind, except that Bytes must be set.
type Limits struct {
	Bytes      int            // size of the whole document
	Depth      int            // elements inside each other
	Elements   int            // elements altogether
	Attributes int            // attributes of one element
	Value      int            // bytes of one attribute value or name
	Text       int            // bytes of one piece of text between tags
	Children   map[string]int // how often an element may occur in its parent, keyed "parent/child"
}

// ErrXML is wrapped by every refusal of Check.
var ErrXML = errors.New("refused XML")

// Read reads a document of at most limit bytes. One byte more is an error and not a truncated document.
func Read(r io.Reader, limit int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > limit {
		return nil, refuse("it is larger than %d bytes", limit)
	}
	return data, nil
}

// Check returns an error that wraps ErrXML unless data is one plain element called root, within the limits.
func Check(data []byte, root string, lim Limits) error { return Decode(data, root, lim, nil) }

// Decode fills v from data as xml.Unmarshal does, and refuses what Check refuses. Each token is looked at before the
// decoder sees it, so that one pass does for both. After an error nothing in v counts. A nil v only checks.
func Decode(data []byte, root string, lim Limits, v any) error {
	if len(data) > lim.Bytes {
		return refuse("it is larger than %d bytes", lim.Bytes)
	}
	if !utf8.Valid(data) {
		return refuse("it is not UTF-8")
	}
	c := &checker{lim: lim, root: root, raw: xml.NewDecoder(bytes.NewReader(data))}
	d := xml.NewTokenDecoder(c)
	if v != nil {
		if err := d.Decode(v); err != nil {
			return c.error(err)
		}
	}
	for { // whatever follows the root, or everything
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			return c.error(err)
		}
	}
	if !c.closed {
		return refuse("it holds no <%s>", root)
	}
	return nil
}

// frame is one open element and how many children of each name it has had.
type frame struct {
	name  string
	count map[string]int
}

// checker hands on the tokens of raw that pass.
type checker struct {
	raw      *xml.Decoder
	lim      Limits
	root     string
	open     []frame
	elements int
	begun    bool // something was seen: an XML declaration must be first
	closed   bool // the root element is complete
}

// Token makes the checker a source of tokens. Names come as they are written, so that a name space shows.
func (c *checker) Token() (xml.Token, error) {
	t, err := c.raw.RawToken()
	if err != nil {
		return nil, err
	}
	if err := c.token(t); err != nil {
		return nil, err
	}
	return t, nil
}

// error makes an error of the decoder a refusal, if it is not one yet.
func (c *checker) error(err error) error {
	switch {
	case errors.Is(err, ErrXML):
		return err
	case err == io.EOF:
		return refuse("it holds no <%s>", c.root)
	}
	return fmt.Errorf("%w: %w", ErrXML, err)
}

func (c *checker) token(t xml.Token) error {
	first := !c.begun
	c.begun = true
	switch t := t.(type) {
	case xml.Directive:
		return refuse("it holds a <!...> directive")
	case xml.ProcInst:
		if t.Target != "xml" || !first {
			return refuse("it holds a processing instruction %q", t.Target)
		}
	case xml.Comment:
		if c.closed {
			return refuse("something follows </%s>", c.root)
		}
	case xml.CharData:
		if len(c.open) == 0 && len(bytes.TrimSpace(t)) != 0 {
			return refuse("text stands outside <%s>", c.root)
		}
		if c.lim.Text > 0 && len(t) > c.lim.Text {
			return refuse("a text of %d bytes", len(t))
		}
	case xml.StartElement:
		return c.start(t)
	case xml.EndElement:
		// The decoder behind this one sees to it that the names match.
		if len(c.open) == 0 {
			return refuse("something ends that has not begun: </%s>", short(t.Name.Local))
		}
		c.open = c.open[:len(c.open)-1]
		c.closed = len(c.open) == 0
	}
	return nil
}

func (c *checker) start(t xml.StartElement) error {
	name := t.Name.Local
	switch {
	case t.Name.Space != "":
		return refuse("element %q is in a name space", short(name))
	case c.lim.Value > 0 && len(name) > c.lim.Value:
		return refuse("an element name of %d bytes", len(name))
	case c.closed:
		return refuse("a second root element %q", short(name))
	case len(c.open) == 0 && name != c.root:
		return refuse("its root is %q, not %q", short(name), c.root)
	}
	if c.elements++; c.lim.Elements > 0 && c.elements > c.lim.Elements {
		return refuse("more than %d elements", c.lim.Elements)
	}
	if err := c.attributes(t); err != nil {
		return err
	}
	if n := len(c.open); n > 0 {
		parent := &c.open[n-1]
		if max, limited := c.lim.Children[parent.name+"/"+name]; limited {
			if parent.count == nil {
				parent.count = make(map[string]int)
			}
			if parent.count[name]++; parent.count[name] > max {
				return refuse("more than %d <%s> in one <%s>", max, name, parent.name)
			}
		}
	}
	c.open = append(c.open, frame{name: name})
	if c.lim.Depth > 0 && len(c.open) > c.lim.Depth {
		return refuse("elements nested deeper than %d", c.lim.Depth)
	}
	return nil
}

func (c *checker) attributes(t xml.StartElement) error {
	if c.lim.Attributes > 0 && len(t.Attr) > c.lim.Attributes {
		return refuse("<%s> has %d attributes", short(t.Name.Local), len(t.Attr))
	}
	seen := make(map[string]bool, len(t.Attr))
	for _, a := range t.Attr {
		switch {
		case a.Name.Space != "" || a.Name.Local == "xmlns":
			return refuse("attribute %q of <%s> names a name space", short(a.Name.Local), short(t.Name.Local))
		case seen[a.Name.Local]:
			return refuse("<%s> has two attributes %q", short(t.Name.Local), short(a.Name.Local))
		case c.lim.Value > 0 && (len(a.Value) > c.lim.Value || len(a.Name.Local) > c.lim.Value):
			return refuse("an attribute of <%s> is longer than %d bytes", short(t.Name.Local), c.lim.Value)
		}
		seen[a.Name.Local] = true
	}
	return nil
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrXML}, args...)...)
}

// short keeps a name from outside from filling a log line.
func short(name string) string {
	if len(name) > 40 {
		return name[:40] + "..."
	}
	return name
}
