package payload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// FileSource reads a payload from a file.
type FileSource struct {
	path string
	size int64
}

// NewFileSource looks at a payload file.
func NewFileSource(path string) (*FileSource, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, err)
	}
	return &FileSource{path, info.Size()}, nil
}

// Size is the length of the file in bytes.
func (s *FileSource) Size() int64 { return s.size }

// Open opens the file at an offset.
func (s *FileSource) Open(_ context.Context, offset int64) (io.ReadCloser, error) {
	f, err := os.Open(s.path)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
