package config

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/flipside-linux/flipside/omaha/shallow"
	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// Choices are what an operator decided at run time. They win over every file, live on the state partition that both slots share, and
// are shown by "flipside config show --origin" like every other setting. A nil choice leaves the decision to the files.
type Choices struct {
	Channel *string `toml:"channel"`
	Pin     *string `toml:"pin"`
}

func choosable(key string) bool { return key == "update.channel" || key == "update.pin" }

// ReadChoices reads what was chosen. Nothing chosen is no error.
func ReadChoices(stateDir string) (Choices, error) {
	var file struct {
		Update Choices `toml:"update"`
	}
	path := filepath.Join(stateDir, choiceName)
	data, err := load(path, maxChoices)
	if errors.Is(err, fs.ErrNotExist) {
		return Choices{}, nil
	}
	if err == nil {
		if _, err = shallow.Decode(data, &file); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err != nil {
		return Choices{}, fmt.Errorf("reading the operator's choices: %w", err)
	}
	return file.Update, nil
}

// Save writes the choices durably.
func (c Choices) Save(stateDir string) error {
	if c == (Choices{}) {
		if err := atomicfile.Remove(atomicfile.OS(stateDir), choiceName); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forgetting the operator's choices: %w", err)
		}
		return nil
	}
	var b strings.Builder
	b.WriteString("# Written by flipsided for \"flipside channel\" and \"flipside pin\"; these settings win over every other file.\n[update]\n")
	if c.Channel != nil {
		fmt.Fprintf(&b, "channel = %q\n", *c.Channel)
	}
	if c.Pin != nil {
		fmt.Fprintf(&b, "pin = %q\n", *c.Pin)
	}
	if err := atomicfile.Write(atomicfile.OS(stateDir), choiceName, []byte(b.String())); err != nil {
		return fmt.Errorf("saving the operator's choices: %w", err)
	}
	return nil
}
