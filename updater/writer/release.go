package writer

import (
	"fmt"
	"os"
	"strings"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/updater/config"
)

// RunningVersion reads the version of the running release, VERSION_ID, from its os-release file.
func RunningVersion(c config.Config) (string, error) {
	path := c.Host.OSRelease
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("reading the running version: %w", err)
	}
	v, ok := ReleaseFields(data)["VERSION_ID"]
	if !ok {
		return "", fmt.Errorf("reading the running version: %s has no VERSION_ID", path)
	}
	if _, err := omaha.CompareVersions(v, v); err != nil {
		return "", fmt.Errorf("reading the running version: VERSION_ID in %s: %w", path, err)
	}
	return v, nil
}

// ReleaseFields reads the lines of an os-release file (man 5 os-release); of equal keys the first counts.
func ReleaseFields(data []byte) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if _, known := out[key]; ok && !known {
			out[key] = strings.Trim(value, `"'`)
		}
	}
	return out
}
