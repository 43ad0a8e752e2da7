package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
)

// Frames arrive as they were sent, one after the other, and then comes the end.
func TestFrames(t *testing.T) {
	near, conn, err := Ends()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	want := []struct {
		head Head
		body []byte
	}{
		{Head{Kind: 1}, nil},
		{Head{Kind: 255, Part: 2, ID: 1<<32 - 1, Off: -1}, bytes.Repeat([]byte("x"), 1000)},
		{Head{Kind: 3, Off: 1 << 40}, []byte("abc")},
	}
	for _, w := range want {
		if err := Send(near, w.head, w.body); err != nil {
			t.Fatal(err)
		}
	}
	near.Close()
	for _, w := range want {
		w.head.Size = uint32(len(w.body))
		h, body, err := Read(conn, 1000)
		if err != nil || h != w.head || !bytes.Equal(body, w.body) {
			t.Errorf("%+v with %d bytes, %v; want %+v with %d", h, len(body), err, w.head, len(w.body))
		}
	}
	if _, _, err := Read(conn, 1000); err != io.EOF {
		t.Errorf("after the last one: %v", err)
	}
}

// What is no frame is refused, by its head alone where that is enough.
func TestNoFrame(t *testing.T) {
	whole := append(Head{Kind: 7, Size: 3}.Append(nil), "abc"...)
	for _, tt := range []struct {
		what string
		data []byte
		is   error
		says string
	}{
		{"nothing", nil, io.EOF, "EOF"},
		{"half a head", whole[:headSize/2], io.ErrUnexpectedEOF, "the head of a frame"},
		{"a head alone", whole[:headSize], io.ErrUnexpectedEOF, "the 3 bytes of a frame of kind 7"},
		{"half a body", whole[:headSize+1], io.ErrUnexpectedEOF, "the 3 bytes of a frame of kind 7"},
		{"text", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), ErrFrame, "its head is 474554"},
		{"zeros", make([]byte, 100), ErrFrame, "its head is 000000"},
		{"a huge body", Head{Kind: 7, Size: 1<<32 - 1}.Append(nil), ErrFrame, "kind 7 has 4294967295 bytes, of at most 3"},
		{"a byte too many", append(Head{Kind: 7, Size: 4}.Append(nil), "abcd"...), ErrFrame, "kind 7 has 4 bytes, of at most 3"},
	} {
		if _, _, err := Read(bytes.NewReader(tt.data), 3); !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want one that says %q", tt.what, err, tt.says)
		}
	}
	if h, body, err := Read(bytes.NewReader(whole), 3); err != nil || h.Kind != 7 || string(body) != "abc" {
		t.Errorf("the whole: %+v, %q, %v", h, body, err)
	}
}

// One JSON value, and nothing that is unknown or beside it.
func TestDecode(t *testing.T) {
	for text, ok := range map[string]bool{
		`{"do":"arm"}`: true, " {\"do\":\"arm\"}\n": true, `{}`: true,
		``: false, `[]`: false, `abc`: false, `{"do":1}`: false, `{"do":"arm","wherever":"all"}`: false, `{"do":"arm"}{"do":"arm"}`: false, `{"do":"arm"} x`: false,
	} {
		var v struct {
			Do string `json:"do"`
		}
		if err := Decode([]byte(text), &v); (err == nil) != ok || err != nil && !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// What is written at once to a socket that keeps it together is read at once.
func TestPackets(t *testing.T) {
	near, far, err := Packets()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	conn, err := Conn(far)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	b := make([]byte, 100)
	near.Write([]byte("abc"))
	near.Write([]byte("de"))
	for _, want := range []string{"abc", "de"} {
		if n, err := conn.Read(b); err != nil || string(b[:n]) != want {
			t.Errorf("%q, %v, want %q", b[:n], err, want)
		}
	}
}

// Only a socket of this machine is taken over, and its file is closed in any case.
func TestConn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	tcp, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	for what, f := range map[string]*os.File{"a connection of TCP": tcp, "a file": plain} {
		if _, err := Conn(f); err == nil {
			t.Errorf("%s is taken over", what)
		}
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s is still open: %v", what, err)
		}
	}
}

// Whatever comes: what is taken for a frame is what Send makes of it again, and no body is longer than was allowed.
func FuzzRead(f *testing.F) {
	const limit = 64
	f.Add(append(Head{Kind: 1, Size: 2}.Append(nil), "{}"...))
	f.Add(append(Head{Kind: 3, Part: 1, ID: 4, Off: 1 << 33, Size: limit}.Append(nil), make([]byte, limit)...))
	f.Add(Head{Kind: 2, Size: limit + 1}.Append(nil))
	f.Add(make([]byte, headSize))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		for {
			at := len(data) - r.Len()
			h, body, err := Read(r, limit)
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFrame) {
					t.Errorf("an error of no kind: %v", err)
				}
				return
			}
			if len(body) > limit {
				t.Errorf("a body of %d bytes", len(body))
			}
			if again := append(h.Append(nil), body...); !bytes.Equal(again, data[at:len(data)-r.Len()]) {
				t.Errorf("%x is read as %+v, which is %x", data[at:len(data)-r.Len()], h, again)
			}
		}
	})
}
