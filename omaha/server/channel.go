package server

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/blang/semver/v4"
)

// Channel is what hosts on one track get, and how fast. It is one file, which an operator may also edit by hand.
// A file called stable@arm64-usr.toml is for the hosts on stable with that board, and goes before stable.toml.
type Channel struct {
	Version   string    `toml:"version" json:"version"`
	Moved     time.Time `toml:"moved,omitempty" json:"moved,omitzero"`
	Previous  []string  `toml:"previous,omitempty" json:"previous,omitempty"` // newest first: where a rollback goes
	Floors    []string  `toml:"floors,omitempty" json:"floors,omitempty"`     // versions that no host may skip
	Blacklist []string  `toml:"blacklist,omitempty" json:"blacklist,omitempty"`
	Downgrade bool      `toml:"downgrade,omitempty" json:"downgrade,omitempty"` // offer the version to newer hosts too

	Paused        bool   `toml:"paused,omitempty" json:"paused,omitempty"`
	Percent       *int   `toml:"percent,omitempty" json:"percent,omitempty"`              // of the hosts; 0 is nobody, absent is all
	MaxConcurrent int    `toml:"max_concurrent,omitzero" json:"max_concurrent,omitempty"` // updates at once; 0 is no limit
	MaxPerPeriod  int    `toml:"max_per_period,omitzero" json:"max_per_period,omitempty"` // updates begun in one period
	Period        string `toml:"period,omitempty" json:"period,omitempty"`                // default 1h
	GrantTimeout  string `toml:"grant_timeout,omitempty" json:"grant_timeout,omitempty"`  // after it an update counts as timed out, default 2h
	StopFailures  int    `toml:"stop_after_failures,omitzero" json:"stop_after_failures,omitempty"`
	StopTimeouts  int    `toml:"stop_after_timeouts,omitzero" json:"stop_after_timeouts,omitempty"`
	StopDiffers   int    `toml:"stop_after_differing_boots,omitzero" json:"stop_after_differing_boots,omitempty"` // boots that measured something else than the release
	// StopFailurePercent stops the rollout when that share of the hosts that are through with it failed, once there are
	// StopFailureMin of them, default 10.
	StopFailurePercent int    `toml:"stop_failure_percent,omitzero" json:"stop_failure_percent,omitempty"`
	StopFailureMin     int    `toml:"stop_failure_min,omitzero" json:"stop_failure_min,omitempty"`
	RetryFailed        string `toml:"retry_failed,omitempty" json:"retry_failed,omitempty"`   // before a host gets a version again that failed on it, doubling; default 1h
	After              string `toml:"after,omitempty" json:"after,omitempty"`                 // a channel whose hosts go first
	AfterHealthy       int    `toml:"after_healthy,omitzero" json:"after_healthy,omitempty"`  // how many of them have to be healthy on the version, default 1
	Hours              string `toml:"hours,omitempty" json:"hours,omitempty"`                 // "Mon-Fri 09:00-17:00": updates begin only then
	TimeZone           string `toml:"time_zone,omitempty" json:"time_zone,omitempty"`         // of hours, such as Europe/Berlin; default UTC
	PollInterval       string `toml:"poll_interval,omitempty" json:"poll_interval,omitempty"` // what hosts are asked to wait between checks

	Mirrored string `toml:"mirrored,omitempty" json:"mirrored,omitempty"` // what the server that this channel is mirrored from held last

	// Resumed is when somebody moved the channel or resumed its rollout last. That lifts what the server had stopped before.
	Resumed time.Time `toml:"resumed,omitempty" json:"resumed,omitzero"`
	// Stopped is why the server stopped the rollout by itself. It keeps that itself; in a channel's file it is from a server that did not yet.
	Stopped string `toml:"stopped,omitempty" json:"stopped,omitempty"`
}

// duration reads one of the channel's times; check has seen that it can be read.
func duration(s string, fallback time.Duration) time.Duration {
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return d
	}
	return fallback
}

func (c Channel) period() time.Duration       { return duration(c.Period, time.Hour) }
func (c Channel) grantTimeout() time.Duration { return duration(c.GrantTimeout, 2*time.Hour) }

func (c Channel) retryFailed() time.Duration { return duration(c.RetryFailed, time.Hour) }

func (c Channel) check() error {
	for _, v := range append(append([]string{c.Version}, c.Floors...), c.Previous...) {
		if v != "" {
			if err := checkVersion(v); err != nil {
				return err
			}
		}
	}
	for key, n := range map[string]int{"percent": c.Share(), "max_concurrent": c.MaxConcurrent, "max_per_period": c.MaxPerPeriod,
		"stop_after_failures": c.StopFailures, "stop_after_timeouts": c.StopTimeouts, "stop_after_differing_boots": c.StopDiffers,
		"stop_failure_percent": c.StopFailurePercent, "stop_failure_min": c.StopFailureMin} {
		if n < 0 || (strings.HasSuffix(key, "percent") && n > 100) {
			return fmt.Errorf("%s = %d is %w: it is out of range", key, n, ErrInvalid)
		}
	}
	if _, err := c.open(time.Time{}); err != nil {
		return err
	}
	if c.After != "" && !namePattern.MatchString(c.After) || c.AfterHealthy < 0 {
		return fmt.Errorf("after = %q, after_healthy = %d: not a channel and a number of hosts", c.After, c.AfterHealthy)
	}
	for key, s := range map[string]string{"period": c.Period, "grant_timeout": c.GrantTimeout, "retry_failed": c.RetryFailed, "poll_interval": c.PollInterval} {
		if s == "" {
			continue
		}
		if d, err := time.ParseDuration(s); err != nil || d <= 0 {
			return fmt.Errorf("%s = %q is not a time such as \"90m\"", key, s)
		}
	}
	return nil
}

// tooMany says whether the share of failures among the hosts that are through stops the rollout.
func (c Channel) tooMany(failed, done int) bool {
	least := c.StopFailureMin
	if least == 0 {
		least = 10
	}
	return c.StopFailurePercent > 0 && failed+done >= least && failed*100 >= c.StopFailurePercent*(failed+done)
}

// step says whether the channel gives a version to hosts: its own, or a floor on the way to it.
func (c Channel) step(version string) bool {
	return version != "" && (version == c.Version || slices.Contains(c.Floors, version))
}

// next returns the version that a host on running gets: the lowest floor above it, or the channel's own.
func (c Channel) next(running semver.Version) (semver.Version, error) {
	target, err := semver.Parse(c.Version)
	if err != nil {
		return target, fmt.Errorf("version %q: %w", c.Version, err)
	}
	best := target
	for _, f := range c.Floors {
		floor, err := semver.Parse(f)
		if err != nil {
			return target, fmt.Errorf("floor %q: %w", f, err)
		}
		if floor.GT(running) && floor.LT(best) {
			best = floor
		}
	}
	return best, nil
}

// Share is how many percent of the hosts get the version.
func (c Channel) Share() int {
	if c.Percent == nil {
		return 100
	}
	return *c.Percent
}

// in says whether a host is among the first percent of the hosts for a version. It depends on nothing but the two
// names: a host that is in stays in when the percentage grows, and each version draws its own order.
func (c Channel) in(machine, version string) bool {
	share := c.Share()
	if share >= 100 {
		return true
	}
	h := fnv.New64a()
	h.Write([]byte(version))
	h.Write([]byte{0})
	h.Write([]byte(machine))
	x := h.Sum64()
	x ^= x >> 33 // FNV mixes its last bytes poorly, and machine ids often differ only there
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	return x%100 < uint64(share)
}

// Words says in one line to whom the channel's version goes, and how fast.
func (c Channel) Words() string {
	words := []string{"all hosts"}
	switch share := c.Share(); {
	case share == 0:
		words[0] = "no host"
	case share < 100:
		words[0] = fmt.Sprintf("%d %% of the hosts", share)
	}
	if c.MaxConcurrent > 0 {
		words = append(words, fmt.Sprintf("%d at once", c.MaxConcurrent))
	}
	if c.MaxPerPeriod > 0 {
		words = append(words, fmt.Sprintf("%d per %s", c.MaxPerPeriod, shortDuration(c.period())))
	}
	if c.Hours != "" {
		words = append(words, strings.TrimSpace(c.Hours+" "+c.TimeZone))
	}
	if c.After != "" {
		words = append(words, fmt.Sprintf("after %d on %s are healthy", max(c.AfterHealthy, 1), c.After))
	}
	if c.StopFailures > 0 {
		words = append(words, fmt.Sprintf("stops after %d failures", c.StopFailures))
	}
	if c.StopTimeouts > 0 {
		words = append(words, fmt.Sprintf("stops after %d time-outs", c.StopTimeouts))
	}
	if c.StopDiffers > 0 {
		words = append(words, fmt.Sprintf("stops after %d boots that differ", c.StopDiffers))
	}
	if c.StopFailurePercent > 0 {
		words = append(words, fmt.Sprintf("stops when %d %% fail", c.StopFailurePercent))
	}
	return strings.Join(words, ", ")
}

// Halted says why no further host gets the channel's version, or "".
func (c Channel) Halted() string {
	switch {
	case c.Stopped != "":
		return "stopped: " + c.Stopped
	case c.Paused:
		return "paused"
	}
	return ""
}

// shortDuration writes 1h0m0s as 1h.
func shortDuration(d time.Duration) string {
	s := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, zero) {
			s = s[:len(s)-2]
		}
	}
	return s
}
