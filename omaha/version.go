package omaha

import (
	"fmt"
	"strings"

	"github.com/blang/semver/v4"
)

// maxVersion is the longest version that is read.
const maxVersion = 128

// CompareVersions orders two SemVer 2 versions: negative when a is older than b. Build metadata does not count.
func CompareVersions(a, b string) (int, error) {
	x, err := parseVersion(a)
	if err != nil {
		return 0, err
	}
	y, err := parseVersion(b)
	if err != nil {
		return 0, err
	}
	return x.Compare(y), nil
}

func parseVersion(s string) (semver.Version, error) {
	if len(s) > maxVersion {
		return semver.Version{}, fmt.Errorf("version of %d bytes", len(s))
	}
	v, err := semver.Parse(s)
	if err != nil {
		return v, fmt.Errorf("version %q is not three numbers with an optional -pre and +build: %s", Printable(s), Printable(err.Error()))
	}
	return v, nil
}

// matchesPrefix says whether version lies under prefix, which ends at a dot: "1.2" covers 1.2.3 and not 1.20.0.
func matchesPrefix(version, prefix string) bool {
	prefix = strings.TrimSuffix(strings.TrimSuffix(prefix, "*"), ".")
	return prefix == "" || version == prefix || strings.HasPrefix(version, prefix+".") ||
		strings.HasPrefix(version, prefix+"-") || strings.HasPrefix(version, prefix+"+")
}
