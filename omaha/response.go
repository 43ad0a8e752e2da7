package omaha

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"strconv"
	"time"

	"github.com/blang/semver/v4"
	wire "github.com/flatcar/go-omaha/omaha"

	"github.com/flipside-linux/flipside/omaha/internal/strict"
)

// responseLimits bound an answer before it is decoded. What may occur once occurs once: Go's decoder would merge two.
func responseLimits() strict.Limits {
	return strict.Limits{
		Bytes: maxAnswer, Depth: 16, Elements: 4096, Attributes: 32, Value: 2 << 10, Text: 64 << 10,
		Children: map[string]int{
			"response/app": 16, "response/daystart": 1, "app/ping": 1, "app/updatecheck": 1, "app/event": 64,
			"updatecheck/urls": 1, "updatecheck/manifest": 16, "urls/url": 16,
			"manifest/packages": 1, "manifest/actions": 1, "packages/package": 64, "actions/action": 16,
		},
	}
}

// extension holds what our app's updatecheck may carry besides what go-omaha knows.
type extension struct {
	PollInterval string `xml:"PollInterval,attr"`
	Hold         string `xml:"hold,attr"` // our own server's words for a noupdate that is a "not yet"
}

// app decodes an answer and finds the one part that is about our application.
func (c *Client) app(data []byte) (*wire.AppResponse, extension, error) {
	var ext extension
	if err := strict.Check(data, "response", responseLimits()); err != nil {
		return nil, ext, &codeError{CodeXMLParse, fmt.Errorf("%w: %w", ErrResponse, err)}
	}
	resp, err := wire.ParseResponse("", bytes.NewReader(data))
	if err != nil {
		return nil, ext, &codeError{CodeXMLParse, fmt.Errorf("%w: %s", ErrResponse, Printable(err.Error()))}
	}
	var more struct {
		Apps []struct {
			UpdateCheck extension `xml:"updatecheck"`
		} `xml:"app"`
	}
	if err := xml.Unmarshal(data, &more); err != nil {
		return nil, ext, &codeError{CodeXMLParse, fmt.Errorf("%w: %s", ErrResponse, Printable(err.Error()))}
	}
	var ours *wire.AppResponse
	for i, app := range resp.Apps {
		if app.ID != c.AppID {
			continue
		}
		if ours != nil {
			return nil, ext, invalid("two answers for application %q", c.AppID)
		}
		ours, ext = app, more.Apps[i].UpdateCheck
	}
	if ours == nil {
		return nil, ext, invalid("no answer for application %q", c.AppID)
	}
	return ours, ext, nil
}

// decide turns an answer into an offer or a reason. The order matters: the app's status first, because a server that
// throttles says so there and error-internal in the update check; then the check's status; then the offer, whole.
func (c *Client) decide(data []byte, req CheckRequest) (Answer, error) {
	app, ext, err := c.app(data)
	if err != nil {
		return Answer{}, err
	}
	var answer Answer
	if ext.PollInterval != "" {
		seconds, err := strconv.ParseInt(ext.PollInterval, 10, 64)
		if err != nil {
			return Answer{}, invalid("PollInterval %q is not a number of seconds", Printable(ext.PollInterval))
		}
		answer.PollInterval = clampSeconds(seconds)
	}
	if status := string(app.Status); status != "ok" {
		reason, known := refusal(status)
		if !known {
			return Answer{}, invalid("unknown application status %q", Printable(status))
		}
		answer.Reason = reason
		return answer, nil
	}
	if app.UpdateCheck == nil {
		return Answer{}, invalid("no answer to the update check")
	}
	if status := string(app.UpdateCheck.Status); status != "ok" {
		reason, known := denial(status)
		if !known {
			return Answer{}, invalid("unknown update check status %q", Printable(status))
		}
		if reason.Kind == UpToDate && ext.Hold != "" {
			reason = Reason{Kind: Deferred, Text: "the server says: " + Printable(ext.Hold)}
		}
		answer.Reason = reason
		return answer, nil
	}
	return c.choose(answer, app.UpdateCheck, req)
}

// choose takes the first manifest above the running version, which is the next step on the way when the server names
// several, and never a later one.
func (c *Client) choose(answer Answer, check *wire.UpdateResponse, req CheckRequest) (Answer, error) {
	if len(check.Manifests) == 0 {
		return Answer{}, invalid("an offer without a manifest")
	}
	running, err := parseVersion(c.Version)
	if err != nil {
		return Answer{}, fmt.Errorf("%w: running %w", ErrConfig, err)
	}
	var chosen *wire.Manifest
	var last semver.Version
	for _, m := range check.Manifests {
		version, err := parseVersion(m.Version)
		if err != nil {
			return Answer{}, invalid("manifest %w", err)
		}
		if version.GT(running) && chosen == nil {
			chosen = m
		}
		last = version
	}
	downgrade := false
	if chosen == nil {
		switch cmp := last.Compare(running); {
		case cmp == 0:
			answer.Reason = Reason{Kind: UpToDate, Text: fmt.Sprintf("the server offers %s, which is running", last)}
			return answer, nil
		case !req.AllowDowngrade:
			answer.Reason = Reason{Kind: Downgrade, Text: fmt.Sprintf("the server offers %s, which is older than the running %s", last, running)}
			return answer, nil
		}
		chosen, downgrade = check.Manifests[len(check.Manifests)-1], true
	}
	if !matchesPrefix(chosen.Version, req.VersionPrefix) {
		answer.Reason = Reason{Kind: UpToDate, Text: fmt.Sprintf("the server offers %s, and this host stays on %s", chosen.Version, Printable(req.VersionPrefix))}
		return answer, nil
	}
	offer, err := c.offer(check.URLs, chosen)
	if err != nil {
		return Answer{}, err
	}
	offer.Downgrade = downgrade
	answer.Offer, answer.Reason = offer, Reason{Kind: Offered, Text: "the server offers " + offer.Version}
	return answer, nil
}

// clampSeconds turns a server's wish into a waiting time within [MinPoll, MaxPoll].
func clampSeconds(s int64) time.Duration {
	switch {
	case s < int64(MinPoll/time.Second):
		return MinPoll
	case s > int64(MaxPoll/time.Second):
		return MaxPoll
	}
	return time.Duration(s) * time.Second
}
