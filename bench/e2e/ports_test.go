package e2e

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// dialAgain connects from a port of A, as soon as the kernel there allows it.
func (b *bed) dialAgain(from *net.TCPAddr, ln net.Listener) (c net.Conn, err error) {
	b.t.Helper()
	b.eventually("the port is free", func() (string, bool) {
		err = b.path.A.NS.Do(func() (err error) {
			d := net.Dialer{LocalAddr: from, Control: func(_, _ string, rc syscall.RawConn) error {
				var serr error
				if err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }); err != nil {
					return err
				}
				return serr
			}}
			d.SetMultipathTCP(false)
			c, err = d.DialContext(b.ctx, "tcp", ln.Addr().String())
			return err
		})
		return "", !errors.Is(err, unix.EADDRNOTAVAIL)
	})
	return c, err
}

// once opens a connection from a port of A, has a byte echoed, and ends it: the
// server when it is told to, else the client first.
func (b *bed) once(from *net.TCPAddr, ln net.Listener, serverFirst bool) error {
	b.t.Helper()
	c, err := b.dialAgain(from, ln)
	if err != nil {
		return err
	}
	defer c.Close()
	word := []byte{'c'}
	if serverFirst {
		word[0] = 's'
	}
	if _, err := c.Write(word); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, word); err != nil {
		return err
	}
	if serverFirst {
		_, err = io.ReadAll(c)
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err = io.ReadAll(c)
	return err
}

// obedient is a server that echoes a byte, and then closes at once or after its
// client, as the byte says.
func (b *bed) obedient() net.Listener {
	b.t.Helper()
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var word [1]byte
				if _, err := io.ReadFull(c, word[:]); err != nil {
					return
				}
				_, _ = c.Write(word[:])
				if word[0] == 'c' {
					_, _ = io.Copy(io.Discard, c)
				}
			}()
		}
	}()
	return ln
}

// The same ports again while one of the kernels keeps the last connection in
// TIME_WAIT, the server's or the client's: the SYN has a later sequence number
// and time stamp, which the kernel takes for a new connection, and so do the
// daemons, which still linger. All are encrypted, none waits.
func TestPortReuseTimeWait(t *testing.T) {
	for _, serverFirst := range []bool{true, false} {
		t.Run(map[bool]string{true: "of the server", false: "of the client"}[serverFirst], func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a, z := b.both()
			if err := errors.Join(b.path.A.NS.Sysctl("net/ipv4/tcp_tw_reuse", "1"), b.path.A.NS.Sysctl("net/ipv4/tcp_tw_reuse_delay", "1")); err != nil {
				t.Fatal(err)
			}
			ln := b.obedient()
			from := &net.TCPAddr{IP: b.path.A.Addr4().AsSlice(), Port: 45679}
			const n = 20
			for i := range n {
				if err := b.once(from, ln, serverFirst); err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
			}
			b.encryptedOnly(a, z, n-1)
			if n := b.resent(b.path.A.NS); n > 2 {
				t.Errorf("%d SYNs were retransmitted", n)
			}
		})
	}
}

// A client that forgot the connection, its reset having been lost, opens it again
// from the same port: its SYN meets a live flow, is challenged, and the reset that
// answers the challenge makes room for the new connection.
func TestPortReuseForgotten(t *testing.T) {
	var deaf atomic.Bool
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: func(d lab.Dir, f []byte) lab.Verdict {
		var s packet.Segment
		if deaf.Load() && packet.Parse(f, packet.FromOuter, &s) == nil && s.Flags&packet.RST != 0 {
			return lab.Drop
		}
		return lab.Pass
	}})
	a, z := b.both()
	ln := b.echo()
	from := &net.TCPAddr{IP: b.path.A.Addr4().AsSlice(), Port: 45680}
	for i := range 5 {
		c, err := b.path.A.NS.DialFrom(b.ctx, "tcp", from, ln.Addr().String())
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		b.guarded(c)
		b.echoed(c, stream(uint64(i), 5000))
		if f, g := b.flow(a), b.flow(z); f.SessionID != g.SessionID {
			t.Errorf("connection %d: session IDs %s and %s", i, f.SessionID, g.SessionID)
		}
		deaf.Store(true)
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
		b.noFlows(a)
		deaf.Store(false)
	}
	b.encryptedOnly(a, z, 4)
}
