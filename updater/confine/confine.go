// Package confine takes rights away from the process that it runs in, and from all that it starts, for good. It is what keeps the daemon's agent, which talks to the
// network, from the disk, whatever user it is; a process that keeps the rights is there to start writers.
//
// Three things of the kernel are used, each for what it can do. What one of them lacks on a host is said and not fatal.
//
//   - Capabilities: what root may do to devices, mounts, modules and other processes is dropped from all threads, and from the bounding set.
//   - Landlock: everything may be read and executed; written to are the directories and devices of the [Policy], and nothing else. It also takes
//     mounting away, and looking into processes that are not confined in the same way.
//   - seccomp: system calls that the agent has no use for are refused, so that a fault of the kernel in one of them is out of reach.
package confine

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Policy says what may be written to. What is not there is left out.
type Policy struct {
	Dirs    []string // and everything below them
	Devices []string // patterns of path.Match, looked at once
}

// Lack is something that could not be had, with the reason.
type Lack struct {
	What string // "Landlock"
	Err  error
}

func (l Lack) String() string { return fmt.Sprintf("%s: %v", l.What, l.Err) }

// Self confines this process, and all that it starts from now on.
func (p Policy) Self() []Lack {
	var lacks []Lack
	for _, step := range []struct {
		what string
		do   func() error
	}{{"no new privileges", noNewPrivileges}, {"capabilities", dropCapabilities}, {"Landlock", p.landlock}, {"seccomp", refuseCalls}} {
		if err := step.do(); err != nil {
			lacks = append(lacks, Lack{step.what, err})
		}
	}
	return lacks
}

func noNewPrivileges() error {
	return inAllThreads(psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0))
}

func inAllThreads(_, _ uintptr, e syscall.Errno) error {
	if e != 0 {
		return e
	}
	return nil
}

// kept are what is left of root: to read and own files. The shipped unit leaves fewer; without it the agent has no more than these.
func kept() []int {
	return []int{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER}
}

func dropCapabilities() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("reading them: %w", err)
	}
	setpcap := data[0].Effective&(1<<unix.CAP_SETPCAP) != 0
	for c := range 64 {
		if slices.Contains(kept(), c) {
			continue
		}
		if setpcap { // else nothing can be added to the set either
			if err := inAllThreads(psx.Syscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0, 0)); err != nil && err != unix.EINVAL { // the kernel does not know it
				return fmt.Errorf("dropping number %d: %w", c, err)
			}
		}
		d := &data[c/32]
		bit := uint32(1) << (c % 32)
		d.Effective, d.Permitted, d.Inheritable = d.Effective&^bit, d.Permitted&^bit, d.Inheritable&^bit
	}
	return inAllThreads(psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&data[0])), 0))
}

func (p Policy) landlock() error {
	abi, _, e := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 {
		return fmt.Errorf("this kernel does not have it: %w", e)
	}
	var devices []string
	for _, pattern := range p.Devices {
		list, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("%s: %w", pattern, err)
		}
		devices = append(devices, list...)
	}
	dirs := slices.DeleteFunc(slices.Clone(p.Dirs), func(d string) bool { return d == "" })
	err := landlock.V7.BestEffort().RestrictPaths(
		landlock.RODirs("/"),
		landlock.RODirs("/dev").WithIoctlDev().IgnoreIfMissing(), // the size of a disk's sectors; what changes something takes a device that is open for writing, or a capability
		landlock.RWDirs(dirs...).IgnoreIfMissing(),
		landlock.RWFiles(devices...).WithIoctlDev().IgnoreIfMissing(),
	)
	if err == nil && abi < 3 {
		return errors.New("this kernel (before 6.2) does not keep files from being cut short")
	}
	return err
}

// refused are the system calls that an agent has no use for.
func refused() []string {
	return []string{
		"mount", "umount", "umount2", "pivot_root", "chroot", "fsopen", "fsconfig", "fsmount", "fspick", "move_mount", "open_tree", "mount_setattr", "quotactl", "quotactl_fd",
		"swapon", "swapoff", "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd",
		"bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "lookup_dcookie",
		"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "syslog", "acct",
		"setns", "open_by_handle_at", "add_key", "request_key", "keyctl", "iopl", "ioperm", "modify_ldt",
		"settimeofday", "stime", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname", "vhangup", "fanotify_init", "nfsservctl",
	}
}

func refuseCalls() error {
	info, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	names := slices.DeleteFunc(refused(), func(name string) bool { _, has := info.SyscallNames[name]; return !has }) // not every machine has each
	return seccomp.LoadFilter(seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls:      []seccomp.SyscallGroup{{Names: names, Action: seccomp.ActionErrno}},
		},
	})
}
