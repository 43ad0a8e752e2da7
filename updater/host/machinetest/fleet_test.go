package machinetest

import (
	"fmt"
	"sync"
	"testing"
)

// with runs f for each machine at once.
func with(machines []*Machine, f func(m *Machine)) {
	var wg sync.WaitGroup
	for _, m := range machines {
		wg.Go(func() { f(m) })
	}
	wg.Wait()
}

// TestTwoMachines: both are told of a release at the same moment, and take it one after the other, under a semaphore of 1 in a real etcd.
func TestTwoMachines(t *testing.T) {
	l := newLab(t)
	l.withCluster()
	l.publish("2.0.0", "")
	machines := []*Machine{l.machine("m1", "[reboot]\ngate_retry = \"1s\"\n"), l.machine("m2", "[reboot]\ngate_retry = \"1s\"\n")}
	with(machines, func(m *Machine) { m.Run("systemctl enable --now flipsided") })
	for _, m := range machines {
		confirmed(m, "2.0.0")
		if b := m.Boots(); len(b) != 2 || b[1].Label != "USR-B" {
			t.Errorf("%s booted %+v", m.Name, b)
		}
	}
	t.Logf("\n%s", machines[0].Must("flipside fleet history --group default"))
}

// TestFiveMachines: one takes a release well, the next finds it bad and falls back, and the other three never boot it: the rollout is halted. When
// somebody publishes a better one, all five take that, one after another.
func TestFiveMachines(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	l := newLab(t)
	l.withCluster()
	l.publish("2.0.0", "")
	var machines []*Machine
	for i := range 5 {
		machines = append(machines, l.machine(fmt.Sprintf("m%d", i+1), "[reboot]\ngate_retry = \"1s\"\n"))
	}
	start := func(m *Machine) {
		if _, err := m.Run("systemctl enable --now flipsided"); err != nil {
			t.Error(err)
		}
	}
	first, sick, rest := machines[0], machines[1], machines[2:]
	start(first)
	confirmed(first, "2.0.0")

	sick.Must("printf '#!/bin/sh\\n[ \"$FLIPSIDE_VERSION\" != 2.0.0 ] || { echo the database does not start; exit 1; }\\n' >/etc/flipside/health.d/database && chmod +x /etc/flipside/health.d/database")
	start(sick)
	sick.Until("its second boot", func() bool { return len(sick.Boots()) == 2 })
	with(rest, start)
	sick.Until("it falls back", func() bool { return len(sick.Boots()) == 3 })
	if b := sick.Boots()[2]; b.Label != "USR-A" || b.Version != "1.0.0" {
		t.Fatalf("%s booted %+v", sick.Name, b)
	}
	says(sick, "the database does not start")
	for _, m := range rest {
		says(m, "halted")
	}
	st, err := l.cluster.State(t.Context(), "default")
	if err != nil || st.Halts["2.0.0"].Since.IsZero() {
		t.Errorf("the cluster's state is %+v, %v", st, err)
	}
	t.Logf("\n%s", rest[0].Must("flipside status; flipside fleet status || true"))
	for _, m := range rest {
		stays(m, "the release is halted")
		if n := len(m.Boots()); n != 1 {
			t.Errorf("%s booted %d times", m.Name, n)
		}
	}

	l.publish("2.0.1", "")
	for _, m := range machines {
		confirmed(m, "2.0.1")
	}
	t.Logf("\n%s", first.Must("flipside fleet history --group default"))
}
