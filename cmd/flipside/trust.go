package main

import (
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
	"github.com/flipside-linux/flipside/updater/writer"
)

// prover verifies hosts' proofs for the release server; makers are those of TPMs that it knows, nil if it asks for none.
func prover(makers *trust.Makers) server.Prover {
	return func(id string, nonce, proof []byte) (server.Evidence, error) {
		p, key, err := trust.CheckProof(proof, id, nonce)
		if err != nil {
			return server.Evidence{}, err
		}
		ev := server.Evidence{Slot: p.Claim.Slot, Version: p.Claim.Version, Key: key, PCRs: map[string]string{}}
		for n, v := range p.PCRs {
			ev.PCRs[fmt.Sprintf("%02d", n)] = hex.EncodeToString(v)
		}
		if makers == nil {
			return ev, nil
		}
		if m, err := makers.Check(p); err != nil {
			ev.Unendorsed = err.Error()
		} else {
			ev.TPM = &server.TPM{Maker: m.Maker, Model: m.Model, Issuer: m.Issuer, Key: m.Key}
		}
		return ev, nil
	}
}

func (a *app) trustCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trust",
		Short: "what this host believes: the oldest release it takes, the keys that count, its own key in the TPM",
	}
	cmd.AddCommand(a.trustStatusCommand(), a.trustProvisionCommand(), a.trustResetCommand(), a.trustRequestCommand(),
		a.trustPCRsCommand(), a.trustSealCommand(), a.trustUnsealCommand())
	return cmd
}

// trustStatus is what "trust status --json" prints.
type trustStatus struct {
	Schema   string       `json:"schema"`
	Floor    *trust.Level `json:"floor,omitempty"`
	Problem  string       `json:"problem,omitempty"` // why no payload is accepted
	Hint     string       `json:"-"`
	Keys     []trust.Key  `json:"keys"`
	Need     int          `json:"signatures_needed"`
	Product  string       `json:"product,omitempty"`
	Device   string       `json:"device_key,omitempty"` // fingerprint
	Boots    string       `json:"attestation_key,omitempty"`
	Warnings []string     `json:"warnings,omitempty"`
}

func (a *app) trustStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "the floor of releases, the pinned keys and the device key",
		Args:  cobra.NoArgs,
		Long: `Status reads the floor below which no release is taken, the keys whose signatures count and those that do not, with why, and the
fingerprint of the device key. It changes nothing.

Exit status: 0, or 6 if no payload is accepted as things stand.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(a.config)
			if err != nil {
				return err
			}
			st, err := readTrust(c, time.Now())
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(st)
			} else {
				err = a.printTrust(st, c)
			}
			if err == nil && st.Problem != "" {
				return quiet(exitVerify)
			}
			return err
		},
	}
}

func readTrust(c config.Config, now time.Time) (trustStatus, error) {
	st := trustStatus{Schema: "flipside.trust-status/v1", Keys: []trust.Key{}, Need: c.Trust.Signatures, Product: c.Trust.Product}
	f, err := writer.Floor(c)
	if err != nil {
		return st, err
	}
	level, err := f.Level()
	if err != nil {
		st.Problem = err.Error()
	} else {
		st.Floor = &level
		if level.Warning != "" {
			st.Warnings = append(st.Warnings, level.Warning)
		}
	}
	keys, err := writer.Keys(c, level.Number)
	if keys != nil {
		st.Keys = append(st.Keys, keys.All...)
		st.Warnings = append(st.Warnings, keys.Warnings(now)...)
	}
	if err != nil && st.Problem == "" {
		st.Problem = err.Error()
	}
	if d, err := trust.OpenDevice(c.Trust.TPM); err == nil {
		if st.Device, err = trust.Fingerprint(d.Public()); err != nil {
			return st, err
		}
	}
	if t, err := trust.OpenTPM(c.Trust.TPM); err == nil {
		if key, err := t.AttestationKey(); err == nil { // without one it proves nothing
			st.Boots = key
		}
		if _, err := t.PCRs(trust.ProofPCRs); errors.Is(err, trust.ErrNoBank) {
			st.Warnings = append(st.Warnings, "no boot can be proven, and no policy for further PCRs judged: "+err.Error())
		}
		if err := t.Close(); err != nil {
			return st, err
		}
	}
	return st, nil
}

func (a *app) printTrust(st trustStatus, c config.Config) error {
	tw := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	switch {
	case st.Floor == nil:
		fmt.Fprintf(tw, "floor\tnot known\n")
	case st.Floor.Number == 0:
		fmt.Fprintf(tw, "floor\tnone yet: it rises when a release with a number has proven itself\n")
	default:
		fmt.Fprintf(tw, "floor\t%d (%s): no release below it is taken\n", st.Floor.Number, time.Unix(st.Floor.Number, 0).UTC().Format(time.RFC3339))
	}
	if st.Floor != nil {
		kept := "in a file: who restores the disk from a backup lowers it"
		if st.Floor.Keeper == "tpm" {
			kept = "in the TPM: only who has the owner's password lowers it"
		}
		fmt.Fprintf(tw, "kept\t%s (TPM %d, file %d, running release %d)\n", kept, st.Floor.TPM, st.Floor.File, st.Floor.Release)
	}
	if st.Product != "" {
		fmt.Fprintf(tw, "product\t%q\n", st.Product)
	}
	fmt.Fprintf(tw, "signatures\t%d needed\n", st.Need)
	for _, k := range st.Keys {
		end := ""
		if !k.NotAfter.IsZero() {
			end = ", until " + k.NotAfter.Format(time.DateOnly)
		}
		what := "counts"
		if !k.Counts {
			what = "does not count: " + k.Why
		}
		fmt.Fprintf(tw, "key\t%q (%s%s) %s\n\t  %s\n", k.Name, k.Role, end, what, k.Fingerprint)
	}
	if st.Device != "" {
		fmt.Fprintf(tw, "device key\t%s in %s\n", st.Device, c.Trust.TPM)
		fmt.Fprintf(tw, "proves boots\tby %s\n", orDash(st.Boots))
	} else {
		fmt.Fprintf(tw, "device key\tnone\n")
	}
	for _, w := range st.Warnings {
		fmt.Fprintf(tw, "warning\t%s\n", w)
	}
	if st.Problem != "" {
		fmt.Fprintf(tw, "problem\tno payload is accepted: %s\n", st.Problem)
	}
	return tw.Flush()
}

// ownerPassword reads the TPM owner's password; an empty name is the empty password.
func ownerPassword(file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the owner's password: %w", err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return []byte(strings.TrimSuffix(line, "\r")), nil
}

// trustError gives the errors of a TPM exit codes and hints.
func trustError(err error) error {
	switch {
	case errors.Is(err, trust.ErrOwnerAuth):
		return withHint(withExit(exitPermitted, err), "--owner-password-file names the file with the password of the TPM's owner hierarchy")
	case errors.Is(err, trust.ErrFull):
		return withHint(err, "tpm2_getcap handles-nv-index lists what fills it; tpm2_nvundefine deletes what nobody needs")
	case errors.Is(err, trust.ErrLocked):
		return withHint(withExit(exitBusy, err), "wait for the TPM's recovery time, or tpm2_dictionarylockout --clear-lockout")
	case errors.Is(err, trust.ErrNoTPM):
		return withHint(err, "trust.tpm names another device; without a TPM the floor is kept in a file")
	}
	return err
}

func (a *app) trustProvisionCommand() *cobra.Command {
	var password string
	var number int64
	cmd := &cobra.Command{
		Use:   "provision",
		Short: "keep the floor in the TPM, and make the device key",
		Args:  cobra.NoArgs,
		Long: `Provision makes two NV indices in the TPM for the floor of releases, and two keys that cannot leave the TPM: one to identify this host and one to
prove its boots. What is there already stays, so that it can be run again after power was lost.

The floor begins at the highest of what its file and the running release know and of --number. If no number is known it begins where the first release
with a number will be, once that has proven itself. From there the TPM counts days: a write to its flash for each day between two releases.

The floor is worth what the owner's password is worth: with an empty one, who is root on the host can delete it. Set one first
(tpm2_changeauth -c owner), and keep it off the host.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, f, pw, err := a.trustParts(password)
			if err != nil {
				return err
			}
			if c.Trust.Floor != string(trust.FileOnly) {
				if err := f.Provision(cmd.Context(), pw, number); err != nil {
					return trustError(err)
				}
			}
			t, err := trust.OpenTPM(c.Trust.TPM)
			if err != nil {
				return trustError(err)
			}
			defer t.Close()
			if err := t.ProvisionKeys(pw); err != nil {
				return trustError(err)
			}
			if len(pw) == 0 {
				fmt.Fprintln(a.stderr, "flipside: the TPM's owner password is empty: whoever is root here can delete the floor")
			}
			return a.trustAfter(c)
		},
	}
	cmd.Flags().StringVar(&password, "owner-password-file", "", "`file` whose first line is the TPM owner's password (default: it is empty)")
	cmd.Flags().Int64Var(&number, "number", 0, "begin the floor at this `number` at least: the max-timestamp of the oldest release that may be taken")
	return cmd
}

func (a *app) trustParts(password string) (config.Config, *trust.Floor, []byte, error) {
	c, err := config.Load(a.config)
	if err != nil {
		return c, nil, nil, err
	}
	pw, err := ownerPassword(password)
	if err != nil {
		return c, nil, nil, err
	}
	f, err := writer.Floor(c)
	if err != nil {
		return c, nil, nil, err
	}
	return c, f, pw, os.MkdirAll(c.Paths.State, 0o700)
}

func (a *app) trustAfter(c config.Config) error {
	st, err := readTrust(c, time.Now())
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(st)
	}
	return a.printTrust(st, c)
}

func (a *app) trustResetCommand() *cobra.Command {
	var password string
	var to int64
	cmd := &cobra.Command{
		Use:   "reset --to NUMBER",
		Short: "set the floor anew, also to a lower number",
		Args:  cobra.NoArgs,
		Long: `Reset deletes the floor and makes it anew at NUMBER: seconds since 1970, the max-timestamp of the oldest release that may be taken, 0 for any.
It is for going back on purpose, and for a TPM that was cleared or replaced. A floor in a TPM takes the owner's password.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("to") {
				return usagef("reset needs --to: the number of the oldest release that may be taken")
			}
			c, f, pw, err := a.trustParts(password)
			if err != nil {
				return err
			}
			if err := f.Reset(pw, to); err != nil {
				return trustError(err)
			}
			return a.trustAfter(c)
		},
	}
	cmd.Flags().StringVar(&password, "owner-password-file", "", "`file` whose first line is the TPM owner's password (default: it is empty)")
	cmd.Flags().Int64Var(&to, "to", 0, "the new floor")
	return cmd
}

func (a *app) trustRequestCommand() *cobra.Command {
	var dns []string
	cmd := &cobra.Command{
		Use:   "request NAME",
		Short: "a certificate request for the device key",
		Args:  exactArgs(1, "NAME"),
		Long: `Request prints a certificate signing request (PKCS #10, PEM) for the key in the TPM, with NAME as its common name. What the authority makes of it
goes to update.client_cert or lock.cert, with "tpm:device" as its key.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load(a.config)
			if err != nil {
				return err
			}
			d, err := trust.OpenDevice(c.Trust.TPM)
			if err != nil {
				return trustError(err)
			}
			der, err := d.Request(args[0], dns)
			if err != nil {
				return err
			}
			return pem.Encode(a.stdout, &pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
		},
	}
	cmd.Flags().StringSliceVar(&dns, "dns", nil, "DNS `name` of the host; may be repeated")
	return cmd
}
