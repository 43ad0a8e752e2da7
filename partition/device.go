package partition

import "io"

// Device is the only way to touch a disk. Offsets and sizes are in bytes.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Flush is a barrier: when it returns nil, everything written before is on the medium. After an error nobody knows
	// what is, and it is not called again for the same data.
	Flush() error
	// Discard says that a range is of no interest any more. Its contents are undefined afterwards.
	Discard(off, n int64) error
	Size() int64
	SectorSize() int
}

// MediumReader is a Device that can read past every cache between it and the medium.
type MediumReader interface {
	ReadMedium(p []byte, off int64) (int, error)
}

// readMedium reads from the medium where the device can, and from the device where it cannot.
func readMedium(d Device, p []byte, off int64) (int, error) {
	if m, ok := d.(MediumReader); ok {
		return m.ReadMedium(p, off)
	}
	return d.ReadAt(p, off)
}
