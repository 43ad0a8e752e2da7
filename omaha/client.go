package omaha

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/go-retryablehttp"

	"github.com/flipside-linux/flipside/omaha/internal/strict"
)

const (
	// MinPoll and MaxPoll are the bounds of any waiting time that a server can ask for.
	MinPoll = time.Minute
	MaxPoll = 24 * time.Hour

	// maxAnswer bounds the answer to a check; Nebraska's largest are below 2 KiB.
	maxAnswer = 256 << 10

	defaultTimeout = 60 * time.Second
	defaultMaxSize = 64 << 30
)

// Client asks one server about one application. Its fields describe the host; they are read by each call and must not
// change during one.
type Client struct {
	URL     string // the server's update address, such as https://updates.example.org/v1/update/
	AppID   string // as the server knows it: UUID with or without braces, or a product id
	Version string // the running version, SemVer 2
	Track   string // the channel
	Board   string // amd64-usr, arm64-usr: decides the architecture; Nebraska takes anything that it does not know for amd64

	MachineID    string // 1..50 characters and no braced UUID: the 32 digits of /etc/machine-id
	MachineAlias string // a name for people
	BootID       string // /proc/sys/kernel/random/boot_id
	OEM          string
	OEMVersion   string
	AlephVersion string // the version that this host was installed with
	OSPlatform   string // default CoreOS, as every Flatcar host says
	OSVersion    string // default Chateau, likewise
	OSArch       string // os@arch, for servers that go by it; leave it empty where Board is set
	Machine      string // what uname -m says, default x86_64
	UserAgent    string // "name-x.y.z", default flipside-1.0.0

	HTTP           *HTTP         // required
	Timeout        time.Duration // for one check or report with all its retries, default 60 s
	MaxSize        int64         // the largest payload that is accepted, such as the slot's size; default 64 GiB
	AllowPlainHTTP bool          // accept http:// payload addresses from an https:// server: payloads are signed
}

// CheckRequest is one update check.
type CheckRequest struct {
	OnDemand bool    // a person asked for it
	Events   []Event // events that ride along; the server looks at them before it decides

	// Reset adds an event 3/0 that tells the server to forget an update which it believes to be running: the cure for
	// [InProgress] when this host knows better, for instance after it was killed during a download.
	Reset bool

	Deltas         bool   // this host takes a delta from the running version; servers that have none ignore it
	AllowDowngrade bool   // accept an older version than the running one: local consent
	VersionPrefix  string // accept only versions under this one: "1.2" means 1.2.x

	// Hold says in one line why this host does not move at the moment. Servers that do not know the attribute ignore it.
	Hold string
}

// Check asks for an update. An error means that there was no usable answer: its type is *[Error].
func (c *Client) Check(ctx context.Context, req CheckRequest) (Answer, error) {
	const op = "update check"
	if req.Reset {
		req.Events = append([]Event{Failed(CodeTransfer)}, req.Events...)
	}
	body, err := c.request(request{onDemand: req.OnDemand, ping: true, check: true, deltas: req.Deltas, events: req.Events, hold: req.Hold, prefix: req.VersionPrefix})
	if err != nil {
		return Answer{}, c.fail(op, err)
	}
	data, err := c.post(ctx, op, body)
	if err != nil {
		return Answer{}, err
	}
	answer, err := c.decide(data, req)
	if err != nil {
		return Answer{}, c.fail(op, err)
	}
	return answer, nil
}

// Report sends one event. The server's acknowledgement means that it has read it, not that it kept it.
func (c *Client) Report(ctx context.Context, event Event) error {
	return c.exchange(ctx, "event report", request{events: []Event{event}})
}

// Ping tells the server that this host lives, without asking for anything: what to send while a reboot is due.
// hold says in one line what the host waits for; it may be empty.
func (c *Client) Ping(ctx context.Context, hold string) error {
	return c.exchange(ctx, "ping", request{ping: true, hold: hold})
}

// exchange sends a request whose answer holds nothing but an acknowledgement.
func (c *Client) exchange(ctx context.Context, op string, r request) error {
	body, err := c.request(r)
	if err != nil {
		return c.fail(op, err)
	}
	data, err := c.post(ctx, op, body)
	if err != nil {
		return err
	}
	app, _, err := c.app(data)
	if err != nil {
		return c.fail(op, err)
	}
	if status := string(app.Status); status != "ok" {
		reason, known := refusal(status)
		if !known {
			reason = Reason{Text: "unknown status", Status: Printable(status)}
		}
		return c.fail(op, invalid("%s", reason))
	}
	return nil
}

func (c *Client) fail(op string, err error) error {
	return &Error{Op: op, URL: redact(c.URL), Code: Code(err), Err: err}
}

// post sends body and returns the answer's bytes: HTTP says 200, and the size is within bounds.
func (c *Client) post(ctx context.Context, op string, body []byte) ([]byte, error) {
	timeout := c.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodPost, c.URL, body)
	if err != nil {
		return nil, c.fail(op, fmt.Errorf("%w: %w", ErrConfig, err))
	}
	req.Header.Set("Content-Type", "text/xml")
	req.Header.Set("User-Agent", c.agent())
	resp, err := c.HTTP.client.Do(req)
	if err != nil {
		return nil, c.fail(op, transportError(err))
	}
	defer resp.Body.Close()
	e := &Error{Op: op, URL: redact(c.URL)}
	if resp.StatusCode != http.StatusOK {
		e.Code = codeHTTPStatus + resp.StatusCode
		e.RetryAfter = retryAfter(resp.Header, c.HTTP.now())
		e.Err = fmt.Errorf("the server answers %s%s", Printable(resp.Status), firstBytes(resp))
		return nil, e
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return nil, c.fail(op, invalid("it is packed with %q, which was not asked for", Printable(enc)))
	}
	data, err := strict.Read(resp.Body, maxAnswer)
	if err != nil {
		if errors.Is(err, strict.ErrXML) {
			return nil, c.fail(op, invalid("%w", err))
		}
		return nil, c.fail(op, fmt.Errorf("read the answer: %w", err))
	}
	if isHTML(resp.Header.Get("Content-Type"), data) {
		return nil, c.fail(op, &codeError{CodeXMLParse, fmt.Errorf("%w: %q answered %q", ErrHTML, resp.Request.URL.Redacted(), snippet(data))})
	}
	if isEmpty(data) {
		return nil, c.fail(op, &codeError{CodeEmptyResponse, fmt.Errorf("%w: it is empty", ErrResponse)})
	}
	return data, nil
}

// isEmpty recognises no answer at all, which Nebraska gives with status 200: nothing, or only the XML declaration.
func isEmpty(data []byte) bool {
	data = bytes.TrimSpace(data)
	if bytes.HasPrefix(data, []byte("<?xml")) {
		if i := bytes.Index(data, []byte("?>")); i >= 0 {
			data = bytes.TrimSpace(data[i+2:])
		}
	}
	return len(data) == 0
}

// bracedUUID is the shape of machine id that Nebraska takes for another Nebraska and leaves out of all its lists.
var bracedUUID = regexp.MustCompile(`^\{[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\}$`)

// validate finds what a server would refuse without saying why.
func (c *Client) validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrConfig}, args...)...)
	}
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return bad("server address %q cannot be read", redact(c.URL))
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("server address %q is neither http:// nor https://", redact(c.URL))
	case u.Host == "":
		return bad("server address %q names no host", redact(c.URL))
	case c.HTTP == nil:
		return bad("no HTTP client")
	case c.AppID == "":
		return bad("no application id")
	case c.MachineID == "" || len(c.MachineID) > 50:
		return bad("machine id %q has %d characters, not 1 to 50", Printable(c.MachineID), len(c.MachineID))
	case bracedUUID.MatchString(c.MachineID):
		return bad("machine id %q has braces: servers take such a host for another server and do not count it", c.MachineID)
	}
	if _, err := parseVersion(c.Version); err != nil {
		return bad("running %w", err)
	}
	for name, value := range map[string]string{
		"application id": c.AppID, "machine id": c.MachineID, "track": c.Track, "board": c.Board, "boot id": c.BootID,
		"OEM": c.OEM, "OEM version": c.OEMVersion, "first version": c.AlephVersion, "OS platform": c.OSPlatform,
		"OS version": c.OSVersion, "architecture": c.OSArch, "machine": c.Machine, "user agent": c.UserAgent,
	} {
		if !plain(value) || len(value) > 256 {
			return bad("%s %q is not plain text of at most 256 characters", name, Printable(value))
		}
	}
	return nil
}

func (c *Client) agent() string {
	if c.UserAgent != "" {
		return c.UserAgent
	}
	return "flipside-1.0.0"
}

// redact shows an address without its credentials.
func redact(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return Printable(raw)
	}
	return Printable(u.Redacted())
}

// braced puts a boot id into the braces that update_engine sends.
func braced(id string) string {
	if id == "" || strings.HasPrefix(id, "{") {
		return id
	}
	return "{" + id + "}"
}
