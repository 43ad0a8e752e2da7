package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/omaha/server"
)

// Exit codes of flipside. They are part of its interface: scripts may rely on them.
const (
	exitOK        = 0
	exitFailed    = 1
	exitUsage     = 2
	exitNothing   = 3   // nothing to do
	exitReboot    = 4   // an update is in place and waits for a reboot
	exitBlocked   = 5   // a policy says no: lock, window, inhibitor, halt
	exitVerify    = 6   // a signature, hash or table did not verify
	exitPermitted = 7   // not permitted
	exitBusy      = 8   // somebody else is at it
	exitInterrupt = 130 // interrupted
)

// app carries what every subcommand needs from the outside world, so that a test can run one without a process.
type app struct {
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer
	json   bool
	config string // path of the daemon's configuration
	socket string // path of the daemon's control socket; empty: from the configuration
	bus    string // address of the message bus of a test; empty: the system's
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// run executes one command line and returns its exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.command()
	root.SetArgs(args)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code := exitCode(ctx, err)
	a.printError(err, code)
	return code
}

// printError writes the problem line and the hint lines, or one JSON object with --json.
func (a *app) printError(err error, code int) {
	var q quietError
	if errors.As(err, &q) {
		return
	}
	if code == exitInterrupt && errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	hints := hintsOf(err)
	if a.json {
		json.NewEncoder(a.stderr).Encode(struct {
			Schema string   `json:"schema"`
			Error  string   `json:"error"`
			Hints  []string `json:"hints,omitempty"`
			Code   int      `json:"code"`
		}{"flipside.error/v1", err.Error(), hints, code})
		return
	}
	fmt.Fprintf(a.stderr, "flipside: %v\n", err)
	for _, h := range hints {
		fmt.Fprintf(a.stderr, "  hint: %s\n", h)
	}
}

// printJSON writes v as the one JSON document of a command. v names its schema in a first field "schema".
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// done says that something was done, in words or as JSON.
func (a *app) done(what string) error {
	if !a.json {
		fmt.Fprintln(a.stdout, what)
		return nil
	}
	return a.printJSON(struct {
		Schema string `json:"schema"`
		Done   string `json:"done"`
	}{"flipside.done/v1", what})
}

// exitError carries the exit code that a command chose.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// withExit gives err the exit code that the process ends with.
func withExit(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code, err}
}

// quietError ends with an exit code and says nothing more: the command has already printed its answer.
type quietError struct{ error }

func quiet(code int) error { return withExit(code, quietError{errors.New("done")}) }

// hintError carries one line that says what to do about an error.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// withHint adds a line that says what to do about err.
func withHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hintError{err, fmt.Sprintf(format, args...)}
}

func hintsOf(err error) []string {
	var hints []string
	for err != nil {
		if h, ok := err.(*hintError); ok {
			hints = append(hints, h.hint)
		}
		err = errors.Unwrap(err)
	}
	return hints
}

// exitCode is the one place where errors become exit codes.
func exitCode(ctx context.Context, err error) int {
	var e *exitError
	var usage *usageError
	switch {
	case errors.As(err, &e):
		return e.code
	case ctx.Err() != nil:
		return exitInterrupt
	case errors.As(err, &usage), errors.Is(err, server.ErrInvalid):
		return exitUsage
	case errors.Is(err, os.ErrPermission):
		return exitPermitted
	case errors.Is(err, server.ErrLocked):
		return exitBusy
	}
	return exitFailed
}

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// version is that of the module, as the build recorded it.
func version() string {
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "unknown"
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "flipside",
		Version:       version(),
		Short:         "atomic A/B updates of a host's /usr: ask, watch, build, serve",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	f := root.PersistentFlags()
	f.BoolVar(&a.json, "json", false, "print JSON with a schema version instead of text")
	f.StringVar(&a.config, "config", "", "read only this configuration `file` (default /etc/flipside/flipside.toml, its drop-ins, and update.conf)")
	f.StringVar(&a.socket, "socket", "", "the daemon's control socket (default from the configuration)")
	root.AddCommand(
		a.statusCommand(), a.whyCommand(), a.watchCommand(), a.planCommand(), a.checkCommand(), a.updateCommand(), a.rebootCommand(), a.cancelCommand(), a.rollbackCommand(),
		a.pauseCommand(), a.resumeCommand(), a.pinCommand(), a.unpinCommand(),
		a.channelCommand(), a.historyCommand(), a.configCommand(), a.migrateCommand(),
	)
	root.AddCommand(a.demoCommand(), a.payloadCommand(), a.slotsCommand(), a.serveCommand(), a.releaseCommand(), a.fleetCommand(), a.trustCommand(), a.manCommand())
	usageErrors(root)
	return root
}

// usageErrors makes every mistake on the command line a usageError: arguments that a command does not take, and commands that are not there.
func usageErrors(cmd *cobra.Command) {
	if args := cmd.Args; args != nil {
		cmd.Args = func(c *cobra.Command, a []string) error {
			err := args(c, a)
			var usage *usageError
			if err == nil || errors.As(err, &usage) {
				return err
			}
			return &usageError{err}
		}
	}
	if !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(c *cobra.Command, a []string) error {
			if len(a) > 0 {
				err := usagef("%s has no command %q; see %s --help", c.CommandPath(), a[0], c.CommandPath())
				c.SuggestionsMinimumDistance = 2 // letters that are wrong
				for _, name := range c.SuggestionsFor(a[0]) {
					err = withHint(err, "%s %s", c.CommandPath(), name)
				}
				return err
			}
			return c.Help()
		}
	}
	for _, sub := range cmd.Commands() {
		usageErrors(sub)
	}
}
