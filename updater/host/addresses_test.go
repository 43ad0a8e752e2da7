package host

import (
	"errors"
	"slices"
	"testing"
)

// An address that failed comes last the next time, and is forgiven when it does well.
func TestAddresses(t *testing.T) {
	var a addresses
	urls := []string{"https://a/x", "https://b/x", "https://c/x"}
	a.failed("https://a/x", errors.New("connection refused"))
	if got := a.order(urls); !slices.Equal(got, []string{"https://b/x", "https://c/x", "https://a/x"}) {
		t.Errorf("order is %v", got)
	}
	a.failed("https://a/x", errors.New("connection refused"))
	a.failed("https://b/x", errors.New("connection refused"))
	if got := a.order(urls); !slices.Equal(got, []string{"https://c/x", "https://b/x", "https://a/x"}) {
		t.Errorf("order is %v", got)
	}
	a.well("https://a/x")
	if got := a.order(urls); !slices.Equal(got, []string{"https://a/x", "https://c/x", "https://b/x"}) {
		t.Errorf("order is %v", got)
	}
}
