package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/omaha/shallow"
)

func (a *app) fleetPolicy(s *semaphoreFlags) *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "read, change or check the reboot policy of a group", Args: cobra.NoArgs}
	cmd.AddCommand(a.policyGet(s), a.policySet(s), a.policyEdit(s), a.policyCheck())
	return cmd
}

func (a *app) policyGet(s *semaphoreFlags) *cobra.Command {
	var asTOML bool
	cmd := &cobra.Command{
		Use:   "get",
		Short: "print the policy, in the form that set takes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if !asTOML || a.json {
					return a.printPolicy(st.Policy)
				}
				text, err := policyTOML(st.Policy)
				if err == nil {
					_, err = a.stdout.Write(text)
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&asTOML, "toml", false, "as TOML, not JSON")
	return cmd
}

const policySchema = "flipside.policy/v1"

// printPolicy prints a policy as JSON, as set takes it. Its schema is of the document, not of the policy.
func (a *app) printPolicy(p lock.Policy) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return a.printJSON(json.RawMessage(fmt.Sprintf("{%q:%q,%s", "schema", policySchema, data[1:])))
}

func (a *app) policySet(s *semaphoreFlags) *cobra.Command {
	var why string
	cmd := &cobra.Command{
		Use:   "set FILE",
		Short: "replace the policy by that of a JSON or TOML file (- is standard input)",
		Args:  exactArgs(1, "the FILE"),
		Long:  `Set replaces the policy of a group. A group that is paused (flipside fleet pause) stays paused: the max of the file counts from the resume on.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.readPolicy(args[0])
			if err != nil {
				return err
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				var set lock.Policy
				err := k.EditPolicy(cmd.Context(), s.group, why, func(old *lock.Policy) error {
					if err := knownFields(args[0], p, *old); err != nil {
						return err
					}
					set = p
					if old.Max == 0 && old.PausedMax > 0 {
						set.Max, set.PausedMax = 0, cmp.Or(p.Max, p.PausedMax, old.PausedMax)
					}
					*old = set
					return nil
				})
				if err != nil {
					return err
				}
				what := "the policy of group " + s.group + " is set"
				if set.Max == 0 && set.PausedMax > 0 {
					what += fmt.Sprintf("; the group stays paused, and goes on with max %d: flipside fleet resume --group %s", set.PausedMax, s.group)
				}
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if over := st.Overlong(); over != "" {
					what += "; " + over
				}
				return a.done(what)
			})
		},
	}
	cmd.Flags().StringVar(&why, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

func (a *app) policyEdit(s *semaphoreFlags) *cobra.Command {
	var why string
	cmd := &cobra.Command{
		Use:   "edit",
		Short: "change the policy in $VISUAL or $EDITOR",
		Args:  cobra.NoArgs,
		Long: `Edit opens the policy as TOML in $VISUAL, $EDITOR or vi, checks what was saved, and sets it if nobody has changed the policy
meanwhile. A text that cannot be used is kept, and its place printed.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error { return a.editPolicy(cmd.Context(), k, s.group, why) })
		},
	}
	cmd.Flags().StringVar(&why, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

func (a *app) editPolicy(ctx context.Context, k *lock.Keeper, group, why string) error {
	st, err := k.State(ctx, group)
	if err != nil {
		return err
	}
	before, err := policyTOML(st.Policy)
	if err != nil {
		return err
	}
	d, err := a.edit(group+".toml", before)
	if err != nil {
		return err
	}
	if bytes.Equal(before, d.text) {
		return errors.Join(withExit(exitNothing, errors.New("the policy is as it was")), d.remove())
	}
	ctx = context.WithoutCancel(ctx) // who has pressed Ctrl-C in the editor did not mean this
	p, err := a.readPolicy(d.path)
	if err == nil {
		err = k.EditPolicy(ctx, group, why, func(now *lock.Policy) error {
			text, err := policyTOML(*now)
			if err != nil {
				return err
			}
			if !bytes.Equal(text, before) {
				return fmt.Errorf("%w: somebody else has changed the policy meanwhile", lock.ErrConflict)
			}
			if err := knownFields(d.path, p, *now); err != nil {
				return err
			}
			*now = p
			return nil
		})
	}
	if err != nil {
		return withHint(err, "your text is kept: flipside fleet policy set --group %s %s", group, d.path)
	}
	return errors.Join(a.done("the policy of group "+group+" is set"), d.remove())
}

func (a *app) policyCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "check a policy without setting it, and say when its windows open",
		Args:  exactArgs(1, "the FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := a.readPolicy(args[0])
			if err == nil {
				err = knownFields(args[0], p, lock.Policy{})
			}
			if err != nil {
				return err
			}
			now := time.Now()
			if st := p.Window(now); !st.Open && st.Next.IsZero() {
				return withExit(exitFailed, fmt.Errorf("the policy can be read, but no host will ever reboot: %s", st.Why))
			}
			what := "the policy is good; its window is " + strings.Join(openings(p, now, 3), ",\n  then ")
			if over := (lock.State{Policy: p}).Overlong(); over != "" {
				what += "\n" + over
			}
			return a.done(what)
		},
	}
}

// openings says in words when the windows of a policy are open next, with the zone of this machine.
func openings(p lock.Policy, now time.Time, n int) []string {
	const form = "Mon 2006-01-02 15:04 MST"
	var list []string
	for at := now; len(list) < n; {
		st := p.Window(at)
		switch {
		case st.Open && st.Until.IsZero():
			return append(list, strings.TrimSuffix("always open from "+at.Local().Format(form), " from "+now.Local().Format(form)))
		case st.Open:
			list = append(list, fmt.Sprintf("open from %s to %s", at.Local().Format(form), st.Until.Local().Format(form)))
			at = st.Until
		case st.Next.IsZero():
			return list
		default:
			at = st.Next
		}
	}
	return list
}

// readPolicy reads a policy that a person has written. What it does not name has the default.
func (a *app) readPolicy(path string) (lock.Policy, error) {
	var data []byte
	var err error
	if path == "-" {
		data, err = io.ReadAll(io.LimitReader(a.stdin, 1<<20))
	} else {
		data, err = os.ReadFile(path)
	}
	if err != nil {
		return lock.Policy{}, fmt.Errorf("reading the policy: %w", err)
	}
	var m map[string]any
	if trimmed := bytes.TrimSpace(data); len(trimmed) == 0 || trimmed[0] != '{' {
		_, err = shallow.Decode(data, &m)
	} else {
		err = json.Unmarshal(data, &m)
	}
	p := lock.DefaultPolicy()
	if err == nil {
		if schema, ok := m["schema"]; ok && schema != policySchema {
			return lock.Policy{}, usagef("%s: schema %q is not %s", policyName(path), fmt.Sprint(schema), policySchema)
		}
		delete(m, "schema")
		if data, err = json.Marshal(m); err == nil {
			err = json.Unmarshal(data, &p)
		}
	}
	if err != nil {
		return lock.Policy{}, fmt.Errorf("reading the policy: %s: %w", policyName(path), err)
	}
	if err := p.Check(); err != nil {
		return lock.Policy{}, fmt.Errorf("%s: %w", policyName(path), err)
	}
	return p, nil
}

func policyName(path string) string { return cmp.Or(strings.TrimPrefix(path, "-"), "standard input") }

// knownFields refuses fields that neither this version nor the policy in the store knows: they are typing mistakes. What a newer version
// has put into the store may stay.
func knownFields(path string, p, stored lock.Policy) error {
	old := stored.Unknown()
	for _, name := range p.Unknown() {
		if !slices.Contains(old, name) {
			return withHint(usagef("%s: unknown field %q in the policy", policyName(path), name), "flipside fleet policy get prints the fields that are set")
		}
	}
	return nil
}

// policyTOML writes a policy as people write it.
func policyTOML(p lock.Policy) ([]byte, error) {
	data, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var m map[string]any
	if err := dec.Decode(&m); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = toml.NewEncoder(&b).Encode(tables(m))
	return b.Bytes(), err
}

// tables gives a JSON value the types that TOML distinguishes: integers, and arrays of tables.
func tables(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			if v[k] == nil { // TOML has no null
				delete(v, k)
				continue
			}
			v[k] = tables(v[k])
		}
		return v
	case []any:
		var list []map[string]any
		for i := range v {
			v[i] = tables(v[i])
			if m, ok := v[i].(map[string]any); ok {
				list = append(list, m)
			}
		}
		if len(list) == len(v) && len(list) > 0 {
			return list
		}
		return v
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, _ := v.Float64()
		return f
	}
	return v
}
