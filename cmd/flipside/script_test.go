package main

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"flipside": main,
	})
}

// TestScripts runs the real command as a user would. Each script under testdata/script is a story with its output.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"image": makeImage, "flip": flipByte, "cut": cutFile, "exits": exits, "host": hostCommand,
		},
		Setup: func(e *testscript.Env) error {
			e.Values[hostKey{}] = &scriptHost{dir: e.WorkDir, watches: map[string]*exec.Cmd{}}
			e.Setenv("TZ", "UTC")
			return nil
		},
	})
}

// image FILE MIB makes a file that is partly text, partly noise and partly zeros, always the same.
func makeImage(ts *testscript.TestScript, _ bool, args []string) {
	var mib int
	if _, err := fmt.Sscan(args[1], &mib); err != nil {
		ts.Fatalf("image: %v", err)
	}
	b := make([]byte, mib<<20)
	x := uint64(len(b))
	for i := range b {
		switch i >> 16 & 3 {
		case 0:
			b[i] = "a line of text that comes again and again\n"[i%42]
		case 1, 2:
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			b[i] = byte(x)
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o644))
}

// flip FILE OFFSET changes one bit. A negative offset counts from the end.
func flipByte(ts *testscript.TestScript, _ bool, args []string) {
	var off int
	if _, err := fmt.Sscan(args[1], &off); err != nil {
		ts.Fatalf("flip: %v", err)
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	if off < 0 {
		off += len(b)
	}
	b[off] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o644))
}

// cut FILE N takes the last N bytes away.
func cutFile(ts *testscript.TestScript, _ bool, args []string) {
	var n int64
	if _, err := fmt.Sscan(args[1], &n); err != nil {
		ts.Fatalf("cut: %v", err)
	}
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Check(os.Truncate(ts.MkAbs(args[0]), info.Size()-n))
}

// exits CODE COMMAND... runs a command and wants this exit status.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if err != nil {
		var e interface{ ExitCode() int }
		if !asExit(err, &e) {
			ts.Fatalf("exits: %v", err)
		}
		code = e.ExitCode()
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit status %d, want %s", code, args[0])
	}
}

func asExit(err error, to *interface{ ExitCode() int }) bool {
	e, ok := err.(interface{ ExitCode() int })
	*to = e
	return ok
}
