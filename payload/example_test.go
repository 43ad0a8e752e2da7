package payload_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
)

// Apply a payload to a file, keep checkpoints, and read back what was written.
func Example() {
	if err := example(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// full payload of major version 2
	// usr: 1048576 bytes, written and proven
}

func example() error {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// Somebody makes a payload and signs it.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	var release bytes.Buffer
	image := bytes.Repeat([]byte("a file system "), 1<<20)[:1<<20]
	if _, err := build.Full(context.Background(), &release, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(image), Size: int64(len(image))}}, Keys: []crypto.Signer{key}, TempDir: dir,
	}); err != nil {
		return err
	}
	file := filepath.Join(dir, "release.payload")
	if err := os.WriteFile(file, release.Bytes(), 0o600); err != nil {
		return err
	}

	// Somebody else has the public key, and applies it.
	keys := &payload.Keyring{}
	if err := keys.Add(key.Public()); err != nil {
		return err
	}
	src, err := payload.NewFileSource(file)
	if err != nil {
		return err
	}
	p, err := payload.Open(context.Background(), src, payload.Options{Keys: keys})
	if err != nil {
		return err
	}
	kind := "full"
	if p.Delta() {
		kind = "delta"
	}
	fmt.Printf("%s payload of major version %d\n", kind, p.Major)
	slot, err := os.Create(filepath.Join(dir, "slot"))
	if err != nil {
		return err
	}
	defer slot.Close()
	target := payload.NewFileTarget(slot)
	defer target.Close()
	if err := p.Apply(context.Background(), payload.ApplyOptions{
		Targets:    map[string]payload.Target{"usr": target},
		Checkpoint: func(payload.Checkpoint) error { return nil }, // keep it, and give it as Resume after a crash
	}); err != nil {
		return err
	}
	usr := p.Partitions[0]
	if err := target.Verify(context.Background(), usr.Size, usr.SHA256); err != nil {
		return err
	}
	fmt.Printf("%s: %d bytes, written and proven\n", usr.Name, usr.Size)
	return nil
}

// Look at a payload that nobody has vouched for. What it says is a claim, and cannot be applied.
func ExampleInspect() {
	_, err := payload.Inspect(context.Background(), &memory{data: []byte("something else altogether"), limit: -1})
	fmt.Println(err)
	// Output: malformed payload: it begins with "some", not with "CrAU"
}
