package omaha

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/go-retryablehttp"

	"github.com/flipside-linux/flipside/omaha/internal/strict"
)

// ErrNoChannels says that a server does not tell which channels it has. Omaha has no way to ask: this project's own
// release server answers beside the protocol, Nebraska and Flatcar's public server do not.
var ErrNoChannels = errors.New("this server does not list its channels")

// ErrUnknownChannel says that a server lists its channels, and that this is none of them.
var ErrUnknownChannel = errors.New("the server has no such channel")

// ChannelInfo is one channel as a server describes it. All text in it is printable.
type ChannelInfo struct {
	Name    string    `json:"name"`
	Version string    `json:"version,omitempty"` // empty: it holds no release
	Size    int64     `json:"size,omitempty"`    // of the payload, bytes
	Moved   time.Time `json:"moved,omitzero"`
	Floors  []string  `json:"floors,omitempty"` // versions that no host skips
	Rollout string    `json:"rollout"`          // to whom and how fast, in words
	Halted  string    `json:"halted,omitempty"` // why no host gets it now
	Hosts   int       `json:"hosts"`            // that ask for it
}

// ChannelPlan is what a host would get if it asked for a channel. Asking for a plan changes nothing on the server.
type ChannelPlan struct {
	Channel   string   `json:"channel"`
	Running   string   `json:"running"`
	Steps     []string `json:"steps"`               // versions that would be taken, in order; none: up to date
	Size      int64    `json:"size,omitempty"`      // of the first step's payload, bytes
	Downgrade bool     `json:"downgrade,omitempty"` // the first step is older than the running version
	Hold      string   `json:"hold,omitempty"`      // why the first step would have to wait
}

const (
	maxChannels = 512
	maxListing  = 1 << 20
)

// Channels asks the server which channels it has. The error wraps [ErrNoChannels] when the server cannot tell.
func (c *Client) Channels(ctx context.Context) ([]ChannelInfo, error) {
	const op = "list of channels"
	var doc struct {
		Schema   string        `json:"schema"`
		Channels []ChannelInfo `json:"channels"`
	}
	if err := c.getJSON(ctx, op, "channels", nil, &doc); err != nil {
		return nil, err
	}
	if doc.Schema != "flipside.channels/v1" || len(doc.Channels) > maxChannels {
		return nil, c.fail(op, invalid("%d channels of schema %q", len(doc.Channels), Printable(doc.Schema)))
	}
	for i := range doc.Channels {
		ch := &doc.Channels[i]
		if ch.Version != "" {
			if _, err := parseVersion(ch.Version); err != nil {
				return nil, c.fail(op, invalid("channel %q holds %w", Printable(ch.Name), err))
			}
		}
		ch.Name, ch.Rollout, ch.Halted = Printable(ch.Name), Printable(ch.Rollout), Printable(ch.Halted)
		for k, f := range ch.Floors {
			ch.Floors[k] = Printable(f)
		}
	}
	return doc.Channels, nil
}

// Plan asks what this host would get on track, which may be another one than the client's. The server notes nothing
// and grants nothing. The error wraps [ErrNoChannels] when the server cannot tell, and [ErrUnknownChannel] when it has no
// such channel.
func (c *Client) Plan(ctx context.Context, track string, req CheckRequest) (ChannelPlan, error) {
	const op = "plan of a channel"
	query := url.Values{"version": {c.Version}, "machine": {c.MachineID}}
	if c.Board != "" {
		query.Set("board", c.Board)
	}
	if req.VersionPrefix != "" {
		query.Set("prefix", req.VersionPrefix)
	}
	if req.Deltas {
		query.Set("deltas", "true")
	}
	var doc struct {
		Schema string `json:"schema"`
		ChannelPlan
	}
	if err := c.getJSON(ctx, op, "channels/"+url.PathEscape(track)+"/plan", query, &doc); err != nil {
		return ChannelPlan{}, err
	}
	p := doc.ChannelPlan
	if doc.Schema != "flipside.channel-plan/v1" || len(p.Steps) > maxChannels || p.Size < 0 {
		return ChannelPlan{}, c.fail(op, invalid("a plan of schema %q with %d steps", Printable(doc.Schema), len(p.Steps)))
	}
	for i, v := range p.Steps {
		if _, err := parseVersion(v); err != nil {
			return ChannelPlan{}, c.fail(op, invalid("step %d: %w", i+1, err))
		}
	}
	if len(p.Steps) > 0 { // what is a downgrade is not for the server to say
		order, err := CompareVersions(p.Steps[0], c.Version)
		if err != nil {
			return ChannelPlan{}, c.fail(op, fmt.Errorf("%w: %w", ErrConfig, err))
		}
		p.Downgrade = order < 0
		if p.Downgrade && !req.AllowDowngrade && p.Hold == "" {
			p.Hold = "this host takes no older version than the running one"
		}
	}
	p.Channel, p.Running, p.Hold = Printable(p.Channel), c.Version, Printable(p.Hold)
	return p, nil
}

// getJSON reads one small document from beside the update address: .../v1/update/ becomes .../v1/WHAT.
func (c *Client) getJSON(ctx context.Context, op, what string, query url.Values, into any) error {
	if err := c.validate(); err != nil {
		return c.fail(op, err)
	}
	u, err := url.Parse(c.URL)
	if err != nil {
		return c.fail(op, fmt.Errorf("%w: %w", ErrConfig, err))
	}
	base, ok := strings.CutSuffix(strings.TrimSuffix(u.Path, "/"), "/update")
	if !ok {
		return c.fail(op, fmt.Errorf("%w: its address does not end with /update", ErrNoChannels))
	}
	at := &url.URL{Scheme: u.Scheme, Host: u.Host, User: u.User, RawQuery: query.Encode()}
	at.Path, at.RawPath = base+"/"+what, ""
	if unescaped, err := url.PathUnescape(what); err == nil && unescaped != what {
		at.Path, at.RawPath = base+"/"+unescaped, base+"/"+what
	}
	ctx, cancel := context.WithTimeout(ctx, orDuration(c.Timeout, defaultTimeout))
	defer cancel()
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return c.fail(op, fmt.Errorf("%w: %w", ErrConfig, err))
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", c.agent())
	resp, err := c.HTTP.client.Do(req)
	if err != nil {
		return c.fail(op, transportError(err))
	}
	defer resp.Body.Close()
	switch kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";"); {
	case resp.StatusCode == http.StatusNotFound && kind == "application/json":
		var e struct {
			Error string `json:"error"`
		}
		data, _ := strict.Read(resp.Body, maxListing)
		_ = json.Unmarshal(data, &e) // what cannot be read says nothing
		return c.fail(op, fmt.Errorf("%w: %s", ErrUnknownChannel, Printable(e.Error)))
	case resp.StatusCode == http.StatusOK && kind != "application/json", resp.StatusCode == http.StatusNotFound,
		resp.StatusCode == http.StatusMethodNotAllowed, resp.StatusCode == http.StatusNotImplemented:
		return c.fail(op, fmt.Errorf("%w: it answers %s%s", ErrNoChannels, Printable(resp.Status), firstBytes(resp)))
	case resp.StatusCode != http.StatusOK:
		return &Error{Op: op, URL: redact(c.URL), Code: codeHTTPStatus + resp.StatusCode, RetryAfter: retryAfter(resp.Header, c.HTTP.now()),
			Err: fmt.Errorf("the server answers %s%s", Printable(resp.Status), firstBytes(resp))}
	}
	data, err := strict.Read(resp.Body, maxListing)
	if errors.Is(err, strict.ErrXML) {
		return c.fail(op, invalid("it is larger than %d bytes", maxListing))
	}
	if err != nil {
		return c.fail(op, fmt.Errorf("read the answer: %w", err))
	}
	if err := json.Unmarshal(data, into); err != nil {
		return c.fail(op, invalid("it is not the JSON that was expected: %s", Printable(err.Error())))
	}
	return nil
}
