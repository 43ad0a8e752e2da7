package omaha

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode"

	wire "github.com/flatcar/go-omaha/omaha"
)

// Offer is a release that a server offers. Only a validated answer makes one.
// It is a claim: nothing in it is to be believed before the payload's signature and version hold.
type Offer struct {
	Version   string   `json:"version"`
	Size      int64    `json:"size"`
	SHA256    [32]byte `json:"sha256"` // of the whole payload file
	URLs      []string `json:"urls"`   // in the server's order
	Name      string   `json:"name"`   // the payload's name on the server, a plain file name, for people only
	Downgrade bool     `json:"downgrade,omitempty"`
	Delta     bool     `json:"delta,omitempty"`

	MetadataSize      int64  `json:"metadata_size,omitempty"` // 0 when the server did not say
	MetadataSignature []byte `json:"metadata_signature,omitempty"`

	DisableBackoff bool      `json:"disable_backoff,omitempty"` // the server wants no pause between attempts
	MaxFailures    int       `json:"max_failures"`              // attempts per URL, 1..10
	Extras         []Package `json:"extras,omitempty"`          // further files of the release
	IsFloor        bool      `json:"is_floor,omitempty"`        // a version that must not be skipped
}

// Package is a further file of a release.
type Package struct {
	Name     string   `json:"name"`
	Size     int64    `json:"size"`
	SHA256   [32]byte `json:"sha256"`
	URLs     []string `json:"urls"`
	Required bool     `json:"required,omitempty"`
}

// offer validates everything of a manifest that would be obeyed.
func (c *Client) offer(urls []*wire.URL, m *wire.Manifest) (*Offer, error) {
	if len(m.Packages) == 0 {
		return nil, invalid("release %s has no package", m.Version)
	}
	names := make(map[string]bool, len(m.Packages))
	for _, p := range m.Packages {
		if err := fileName(p.Name); err != nil {
			return nil, err
		}
		if names[p.Name] {
			return nil, invalid("two packages are called %q", p.Name)
		}
		names[p.Name] = true
	}
	bases, err := c.codebases(urls)
	if err != nil {
		return nil, err
	}
	action, err := postinstall(m)
	if err != nil {
		return nil, err
	}
	main := m.Packages[0]
	o := &Offer{Version: m.Version, Name: main.Name, URLs: join(bases, main.Name), IsFloor: m.IsFloor, MaxFailures: 10}
	if o.Size, err = c.size(main); err != nil {
		return nil, err
	}
	if o.SHA256, err = digest(main.Name, main.SHA256, action.SHA256); err != nil {
		return nil, err
	}
	o.Delta, o.DisableBackoff = action.IsDeltaPayload, action.DisablePayloadBackoff
	if n := action.MaxFailureCountPerURL; n > 0 && n < 10 {
		o.MaxFailures = int(n)
	}
	if action.MetadataSize != "" && action.MetadataSize != "0" {
		n, err := strconv.ParseInt(action.MetadataSize, 10, 64)
		if err != nil || n <= 0 || n > o.Size {
			// Some servers relay a size that they never looked at; the payload's own header decides.
			return nil, invalid("metadata size %q of a payload of %d bytes", Printable(action.MetadataSize), o.Size)
		}
		o.MetadataSize = n
	}
	if action.MetadataSignatureRsa != "" {
		if o.MetadataSignature, err = base64.StdEncoding.Strict().DecodeString(action.MetadataSignatureRsa); err != nil {
			return nil, invalid("the metadata signature is not base64")
		}
	}
	return o, c.extras(o, bases, m.Packages[1:])
}

// extras adds the further files. One that is not required and has no SHA-256 is left out: nothing could check it.
func (c *Client) extras(o *Offer, bases []*url.URL, packages []*wire.Package) error {
	for _, p := range packages {
		if p.SHA256 == "" && !p.Required {
			continue
		}
		size, err := c.size(p)
		if err != nil {
			return err
		}
		sum, err := digest(p.Name, p.SHA256)
		if err != nil {
			return err
		}
		o.Extras = append(o.Extras, Package{Name: p.Name, Size: size, SHA256: sum, URLs: join(bases, p.Name), Required: p.Required})
	}
	return nil
}

func (c *Client) size(p *wire.Package) (int64, error) {
	limit := c.MaxSize
	if limit <= 0 {
		limit = defaultMaxSize
	}
	if p.Size == 0 || p.Size > uint64(limit) {
		return 0, invalid("package %q has %d bytes, not 1 to %d", p.Name, p.Size, limit)
	}
	return int64(p.Size), nil
}

// postinstall returns the one action that says something about the payload, or an empty one.
func postinstall(m *wire.Manifest) (wire.Action, error) {
	var found *wire.Action
	for _, a := range m.Actions {
		if a.Event != "postinstall" {
			continue
		}
		if found != nil {
			return wire.Action{}, invalid("release %s has two postinstall actions", m.Version)
		}
		found = a
	}
	if found == nil {
		return wire.Action{}, nil
	}
	return *found, nil
}

// digest reads a SHA-256 from the places where a server may put it. The spelling differs by place and by server, so the
// length decides: 64 hexadecimal digits, or 44 characters of base64. All that are given have to agree; none is an error.
func digest(name string, values ...string) ([32]byte, error) {
	var sum [32]byte
	found := false
	for _, v := range values {
		var raw []byte
		var err error
		switch len(v) {
		case 0:
			continue
		case hex.EncodedLen(sha256.Size):
			raw, err = hex.DecodeString(v)
		case base64.StdEncoding.EncodedLen(sha256.Size):
			raw, err = base64.StdEncoding.Strict().DecodeString(v)
		default:
			return sum, invalid("SHA-256 %q of package %q is neither 64 hexadecimal digits nor 44 characters of base64", Printable(v), name)
		}
		if err != nil || len(raw) != sha256.Size {
			return sum, invalid("SHA-256 %q of package %q cannot be read", Printable(v), name)
		}
		if found && !bytes.Equal(raw, sum[:]) {
			return sum, invalid("package %q has two different SHA-256", name)
		}
		copy(sum[:], raw)
		found = true
	}
	if !found {
		return sum, invalid("package %q has no SHA-256", name)
	}
	return sum, nil
}

// fileName accepts a plain file name. It is used in an address only, and never as a path here, but other programs that
// read the same answer may not be so careful, so a server that sends another one is not believed in anything.
func fileName(name string) error {
	switch {
	case name == "" || name == "." || name == "..", len(name) > 255, strings.ContainsAny(name, `/\%`), Printable(name) != name && len(name) <= maxText:
		return invalid("package name %q is not a plain file name", Printable(name))
	}
	for _, r := range name {
		if r < ' ' || r == 0x7f {
			return invalid("package name %q is not a plain file name", Printable(name))
		}
	}
	return nil
}

// codebases returns the addresses that may be used, in order. A bad one is left out as long as a good one remains.
func (c *Client) codebases(urls []*wire.URL) ([]*url.URL, error) {
	control, err := url.Parse(c.URL)
	if err != nil {
		return nil, err
	}
	policy := addressPolicy{plainHTTP: c.AllowPlainHTTP || control.Scheme == "http", loopback: isLocal(control.Hostname())}
	var good []*url.URL
	var first error
	for _, raw := range urls {
		u, err := url.Parse(raw.CodeBase)
		if err == nil {
			err = policy.check(u)
		}
		if err == nil && (u.RawQuery != "" || u.ForceQuery || u.Fragment != "") {
			err = invalid("payload address %q has a query", redact(raw.CodeBase))
		}
		if err != nil {
			if first == nil {
				first = invalid("payload address %q: %s", redact(raw.CodeBase), Printable(err.Error()))
			}
			continue
		}
		good = append(good, u)
	}
	if len(good) == 0 {
		if first == nil {
			first = invalid("an offer without a payload address")
		}
		return nil, first
	}
	return good, nil
}

// addressPolicy says which payload addresses may be used, also after a redirect.
type addressPolicy struct {
	plainHTTP bool // http:// is good enough
	loopback  bool // the server itself is on this machine or link, so payloads may be
}

func (p addressPolicy) check(u *url.URL) error {
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return invalid("scheme %q", Printable(u.Scheme))
	case u.Scheme == "http" && !p.plainHTTP:
		return invalid("plain http from a server that is asked over https")
	case u.Host == "" || u.Opaque != "":
		return invalid("it names no host")
	case u.User != nil:
		return invalid("it holds a user name")
	case strings.ContainsFunc(u.Hostname(), func(r rune) bool { return r > unicode.MaxASCII }):
		return invalid("host %q is not in ASCII", Printable(u.Hostname())) // there are other ways to write each letter and digit; a name has its xn-- form
	case !p.loopback && isLocal(u.Hostname()):
		return invalid("host %q is this machine or its link", Printable(u.Hostname()))
	}
	return nil
}

// isLocal recognises an address that means something else on every machine: a server has no business to name one.
func isLocal(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		// 127.1 and 0x7f000001 are addresses to some resolvers. No domain ends in a number, so such a host is none.
		label := host[strings.LastIndexByte(host, '.')+1:]
		return label == "" || strings.HasPrefix(label, "0x") || strings.Trim(label, "0123456789") == ""
	}
	addr = addr.Unmap()
	return addr.IsLoopback() || addr.IsUnspecified() || addr.IsLinkLocalUnicast() || addr.IsLinkLocalMulticast() || addr.IsMulticast()
}

// join puts a file name behind each address, with exactly one slash between.
func join(bases []*url.URL, name string) []string {
	out := make([]string, len(bases))
	for i, b := range bases {
		u := *b
		if !strings.HasSuffix(u.Path, "/") {
			u.Path += "/"
			if u.RawPath != "" {
				u.RawPath += "/"
			}
		}
		if u.RawPath != "" {
			u.RawPath += url.PathEscape(name)
		}
		u.Path += name
		out[i] = u.String()
	}
	return out
}
