package reboot

import (
	"testing"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
)

// TestTimedated asks what stands for systemd-timedated on a real bus.
func TestTimedated(t *testing.T) {
	stop := startBus(t)
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := timedated(); err == nil {
		t.Error("an answer, and nobody is there")
	}
	props, err := prop.Export(conn, "/org/freedesktop/timedate1", prop.Map{"org.freedesktop.timedate1": {"NTPSynchronized": {Value: false}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.timedate1", dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{false, true} {
		props.SetMust("org.freedesktop.timedate1", "NTPSynchronized", want)
		if is, err := timedated(); err != nil || is != want {
			t.Errorf("timedated says %v, %v; want %v", is, err, want)
		}
	}
	stop()
	if _, err := timedated(); err == nil {
		t.Error("an answer without a bus")
	}
}
