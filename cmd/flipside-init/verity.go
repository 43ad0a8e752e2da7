package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// superblock describes a hash tree of dm-verity, version 1 (cryptsetup's on-disk format, as veritysetup writes it).
type superblock struct {
	DataBlock, HashBlock uint32 // bytes
	Blocks               uint64 // of data
	Algorithm            string
	Salt                 []byte
}

func parseSuperblock(b []byte) (superblock, error) {
	le := binary.LittleEndian
	switch {
	case len(b) < 512 || !bytes.Equal(b[:8], []byte("verity\x00\x00")):
		return superblock{}, errors.New("no superblock of dm-verity")
	case le.Uint32(b[8:]) != 1 || le.Uint32(b[12:]) != 1:
		return superblock{}, fmt.Errorf("superblock version %d, hash type %d; only 1 and 1 are known", le.Uint32(b[8:]), le.Uint32(b[12:]))
	}
	s := superblock{DataBlock: le.Uint32(b[64:]), HashBlock: le.Uint32(b[68:]), Blocks: le.Uint64(b[72:])}
	s.Algorithm = string(bytes.TrimRight(b[32:64], "\x00"))
	n := int(le.Uint16(b[80:]))
	switch {
	case n > 256:
		return superblock{}, fmt.Errorf("salt of %d bytes", n)
	case s.Algorithm != "sha256":
		return superblock{}, fmt.Errorf("hash algorithm %q, want sha256", s.Algorithm)
	case !blockSize(s.DataBlock) || !blockSize(s.HashBlock) || s.Blocks == 0 || s.Blocks > 1<<40:
		return superblock{}, fmt.Errorf("%d blocks of %d bytes, hashed in blocks of %d bytes", s.Blocks, s.DataBlock, s.HashBlock)
	}
	s.Salt = bytes.Clone(b[88 : 88+n])
	return s, nil
}

func blockSize(n uint32) bool { return n >= 512 && n <= 65536 && n&(n-1) == 0 }

// parseHash reads HASH@BYTE: the root hash and where the superblock is.
func parseHash(s string) (root string, offset int64, err error) {
	root, at, ok := strings.Cut(s, "@")
	if b, err := hex.DecodeString(root); err != nil || len(b) != 32 || !ok {
		return "", 0, fmt.Errorf("flipside.usrhash=%q is not the SHA-256 of a hash tree, @, and where it begins", s)
	}
	offset, err = strconv.ParseInt(at, 10, 64)
	if err != nil || offset <= 0 || offset%4096 != 0 {
		return "", 0, fmt.Errorf("flipside.usrhash=%q: the hash tree begins at %q", s, at)
	}
	return root, offset, nil
}

// table is the parameter line of the kernel's verity target (Documentation/admin-guide/device-mapper/verity.rst). A block that does not
// verify stops the machine: what runs on is what was signed, or nothing.
func (s superblock) table(device, root string, offset int64) string {
	salt := "-"
	if len(s.Salt) > 0 {
		salt = hex.EncodeToString(s.Salt)
	}
	return fmt.Sprintf("1 %s %s %d %d %d %d %s %s %s 1 panic_on_corruption",
		device, device, s.DataBlock, s.HashBlock, s.Blocks, offset/int64(s.HashBlock)+1, s.Algorithm, root, salt)
}

// readSuperblock reads what is at a place of a device, and holds it against the place.
func readSuperblock(f *os.File, offset int64) (superblock, error) {
	block := make([]byte, 512)
	if _, err := io.ReadFull(io.NewSectionReader(f, offset, 512), block); err != nil {
		return superblock{}, fmt.Errorf("reading the superblock at byte %d: %w", offset, err)
	}
	s, err := parseSuperblock(block)
	if err != nil {
		return superblock{}, fmt.Errorf("at byte %d: %w", offset, err)
	}
	if uint64(offset)%uint64(s.HashBlock) != 0 || uint64(offset) < s.Blocks*uint64(s.DataBlock) {
		return superblock{}, fmt.Errorf("the hash tree at byte %d lies in %d blocks of data", offset, s.Blocks)
	}
	return s, nil
}

// rootOf returns the root hash of the tree on a device, whose top is the block after the superblock's.
func rootOf(device string, offset int64) (string, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	s, err := readSuperblock(f, offset)
	if err != nil {
		return "", err
	}
	top := make([]byte, s.HashBlock)
	if _, err := io.ReadFull(io.NewSectionReader(f, offset+int64(s.HashBlock), int64(s.HashBlock)), top); err != nil {
		return "", fmt.Errorf("reading the hash tree at byte %d: %w", offset, err)
	}
	h := sha256.New()
	h.Write(s.Salt)
	h.Write(top)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// setupVerity makes a device of name that reads from another one what the root hash vouches for.
func setupVerity(device, name, hash string) (string, error) {
	root, offset, err := parseHash(hash)
	if err != nil {
		return "", err
	}
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	s, err := readSuperblock(f, offset)
	if err != nil {
		return "", err
	}
	return mapDevice(name, "verity", s.Blocks*uint64(s.DataBlock)/512, s.table(device, root, offset))
}

// The device mapper's ioctl interface, version 4 (include/uapi/linux/dm-ioctl.h).
const (
	dmHeader   = 312 // bytes of struct dm_ioctl
	dmTarget   = 40  // bytes of struct dm_target_spec
	dmCreate   = 3
	dmRemove   = 4
	dmSuspend  = 6 // resumes, without the flag that says suspend
	dmLoad     = 9
	dmReadOnly = 1
)

// mapDevice makes a read-only mapped device of one target.
func mapDevice(name, target string, sectors uint64, params string) (string, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer control.Close()
	call := func(nr uintptr, flags uint32, targets uint32, data []byte) ([]byte, error) {
		b := make([]byte, dmHeader+len(data))
		le := binary.LittleEndian
		le.PutUint32(b, 4)
		le.PutUint32(b[12:], uint32(len(b)))
		le.PutUint32(b[16:], dmHeader)
		le.PutUint32(b[20:], targets)
		le.PutUint32(b[28:], flags)
		copy(b[48:48+127], name)
		copy(b[dmHeader:], data)
		const readWrite = 3
		code := uintptr(readWrite)<<30 | dmHeader<<16 | 0xfd<<8 | nr
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), code, uintptr(unsafe.Pointer(&b[0])))
		runtime.KeepAlive(b)
		if errno != 0 {
			return nil, errno
		}
		return b, nil
	}
	made, err := call(dmCreate, dmReadOnly, 0, nil)
	if err != nil {
		return "", fmt.Errorf("making the device %q: %w", name, err)
	}
	spec := make([]byte, (dmTarget+len(params)+1+7)/8*8)
	binary.LittleEndian.PutUint64(spec[8:], sectors)
	binary.LittleEndian.PutUint32(spec[20:], uint32(len(spec)))
	copy(spec[24:40], target)
	copy(spec[dmTarget:], params)
	if _, err := call(dmLoad, dmReadOnly, 1, spec); err != nil {
		call(dmRemove, 0, 0, nil)
		return "", fmt.Errorf("loading the table of the device %q: %w", name, err)
	}
	if _, err := call(dmSuspend, 0, 0, nil); err != nil {
		call(dmRemove, 0, 0, nil)
		return "", fmt.Errorf("starting the device %q: %w", name, err)
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(binary.LittleEndian.Uint64(made[40:]))), nil
}
