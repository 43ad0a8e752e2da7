package main

import (
	"bytes"
	"debug/pe"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// image is what a unified kernel image holds (UAPI specification 5): sections of a PE file.
type image struct {
	Kernel, Initrd []byte
	CommandLine    string
}

// Limits on a kernel image: it is read whole, in a machine that may be small.
const (
	maxKernel = 128 << 20 // bytes, of each section
	maxLine   = 2047      // bytes of the command line, what x86 takes
)

// readImage reads a unified kernel image.
func readImage(f *os.File) (image, error) {
	var im image
	p, err := pe.NewFile(f)
	if err != nil {
		return im, fmt.Errorf("%s is not a unified kernel image: %w", f.Name(), err)
	}
	section := func(name string, max uint32) ([]byte, error) {
		s := p.Section(name)
		if s == nil {
			return nil, nil
		}
		// The size in the file is rounded up; what is meant is in VirtualSize.
		size := min(s.VirtualSize, s.Size)
		if size > max {
			return nil, fmt.Errorf("section %s of %s has %d bytes, more than %d", name, f.Name(), size, max)
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(s.Open(), data); err != nil {
			return nil, fmt.Errorf("section %s of %s: %w", name, f.Name(), err)
		}
		return data, nil
	}
	line, err := section(".cmdline", maxLine)
	if err != nil {
		return im, err
	}
	im.CommandLine = strings.TrimSpace(string(bytes.TrimRight(line, "\x00\n")))
	if im.Initrd, err = section(".initrd", maxKernel); err != nil {
		return im, err
	}
	if im.Kernel, err = section(".linux", maxKernel); err != nil {
		return im, err
	}
	if len(im.Kernel) == 0 {
		return im, errors.New(f.Name() + " holds no kernel: it has no section .linux")
	}
	return im, nil
}
