package demo

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"

	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload/build"
)

// keys are the release key of the demo: the private half signs, the public half is pinned on every host.
type keys struct {
	signer crypto.Signer
	public string // path
}

func (d *show) makeKeys() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	d.key = keys{signer: key, public: d.path("release.pub.pem")}
	return os.WriteFile(d.key.public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644)
}

func (d *show) payload(r *release) string { return d.path(r.version + ".payload") }

func (d *show) makePayload(ctx context.Context, r *release) (int64, error) {
	image, err := os.Open(r.image)
	if err != nil {
		return 0, err
	}
	defer image.Close()
	out, err := os.Create(d.payload(r))
	if err != nil {
		return 0, err
	}
	res, err := build.Full(ctx, out, build.Spec{
		Images: []build.Image{{Name: "usr", Data: image, Size: imageSize}}, Keys: []crypto.Signer{d.key.signer}, TempDir: d.dir,
	})
	return res.Size, errors.Join(err, out.Close())
}

// makeDisk makes the disk of a host that was installed with release 1.0.0: USR-A holds it and is good, USR-B is empty.
func (d *show) makeDisk(ctx context.Context, path string, n int) error {
	parts := []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: uuid.NewString(), Size: 16 * mib},
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: slotSize, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: slotSize},
		{Label: "ROOT", Type: gptimage.TypeLinux, UUID: uuid.NewString(), Size: 32 * mib},
	}
	if err := gptimage.Create(path, 512, uuid.NewString(), parts); err != nil {
		return err
	}
	disk, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer disk.Close()
	image, err := os.Open(d.releases[0].image)
	if err != nil {
		return err
	}
	defer image.Close()
	if _, err := io.Copy(io.NewOffsetWriter(disk, parts[1].Start), image); err != nil {
		return err
	}
	_, err = tool(ctx, "mke2fs", "-q", "-t", "ext4", "-F", "-L", "ROOT", "-E", fmt.Sprintf("offset=%d", parts[3].Start), path, "32m")
	if err != nil {
		return err
	}
	if err != nil {
		return err
	}
	if _, missing := findTool("mkfs.vfat"); missing == nil {
		_, err = tool(ctx, "mkfs.vfat", "-n", "EFI-SYSTEM", "--offset", fmt.Sprint(parts[0].Start/512), path, fmt.Sprint(16*mib/1024))
	}
	return err
}
