// Vm-status runs inside the virtual machines of flipside-vm: it writes every status of flipsided to its standard output, which is the machine's second
// serial port, and while nobody answers, what the service manager knows. "flipside status" once a second would be half of what such a machine can do.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"time"
)

func main() {
	silent := time.Now()
	for {
		if watch("/run/flipside/control.sock") {
			silent = time.Now()
		}
		if time.Since(silent) > 20*time.Second {
			silent = time.Now()
			for _, args := range [][]string{{"--no-pager", "-l", "status", "flipsided"}, {"--no-pager", "list-jobs"}} {
				out, err := exec.Command("systemctl", args...).CombinedOutput()
				fmt.Printf("%s(%v)\n", out, err)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// watch hands on what the daemon says, until it ends, and reports whether it said something.
func watch(socket string) bool {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	defer c.Close()
	if _, err := io.WriteString(c, `{"method":"watch"}`+"\n"); err != nil {
		return false
	}
	n, _ := io.Copy(os.Stdout, c)
	return n > 0
}
