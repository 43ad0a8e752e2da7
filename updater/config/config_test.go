package config

import (
	"strings"
	"testing"
	"time"
)

const minimal = "[update]\nserver = \"https://updates.example/v1/update/\"\n"

func TestParseFillsInDefaults(t *testing.T) {
	c, err := Parse("flipside.toml", []byte(minimal+"interval = \"1h30m\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got := time.Duration(c.Update.Interval); got != 90*time.Minute {
		t.Errorf("interval = %v, want 1h30m", got)
	}
	if c.Update.Channel != "stable" || c.Slots.Tries != 1 || c.Lock.Group != "default" {
		t.Errorf("defaults are missing: %+v", c)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"nothing", "", "update.server is not set"},
		{"unknown key", minimal + "chanel = \"beta\"\n", `flipside.toml:3: unknown key "update.chanel"`},
		{"unknown section", minimal + "\n[locks]\ngroup = \"x\"\n", `flipside.toml:4: unknown key "locks"`},
		{"syntax", minimal + "channel = \n", "flipside.toml:3"},
		{"negative duration", minimal + "interval = \"-1m\"\n", "negative"},
		{"zero interval", minimal + "interval = \"0s\"\n", "update.interval"},
		{"scheme", "[update]\nserver = \"ftp://x\"\n", "not an http or https URL"},
		{"tries", minimal + "[slots]\ntries = 4\n", "want 1 to 3"},
		{"strategy", minimal + "[reboot]\nstrategy = \"etcd\"\n", "reboot.strategy"},
		{"half a window", minimal + "[reboot]\nwindow_start = \"04:00\"\n", "belong together"},
		{"key without certificate", minimal + "[lock]\nkey = \"k\"\n", "lock.cert and lock.key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("flipside.toml", []byte(tt.in))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want one with %q", err, tt.want)
			}
		})
	}
}
