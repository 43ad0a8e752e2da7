package omaha

import (
	"errors"
	"fmt"
	"time"
)

// Error is a check or report that brought no usable answer. State is kept and the caller tries again later.
type Error struct {
	Op         string        // what was tried: "update check" or "event report"
	URL        string        // the server's address, without credentials
	Code       int           // update_engine's number for it, as an event 3/0 would carry it
	RetryAfter time.Duration // how long the server asks us to stay away, clamped to [MinPoll, MaxPoll]; 0 when it did not say
	Err        error
}

func (e *Error) Error() string { return fmt.Sprintf("omaha: %s at %q: %v", e.Op, e.URL, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Kinds of failure that callers ask for with errors.Is.
var (
	ErrHTML     = errors.New("an HTML page instead of an answer") // a login page, a proxy's error, a web server's index
	ErrResponse = errors.New("the answer breaks the protocol")
	ErrConfig   = errors.New("the client is not configured well") // nothing was sent
	ErrChanged  = errors.New("the payload changed during the download")
	ErrTooSlow  = errors.New("the transfer is slower than the minimum rate")
	ErrSize     = errors.New("the payload has another size than announced")
	ErrRedirect = errors.New("refused redirect")
)

// codeError gives an error its number in update_engine's list.
type codeError struct {
	code int
	err  error
}

func (e *codeError) Error() string { return e.err.Error() }
func (e *codeError) Unwrap() error { return e.err }

// invalid is an answer that can be read and must not be believed.
func invalid(format string, args ...any) error {
	return &codeError{CodeResponseInvalid, fmt.Errorf("%w: "+format, append([]any{ErrResponse}, args...)...)}
}

// Code returns update_engine's error number for err: what an event 3/0 about it carries.
func Code(err error) int {
	var e *Error
	var c *codeError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e.Code != 0:
		return e.Code
	case errors.As(err, &c):
		return c.code
	case errors.Is(err, ErrSize):
		return CodePayloadSize
	}
	return CodeTransfer
}
