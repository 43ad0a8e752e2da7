package config

import (
	"encoding/json"
	"fmt"
	"reflect"
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
		{"table in other letters", minimal + "\n[Reboot]\nStrategy = 'off'\n", `flipside.toml:4: unknown key "Reboot"; did you mean "reboot"?`},
		{"key in other letters", minimal + "Channel = 'x'\n", `flipside.toml:3: unknown key "update.Channel"; did you mean "update.channel"?`},
		{"key of a window in other letters", minimal + "[[reboot.windows]]\nStart = '04:00'\nlength = '1h'\n", `unknown key "reboot.windows.Start"`},
		{"syntax", minimal + "channel = \n", "flipside.toml:3"},
		{"negative duration", minimal + "interval = \"-1m\"\n", "negative"},
		{"zero interval", minimal + "interval = \"0s\"\n", "update.interval"},
		{"scheme", "[update]\nserver = \"ftp://x\"\n", "not an http or https URL"},
		{"tries", minimal + "[slots]\ntries = 4\n", "want 1 to 3"},
		{"strategy", minimal + "[reboot]\nstrategy = \"etcd\"\n", "reboot.strategy"},
		{"half a window", minimal + "[reboot]\nwindow_start = \"04:00\"\n", "belong together"},
		{"semaphore that may take an hour", minimal + "[lock]\ntimeout = \"1h\"\n", "flipside.toml:4: lock.timeout is 1h, want more than zero and at most 1m"},
		{"semaphore that may take no time", minimal + "[lock]\ntimeout = \"0s\"\n", "flipside.toml:4: lock.timeout is 0s"},
		{"an interval that was meant as minutes", minimal + "interval = \"45ns\"\n", "flipside.toml:3: update.interval is 45ns, want at least 1s"},
		{"type of the slots", minimal + "[slots]\ntype = \"nonsense\"\n", "flipside.toml:4: slots.type \"nonsense\""},
		{"metrics for everybody", minimal + "[metrics]\nlisten = \"0.0.0.0:9\"\n", "flipside.toml:4: metrics.listen \"0.0.0.0:9\""},
		{"metrics on no port", minimal + "[metrics]\nlisten = \"127.0.0.1:99999\"\n", "metrics.listen"},
		{"semaphore without a scheme", minimal + "[lock]\nfleetlock = \"garbage\"\n", "flipside.toml:4: lock.fleetlock \"garbage\""},
		{"etcd without a port", minimal + "[lock]\nendpoints = [\"http://a:1\", \"garbage\"]\n", "flipside.toml:4: lock.endpoints: \"garbage\""},
		{"empty endpoint", minimal + "[lock]\nendpoints = [\"\"]\n", "lock.endpoints: \"\""},
		{"name of a group", minimal + "[lock]\nfleetlock = \"http://a:1\"\ngroup = \"a/b\"\n", "flipside.toml:5: lock.group"},
		{"zone without windows", minimal + "[reboot]\ntime_zone = \"Nowhere\"\n", "flipside.toml:4: reboot.time_zone"},
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

// A configuration crosses from one process of the daemon to another as JSON: nothing of it may be lost.
func TestThroughJSON(t *testing.T) {
	var fill func(v reflect.Value, n *int64)
	fill = func(v reflect.Value, n *int64) {
		*n++
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				fill(v.Field(i), n)
			}
		case reflect.Slice:
			v.Set(reflect.MakeSlice(v.Type(), 2, 2))
			for i := range v.Len() {
				fill(v.Index(i), n)
			}
		case reflect.Map:
			k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(k, n)
			fill(e, n)
			v.Set(reflect.MakeMap(v.Type()))
			v.SetMapIndex(k, e)
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			fill(v.Elem(), n)
		case reflect.String:
			v.SetString(fmt.Sprintf("text %d", *n))
		case reflect.Bool:
			v.SetBool(true)
		case reflect.Int, reflect.Int64:
			v.SetInt(*n * 1_000_003)
		case reflect.Uint8:
			v.SetUint(uint64(*n % 200))
		case reflect.Float64:
			v.SetFloat(float64(*n) / 3)
		default:
			t.Fatalf("a field of kind %s", v.Kind())
		}
	}
	var c Config
	var n int64
	fill(reflect.ValueOf(&c).Elem(), &n)
	for _, c := range []Config{c, Default(), {}} {
		data, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var back Config
		if err := json.Unmarshal(data, &back); err != nil || !reflect.DeepEqual(c, back) {
			t.Errorf("%v\n%+v\n%+v", err, c, back)
		}
	}
}
