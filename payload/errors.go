package payload

import "errors"

// What can be wrong with a payload, for callers to decide on.
var (
	ErrNoKey       = errors.New("no key is pinned, so no payload is accepted")
	ErrUnsigned    = errors.New("the payload is not signed")
	ErrSignature   = errors.New("no signature is by a pinned key")
	ErrMalformed   = errors.New("malformed payload")
	ErrUnsupported = errors.New("unsupported payload")
	ErrHash        = errors.New("wrong hash")
	ErrSize        = errors.New("the image does not fit")
	ErrRollback    = errors.New("the payload is older than what this host has confirmed")
	ErrProduct     = errors.New("the payload is for another product")
	ErrSource      = errors.New("reading the payload")
	ErrTarget      = errors.New("writing the image")
	ErrBase        = errors.New("the old image is not the one that the payload changes")
)

// OmahaCode returns update_engine's error number for err, which servers translate for people.
func OmahaCode(err error) int {
	for _, c := range []struct {
		err  error
		code int
	}{
		{ErrNoKey, 18}, {ErrUnsigned, 17}, {ErrSignature, 18}, {ErrRollback, 51}, {ErrProduct, 45}, {ErrUnsupported, 45}, {ErrHash, 29}, {ErrSize, 7},
		{ErrMalformed, 23}, {ErrBase, 20}, {ErrSource, 9}, {ErrTarget, 14},
	} {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return 1
}
