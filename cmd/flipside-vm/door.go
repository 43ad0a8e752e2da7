package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// A door is the address of the release server for one machine, so that it is known what this machine has fetched.
type door struct {
	handler http.Handler
	server  *http.Server

	mu   sync.Mutex
	asks int // payload requests under way
}

// guest is a listener for machines: QEMU's user network has this machine's loopback interface at 10.0.2.2, and the release server names the address that
// the client has connected to.
type guest struct{ net.Listener }

type guestConn struct{ net.Conn }

func (g guest) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return guestConn{c}, nil
}

func (c guestConn) LocalAddr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(10, 0, 2, 2), Port: c.Conn.LocalAddr().(*net.TCPAddr).Port}
}

// openDoor makes the machine's address of the release server.
func (m *machine) openDoor() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	m.url = fmt.Sprintf("http://10.0.2.2:%d/v1/update/", l.Addr().(*net.TCPAddr).Port)
	m.door = &door{handler: m.lab.server}
	m.door.server = &http.Server{Handler: m.door, ReadHeaderTimeout: 10 * time.Second}
	go m.door.server.Serve(guest{l})
	return nil
}

func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/payloads/") {
		d.count(1)
		defer d.count(-1)
	}
	d.handler.ServeHTTP(w, r)
}

func (d *door) count(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asks += n
}

// sending reports whether a payload is on its way.
func (d *door) sending() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asks > 0
}

func (d *door) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if d.server.Shutdown(ctx) != nil {
		d.server.Close()
	}
}
