package host

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"time"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/history"
	"github.com/flipside-linux/flipside/updater/metrics"
	"github.com/flipside-linux/flipside/updater/writer"
)

// Options are what the agent of a host is given by its process.
type Options struct {
	Load  func() (config.Config, error)
	Start writer.Start // of what writes to the disk
	// Errands connects to a process that calls [Errand]. nil: what it would do is done in this process.
	Errands func() (*net.UnixConn, error)
	// Manager tells the service manager something (sd_notify(3)); nil: this process does.
	Manager func(string)
	Lacks   []string // what this process could not be kept from, with the reasons
}

// Serve runs hosts as load describes them until ctx is done. Each value on reload loads the configuration again: the engine stops, its
// state is on the disk, and another one goes on from there. A configuration that cannot be used is told and changes nothing.
func Serve(ctx context.Context, opt Options, reload <-chan struct{}, log *slog.Logger) error {
	load := opt.Load
	for _, l := range opt.Lacks {
		log.Warn("the part of the daemon that talks to the network keeps rights that it does not need", "lacks", l)
	}
	c, err := load()
	if err != nil {
		return err
	}
	if opt.Manager == nil {
		opt.Manager = tellManager
	}
	defer context.AfterFunc(ctx, func() { opt.Manager(stopping) })()
	asked := make(chan struct{}, 1) // by an operator
	ask := func() {
		select {
		case asked <- struct{}{}:
		default:
		}
	}
	var calls socket
	defer calls.close()
	var last *config.Config // what ran before the reload
	for {
		run, stop := context.WithCancel(ctx)
		next := make(chan config.Config, 1)
		ready := make(chan struct{})
		go func() {
			for {
				select {
				case <-run.Done():
					return
				case <-reload:
				case <-asked:
				}
				opt.Manager(reloading())
				n, err := load()
				if err != nil {
					log.Error("the new configuration cannot be used; the old one stays", "kind", string(updater.Reloaded), "error", err)
					opt.Manager(isReady)
					continue
				}
				next <- n
				stop()
				return
			}
		}()
		err := runUntil(run, c, opt, &calls, log, ready, ask)
		stop()
		select {
		case n := <-next:
			if err != nil {
				return err
			}
			log.Info("the configuration was read again", "kind", string(updater.Reloaded))
			old := c
			c, last = n, &old
			continue
		default:
		}
		started := false
		select {
		case <-ready:
			started = true
		default:
		}
		if err == nil || started || last == nil {
			return err
		}
		log.Error("the new configuration cannot be used; the old one stays", "kind", string(updater.Reloaded), "error", err)
		c, last = *last, nil
	}
}

// Run builds the engine that c describes and runs it until ctx is done, with its writers in this process. An error that is a *reboot.ExitError asks for the
// process to end.
func Run(ctx context.Context, c config.Config, log *slog.Logger) error {
	start := writer.InProcess(func() (config.Config, error) { return c, nil }, log)
	var calls socket
	defer calls.close()
	return runUntil(ctx, c, Options{Start: start, Manager: tellManager}, &calls, log, make(chan struct{}), nil)
}

// socket is the control socket, which is kept over a reload so that nobody finds the daemon gone.
type socket struct{ *control.Listener }

func (s *socket) at(path string) (*control.Listener, error) {
	if s.Listener != nil && s.Path() == path {
		return s.Listener, nil
	}
	l, err := control.Listen(path)
	if err != nil {
		return nil, err
	}
	s.close()
	s.Listener = l
	return l, nil
}

func (s *socket) close() {
	if s.Listener != nil {
		s.Close()
	}
}

// runUntil closes ready once the engine works. With opt.Load and reload an operator may have the configuration read again.
func runUntil(ctx context.Context, c config.Config, opt Options, calls *socket, log *slog.Logger, ready chan<- struct{}, reload func()) (err error) {
	e, goal, closer, err := assemble(c, opt, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer()) }()
	m := metrics.New()
	h := openHistory(c.Paths.State, log)
	defer h.close()
	e.Told = func(n updater.Note) {
		m.Note(n)
		h.add(n, e.Core.Facts.BootID)
	}

	var warnings []string
	for _, l := range opt.Lacks {
		warnings = append(warnings, "the agent keeps rights that it does not need: "+l)
	}
	l, err := calls.at(c.Socket())
	if err != nil {
		return err
	}
	d := &operator{engine: e, conf: c, target: goal, load: opt.Load, reload: reload, now: time.Now, warnings: append(tpmWarnings(c), warnings...)}
	if opt.Errands != nil {
		d.own = func(ctx context.Context) error { return errands{opt.Errands}.do(ctx, errand{Do: doOwn}) }
	}
	if in, ok := e.Installer.(*installer); ok {
		d.mayGoBack = in.mayGoBack
	}
	serving, stop := context.WithCancel(ctx)
	var tasks []<-chan struct{}
	task := func(what string, f func() error) {
		done := make(chan struct{})
		tasks = append(tasks, done)
		go func() {
			defer close(done)
			if err := f(); err != nil {
				log.Error(what, "error", err)
			}
		}()
	}
	defer func() {
		stop()
		for _, done := range tasks {
			<-done
		}
	}()
	if c.Metrics.Listen != "" {
		ml, err := metrics.Listen(c.Metrics.Listen)
		if err != nil {
			return err
		}
		task("the metrics are gone", func() error { return m.Serve(serving, ml) })
	}
	task("the control socket is gone", func() error { return control.Serve(serving, l, d, log) })
	task("the message bus is gone", func() error { serveBus(serving, d, c, log); return nil })
	task("the service manager is not told any more", func() error { notify(serving, d, ready, opt.Manager); return nil })
	task("the watchdog is not told any more", func() error { watchdog(serving, e, opt.Manager); return nil })
	if g, ok := e.Gates.(*gatekeeper); ok {
		task("this host's key was not left with its group", func() error { g.enrol(serving); return nil })
	}
	task("the metrics are not written any more", func() error { return observe(serving, d, m, textfile{c.Metrics.Textfile, opt.Errands}, log) })
	return e.Run(ctx)
}

// textfile is where the metrics are left for others. Its directory need not be one that the agent may write to.
type textfile struct {
	path    string
	errands func() (*net.UnixConn, error)
}

// put replaces the file by text, or removes it if there is none.
func (f textfile) put(text []byte) error {
	var err error
	if len(text) == 0 {
		err = metrics.Remove(f.path)
	} else {
		err = metrics.Replace(f.path, text)
	}
	if f.errands == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return errands{f.errands}.do(ctx, errand{Do: doMetrics, Text: string(text)})
}

// observe keeps the metrics up to date.
func observe(ctx context.Context, d control.Daemon, m *metrics.Metrics, file textfile, log *slog.Logger) error {
	failed := ""
	for {
		st, changed := d.Status(ctx)
		if st.Schema != "" {
			m.Observe(st)
			if file.path != "" {
				text, why := "", error(nil)
				if data, err := m.Text(); err != nil {
					why = err
				} else {
					why = file.put(data)
				}
				if why != nil {
					text = why.Error()
				}
				if text != "" && text != failed {
					log.Warn(text)
				}
				failed = text
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-time.After(5 * time.Minute): // the age of the file says that the daemon lives
		}
		select { // a download changes its progress often
		case <-ctx.Done():
			if file.path != "" {
				return file.put(nil)
			}
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

// recorder writes notes to the history. A history that cannot be written stops nothing.
type recorder struct {
	log  *slog.Logger
	file *history.Log
}

func openHistory(dir string, log *slog.Logger) *recorder {
	h, err := history.Open(dir, 0)
	if err != nil {
		log.Error("the history cannot be written", "error", err)
	}
	return &recorder{log: log, file: h}
}

func (r *recorder) add(n updater.Note, boot string) {
	if r.file == nil {
		return
	}
	err := r.file.Append(history.Record{
		Time: time.Now(), Boot: boot, Kind: string(n.Kind), Warn: n.Warn, Text: n.Text, Version: n.Version, Slot: n.Slot, Phase: string(n.Phase),
	})
	if err != nil {
		r.log.Error("the history cannot be written", "error", err)
	}
}

func (r *recorder) close() {
	if r.file != nil {
		r.file.Close()
	}
}
