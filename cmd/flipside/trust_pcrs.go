package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
)

func (a *app) trustPCRsCommand() *cobra.Command {
	var key string
	phases := []string{trust.DefaultPhase}
	cmd := &cobra.Command{
		Use:   "pcrs KERNEL",
		Short: "what a unified kernel image will measure, and with a key a policy that lets secrets open for it",
		Args:  exactArgs(1, "the KERNEL image"),
		Long: `Pcrs predicts PCR 11 for a unified kernel image, in the phases of the boot. With --key it prints a signed PCR policy for these values, as
"systemd-measure sign" does: it goes into the image as section .pcrsig, or into a payload as its part pcr_policy.`,
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			k, err := trust.ReadKernel(f)
			if err != nil {
				return withExit(exitVerify, fmt.Errorf("%s: %w", args[0], err))
			}
			values := map[string]string{}
			var list []map[uint][]byte
			for _, phase := range phases {
				at := k.At(phase)
				values[phase] = hex.EncodeToString(at[:])
				list = append(list, map[uint][]byte{11: at[:]})
			}
			if key != "" {
				signer, err := loadSigner(key)
				if err != nil {
					return err
				}
				data, err := trust.SignPCRs(signer, list...)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(a.stdout, "%s\n", data)
				return err
			}
			if a.json {
				return a.printJSON(struct {
					Schema string            `json:"schema"`
					PCR11  map[string]string `json:"pcr11"`
				}{"flipside.pcrs/v1", values})
			}
			for _, phase := range phases {
				fmt.Fprintf(a.stdout, "11:sha256=%s  %s\n", values[phase], phase)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "PEM `file` of the RSA private key that signs the policy")
	cmd.Flags().StringSliceVar(&phases, "phase", phases, "`phase` of the boot, as systemd-measure names it; may be repeated")
	return cmd
}

func (a *app) trustSealCommand() *cobra.Command {
	var password, out string
	cmd := &cobra.Command{
		Use:   "seal KEY",
		Short: "seal a secret from standard input so that it opens only for PCRs that KEY has authorised",
		Args:  exactArgs(1, "the public KEY"),
		Long: `Seal reads a secret of up to 128 bytes from standard input and seals it in the TPM of this host to KEY, the PEM file of an RSA public key: it opens only while
the PCRs are what a policy signed by that key says (TPM2_PolicyAuthorize), and so in every release that the key's owner has signed one for. The result can be kept anywhere.
The first time it takes the TPM owner's password, for a storage key at 0x8101F512.`,
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := config.Load(a.config)
			if err != nil {
				return err
			}
			keys, err := trust.LoadPCRKeys(args)
			if err != nil {
				return err
			}
			if len(keys) != 1 {
				return usagef("%s holds %d keys, want one", args[0], len(keys))
			}
			pw, err := ownerPassword(password)
			if err != nil {
				return err
			}
			secret, err := io.ReadAll(io.LimitReader(a.stdin, 4096))
			if err != nil {
				return fmt.Errorf("reading the secret: %w", err)
			}
			return a.withTPM(c, func(t *trust.TPM) error {
				s, err := t.Seal(pw, keys[0], secret)
				clear(secret)
				if err != nil {
					return err
				}
				data, err := json.MarshalIndent(s, "", "  ")
				if err != nil {
					return err
				}
				if out != "" {
					return writeNew(out, append(data, '\n'), 0o600)
				}
				_, err = fmt.Fprintf(a.stdout, "%s\n", data)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&password, "owner-password-file", "", "`file` whose first line is the TPM owner's password (default: it is empty)")
	cmd.Flags().StringVarP(&out, "output", "o", "", "new `file` for the result (default: standard output)")
	return cmd
}

func (a *app) trustUnsealCommand() *cobra.Command {
	var signatures []string
	cmd := &cobra.Command{
		Use:   "unseal FILE",
		Short: "print a sealed secret, if the PCRs are what its key has authorised",
		Args:  exactArgs(1, "the sealed FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := config.Load(a.config)
			if err != nil {
				return err
			}
			data, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			var s trust.Sealed
			if err := json.Unmarshal(data, &s); err != nil {
				return fmt.Errorf("reading %s: %w", args[0], err)
			}
			var problems []error
			for _, file := range signatures {
				sigs, err := os.ReadFile(file)
				if errors.Is(err, os.ErrNotExist) {
					problems = append(problems, err)
					continue
				}
				if err != nil {
					return err
				}
				err = a.withTPM(c, func(t *trust.TPM) error {
					secret, err := t.Unseal(s, sigs)
					if err == nil {
						_, err = a.stdout.Write(secret)
					}
					return err
				})
				if err == nil || !errors.Is(err, trust.ErrShut) {
					return err
				}
				problems = append(problems, fmt.Errorf("%s: %w", file, err))
			}
			return withExit(exitVerify, errors.Join(problems...))
		},
	}
	cmd.Flags().StringSliceVar(&signatures, "signature", []string{"/run/systemd/tpm2-pcr-signature.json", "/.extra/tpm2-pcr-signature.json"}, "`file` of signed PCR policies; may be repeated")
	return cmd
}

func (a *app) withTPM(c config.Config, f func(*trust.TPM) error) error {
	t, err := trust.OpenTPM(c.Trust.TPM)
	if err != nil {
		return trustError(err)
	}
	return trustError(errors.Join(f(t), t.Close()))
}
