package bsdiff_test

import (
	"fmt"

	"github.com/flipside-linux/flipside/payload/bsdiff"
)

func ExampleApply() {
	old, want := []byte("the quick brown fox jumps over the lazy dog"), []byte("the quick brown cat jumps over the lazy dog")
	patch, err := bsdiff.Diff(old, want).Classic()
	if err != nil {
		fmt.Println(err)
		return
	}
	got := make([]byte, len(want)) // the size comes from elsewhere; a patch that makes another one is refused
	err = bsdiff.Apply(got, old, patch)
	fmt.Println(string(got), err)
	// Output: the quick brown cat jumps over the lazy dog <nil>
}
