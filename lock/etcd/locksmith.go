package etcd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// NewLocksmith is locksmith as hosts have it: its semaphore is behind etcd's v2 API, which etcd 3.4 and 3.5 still have (--enable-v2) and
// later ones have not. cfg is of that etcd, which need not be the one that the semaphore moves to.
func NewLocksmith(cfg Config) (Predecessor, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, fmt.Errorf("opening etcd: %w configuration: no endpoints", lock.ErrInvalid)
	}
	conf, err := cfg.tls()
	if err != nil {
		return nil, fmt.Errorf("opening etcd: %w", err)
	}
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.TLSClientConfig, tr.Proxy = conf, nil
	return v2{form: locksmith, cfg: cfg, http: &http.Client{Transport: tr, Timeout: cmp.Or(cfg.RequestTimeout, 10*time.Second)}}, nil
}

type v2 struct {
	form
	cfg  Config
	http *http.Client
}

func (p v2) Name() string { return p.name + " (etcd v2)" }

// The codes of the v2 API: no such key, and a comparison that failed.
const (
	v2NotFound = 100
	v2Compare  = 101
)

type v2Answer struct {
	Code    int    `json:"errorCode"`
	Message string `json:"message"`
	Cause   string `json:"cause"`
	Node    struct {
		Value    string `json:"value"`
		Modified int64  `json:"modifiedIndex"`
	} `json:"node"`
}

// call asks one endpoint after the other until one answers.
func (p v2) call(ctx context.Context, method, group string, query, form url.Values) (a v2Answer, err error) {
	var errs []error
	for _, e := range p.cfg.Endpoints {
		if a, err = p.ask(ctx, method, strings.TrimRight(e, "/")+"/v2/keys/"+p.key(group)+"?"+query.Encode(), form); err == nil {
			return a, nil
		}
		errs = append(errs, err)
	}
	return a, fmt.Errorf("%w: etcd's v2 API: %w", lock.ErrUnavailable, errors.Join(errs...))
}

func (p v2) ask(ctx context.Context, method, url string, form url.Values) (a v2Answer, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(form.Encode()))
	if err != nil {
		return a, err
	}
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if p.cfg.User != "" {
		req.SetBasicAuth(p.cfg.User, p.cfg.Password)
	}
	resp, err := p.http.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(body, &a); err != nil {
		return a, fmt.Errorf("it answers %s, %.60q: is it enabled (--enable-v2)?", resp.Status, body)
	}
	if a.Code != 0 && a.Code != v2NotFound && a.Code != v2Compare {
		return a, fmt.Errorf("it answers %s: %q (%q), code %d", resp.Status, a.Message, a.Cause, a.Code)
	}
	return a, nil
}

func (p v2) Read(ctx context.Context, group string) (*Old, error) {
	a, err := p.call(ctx, http.MethodGet, group, url.Values{"quorum": {"true"}}, nil)
	if err != nil || a.Code == v2NotFound {
		return nil, err
	}
	return p.decode(group, []byte(a.Node.Value), a.Node.Modified)
}

func (p v2) SetMax(ctx context.Context, group string, old *Old, max int) error {
	data, err := p.encode(old, max)
	if err != nil {
		return err
	}
	a, err := p.call(ctx, http.MethodPut, group, url.Values{"prevIndex": {strconv.FormatInt(old.rev, 10)}}, url.Values{"value": {string(data)}})
	if err == nil && a.Code != 0 {
		err = lock.ErrConflict
	}
	return err
}
