package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
)

// ErrFrame means that what came is not what the two ends have agreed on.
var ErrFrame = errors.New("what came over the socket is no frame of the protocol")

// Kind is what a frame is. 0 is none.
type Kind uint8

const headSize = 20

// Head is the beginning of a frame. What the two ends have no use for is 0.
type Head struct {
	Kind Kind
	Part uint8
	ID   uint32 // of a call, and of the reply to it
	Off  int64
	Size uint32 // of the body
}

// Append adds the head as it is sent.
func (h Head) Append(b []byte) []byte {
	b = append(b, byte(h.Kind), h.Part, 0, 0)
	b = binary.BigEndian.AppendUint32(b, h.ID)
	b = binary.BigEndian.AppendUint64(b, uint64(h.Off))
	return binary.BigEndian.AppendUint32(b, h.Size)
}

// ReadHead reads the head of the next frame, whose body may have limit bytes, and is for the caller to read. Its error is io.EOF if there is no other frame.
func ReadHead(r io.Reader, limit uint32) (Head, error) {
	var b [headSize]byte
	if _, err := io.ReadFull(r, b[:]); err == io.EOF {
		return Head{}, err
	} else if err != nil {
		return Head{}, fmt.Errorf("reading the head of a frame: %w", err)
	}
	h := Head{Kind(b[0]), b[1], binary.BigEndian.Uint32(b[4:]), int64(binary.BigEndian.Uint64(b[8:])), binary.BigEndian.Uint32(b[16:])}
	switch {
	case h.Kind == 0 || b[2] != 0 || b[3] != 0:
		return Head{}, fmt.Errorf("%w: its head is %x", ErrFrame, b)
	case h.Size > limit:
		return Head{}, fmt.Errorf("%w: a frame of kind %d has %d bytes, of at most %d", ErrFrame, h.Kind, h.Size, limit)
	}
	return h, nil
}

// Read reads a whole frame, whose body may have limit bytes. Its error is io.EOF if there is no other frame.
func Read(r io.Reader, limit uint32) (Head, []byte, error) {
	h, err := ReadHead(r, limit)
	if err != nil {
		return Head{}, nil, err
	}
	body := make([]byte, h.Size)
	if err := h.ReadBody(r, body); err != nil {
		return Head{}, nil, err
	}
	return h, body, nil
}

// ReadBody reads the body of the frame that h is the head of, of which b has the size.
func (h Head) ReadBody(r io.Reader, b []byte) error {
	if _, err := io.ReadFull(r, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // in the middle of a frame
		}
		return fmt.Errorf("reading the %d bytes of a frame of kind %d: %w", len(b), h.Kind, err)
	}
	return nil
}

// Send sends a frame. Where several goroutines send, one has to wait for the other.
func Send(conn net.Conn, h Head, body []byte) error {
	h.Size = uint32(len(body))
	all := net.Buffers{h.Append(make([]byte, 0, headSize)), body}
	_, err := all.WriteTo(conn)
	return err
}

// Decode reads the one JSON value that b is.
func Decode(b []byte, to any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return fmt.Errorf("%w: %w", ErrFrame, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("%w: something follows the JSON", ErrFrame)
	}
	return nil
}
