package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// lean gives back the pages of the program's own file that this process has looked at so far. What its start took is not needed again; what is comes
// back by itself, from the page cache. Only what is executed is looked
// at: other pages of the file may have been changed when the program was loaded, even if they cannot be written any more.
func lean() {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		// 00400000-00c60000 r-xp 00000000 fe:00 1234 /usr/sbin/flipsided
		f := strings.Fields(lines.Text())
		var from, to uintptr
		if len(f) < 6 || f[1] != "r-xp" || strings.Join(f[5:], " ") != program {
			continue
		}
		if n, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); n == 2 && err == nil && from < to {
			unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED) // advice
		}
	}
}
