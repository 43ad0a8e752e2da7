package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/trust"
)

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "what the configuration is, where each setting comes from, and whether it is right",
		Args:  cobra.NoArgs,
		Long: `Config works on the configuration files themselves; flipsided need not run, except for reload.

Exit status: 0, 1 the configuration cannot be used, 7 not permitted.`,
	}
	var root directory
	cmd.PersistentFlags().Var(&root, "root", "look at the files below this `directory` instead of /")
	source := func() config.Source { return config.Source{Root: string(root), File: a.config} }
	cmd.AddCommand(a.configShow(source), a.configCheck(source), a.configEdit(), a.configReload())
	return cmd
}

// directory is a flag that names one, from where the command was started.
type directory string

func (d *directory) Set(text string) (err error) {
	if text != "" {
		text, err = filepath.Abs(text)
	}
	*d = directory(text)
	return err
}
func (d *directory) String() string { return string(*d) }
func (d *directory) Type() string   { return "string" }

func (a *app) configShow(source func() config.Source) *cobra.Command {
	var origin, changed bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "print every setting, as a file that could be read again",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := config.Read(source())
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(configDocument(l))
			}
			s := a.pen()
			table, width := "", 0
			for _, set := range l.Settings() {
				width = max(width, len(set.Key)+len(set.Value)+3)
			}
			for _, set := range l.Settings() {
				o, ok := l.Origins[set.Key]
				if changed && !ok {
					continue
				}
				section, key, _ := strings.Cut(set.Key, ".")
				if section != table {
					if table != "" {
						fmt.Fprintln(a.stdout)
					}
					table = section
					fmt.Fprintln(a.stdout, s.paint(bold, "["+section+"]"))
				}
				line := key + " = " + set.Value
				if origin {
					from := "default"
					if ok {
						from = o.String()
					}
					line = pad(line, min(width, 44)) + "  " + s.paint(faint, "# "+from)
				}
				fmt.Fprintln(a.stdout, line)
			}
			if origin {
				printFiles(a, s, l)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&origin, "origin", false, "say which file and line each setting comes from, and what was read and means nothing")
	cmd.Flags().BoolVar(&changed, "changed", false, "leave out what has its default")
	return cmd
}

func printFiles(a *app, s pen, l *config.Loaded) {
	fmt.Fprintf(a.stdout, "\n%s\n", s.paint(faint, "# read, a later one wins:"))
	for _, f := range l.Files {
		line := "#   " + f.Path
		if f.Masked {
			line += " (masked)"
		}
		if f.Hides != "" {
			line += ", in place of " + f.Hides
		}
		fmt.Fprintln(a.stdout, s.paint(faint, line))
	}
	if len(l.Unused) > 0 {
		fmt.Fprintln(a.stdout, s.paint(faint, "# read, and not used:"))
	}
	for _, u := range l.Unused {
		fmt.Fprintf(a.stdout, "%s\n", s.paint(faint, fmt.Sprintf("#   %s in %s: %s", u.Key, u.Origin, u.Why)))
	}
}

type configSetting struct {
	Key    string         `json:"key"`
	Value  string         `json:"value"` // as it is written in TOML
	Origin *config.Origin `json:"origin,omitempty"`
}

type configDoc struct {
	Schema   string          `json:"schema"`
	Settings []configSetting `json:"settings"`
	Files    []config.File   `json:"files"`
	Unused   []config.Unused `json:"unused,omitempty"`
}

func configDocument(l *config.Loaded) configDoc {
	doc := configDoc{Schema: "flipside.config/v1", Files: append([]config.File{}, l.Files...), Unused: l.Unused}
	for _, s := range l.Settings() {
		set := configSetting{Key: s.Key, Value: s.Value}
		if o, ok := l.Origins[s.Key]; ok {
			set.Origin = &o
		}
		doc.Settings = append(doc.Settings, set)
	}
	return doc
}

func (a *app) configCheck(source func() config.Source) *cobra.Command {
	return &cobra.Command{
		Use:   "check [FILE]",
		Short: "say what is wrong with the configuration, or with one file",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			src := source()
			if len(args) == 1 {
				src.File = args[0]
			}
			l, err := config.Read(src)
			if err != nil {
				return err
			}
			if err := checkPCRKeys(src.Root, l); err != nil {
				return err
			}
			if err := checkNamed(src.Root, l); err != nil {
				if src.Root == "" {
					return err
				}
				fmt.Fprintf(a.stderr, "warning: %v: flipsided will not start without it\n", err) // an image may get it when it is installed
			}
			// The program of flipside-deadman.timer reads no configuration.
			if d := config.Default(); l.Paths.State != d.Paths.State || l.Host.OSRelease != d.Host.OSRelease {
				fmt.Fprintf(a.stderr, "warning: flipside-deadman.timer looks in %s and at %s, not where paths.state and host.os_release say: see docs/health.md\n", d.Paths.State, d.Host.OSRelease)
			}
			if a.json {
				return a.printJSON(configDocument(l))
			}
			fmt.Fprintf(a.stdout, "the configuration is right: %d settings from %d files\n", len(l.Origins), len(l.Files))
			return nil
		},
	}
}

// checkPCRKeys reads the files that trust.pcr_keys names, without which no release would be taken.
func checkPCRKeys(root string, l *config.Loaded) error {
	var files []string
	for _, f := range l.Trust.PCRKeys {
		files = append(files, filepath.Join(root, f))
	}
	if _, err := trust.LoadPCRKeys(files); err != nil {
		return fmt.Errorf("%s: trust.pcr_keys: %w", l.Origins["trust.pcr_keys"], err)
	}
	return nil
}

// checkNamed looks whether the files are there without which the daemon does not start.
func checkNamed(root string, l *config.Loaded) error {
	for key, files := range map[string][]string{
		"update.ca": l.Update.CA, "update.client_cert": {l.Update.ClientCert}, "update.client_key": {l.Update.ClientKey},
		"lock.ca": {l.Lock.CA}, "lock.cert": {l.Lock.Cert}, "lock.key": {l.Lock.Key}, "lock.password_file": {l.Lock.Password}, "lock.signer": {l.Lock.Signer}, "lock.owners": l.Lock.Owners,
	} {
		for _, f := range files {
			if !filepath.IsAbs(f) { // none, or one that a TPM has
				continue
			}
			if _, err := os.Stat(filepath.Join(root, f)); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s: %s: there is no %s", l.Origins[key], key, f)
			}
		}
	}
	return nil
}

func (a *app) configEdit() *cobra.Command {
	return &cobra.Command{
		Use:   "edit",
		Short: "edit the configuration, and put it in place only if it is right",
		Args:  cobra.NoArgs,
		Long: `Edit opens a copy of the file in $VISUAL or $EDITOR. When the editor ends, the copy is checked together with all other files; only if it
is right it replaces the file, whole, with the owner and the permissions that it had; what is not right is kept in a temporary file that the error
names. A daemon that runs goes on with what it has read before "flipside config reload".`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path := a.config
			if path == "" {
				path = config.DefaultPath
			}
			file, err := filepath.EvalSymlinks(path) // it is not the link that is edited
			if _, lerr := os.Lstat(path); errors.Is(lerr, fs.ErrNotExist) {
				file, err = path, nil
			}
			if err != nil {
				return fmt.Errorf("reading the configuration: %w", err)
			}
			if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
				if file == os.DevNull {
					return fmt.Errorf("%s is a link to %s, which masks it: remove the link first", path, file)
				}
				return fmt.Errorf("%s is not a file", file)
			}
			old, err := os.ReadFile(file)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("reading the configuration: %w", err)
			}
			mode := fs.FileMode(0o644)
			if info, err := os.Stat(file); err == nil {
				mode = info.Mode().Perm()
			}
			d, err := a.edit(filepath.Base(path), old)
			if err != nil {
				return err
			}
			if string(d.text) == string(old) {
				return errors.Join(withExit(exitNothing, errors.New("nothing was changed")), d.remove())
			}
			kept := func(err error) error {
				return withHint(err, "nothing was changed; what you wrote is in %s", d.path)
			}
			if err := config.Check(a.config, path, d.text); err != nil {
				return kept(err)
			}
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				return kept(fmt.Errorf("saving the configuration: %w", err))
			}
			if err := atomicfile.WriteFile(file, d.text, mode); err != nil {
				return kept(fmt.Errorf("saving the configuration: %w", err))
			}
			fmt.Fprintf(a.stdout, "%s is in place; \"flipside config reload\" makes flipsided read it\n", path)
			return d.remove()
		},
	}
}

func (a *app) configReload() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "make flipsided read its configuration again",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.do(cmd.Context(), control.Command{Action: control.Reload})
			if err != nil {
				return err
			}
			return a.said(st, "flipsided reads its configuration again")
		},
	}
}
