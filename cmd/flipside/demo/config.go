package demo

import "fmt"

// hostConfig is the flipside.toml of a demo host. It is an ordinary configuration with short times; @RUNNING@ is filled in at each boot.
func hostConfig(m *machine, server, etcd, key string) string {
	return fmt.Sprintf(`# The configuration of %[1]s.
[update]
server      = %[2]q
app         = "io.flipside.demo"
channel     = "stable"
keys        = [%[4]q]
first_check = "100ms"
interval    = "2s"
retry       = "500ms"
rate_limit  = "16MiB" # so that there is something to see

[slots]
disk    = %[5]q
running = "@RUNNING@"

[reboot]
method     = "exit"
gate_retry = "1s"

[lock]
endpoints = [%[3]q]
group     = "demo"

[health]
units = []
watchdog = ""
dir     = %[6]q
timeout = "10s"
soak    = "500ms"

[host]
os_release = %[7]q
machine_id = %[8]q
boot_id    = %[9]q
alias      = %[1]q

[paths]
state = %[10]q
run   = %[11]q
`, m.name, server, etcd, key, m.disk, m.path("usr", "health.d"), m.path("usr", "os-release"), m.path("machine-id"), m.path("boot_id"), m.path("state"), m.path("run"))
}
