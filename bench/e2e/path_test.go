package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// Small, ordinary and jumbo MTUs, above and below what one buffer holds.
func TestMTU(t *testing.T) {
	for _, mtu := range []int{1280, 2000, 9000} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			eachIP(t, func(t *testing.T, v6 bool) {
				b := newBed(t, lab.Options{MTU: mtu}, lab.ForwarderOptions{})
				a, z := b.both()
				if err := b.exchange(v6, stream(1, 5<<20), stream(2, 5<<20), func() { b.flow(a); b.flow(z) }); err != nil {
					t.Fatal(err)
				}
				if plain, _ := b.wire.seen(); plain != 0 {
					t.Errorf("%d segments with plaintext on the wire", plain)
				}
			})
		})
	}
}

// dialOption connects from A to a listener on B with a socket option set.
func (b *bed) dialOption(ln net.Listener, level, name, value int) (net.Conn, error) {
	var c net.Conn
	err := b.path.A.NS.Do(func() (err error) {
		d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
			var serr error
			if err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), level, name, value) }); err != nil {
				return err
			}
			return serr
		}}
		d.SetMultipathTCP(false)
		c, err = d.DialContext(b.ctx, "tcp", ln.Addr().String())
		return err
	})
	return c, err
}

// A SYN with Fast Open is left alone: plain TCP, and the reason is kept.
func TestFastOpen(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A)
	b.daemon(b.path.B)
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	want := make([]byte, 100000)
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if err == nil && !bytes.Equal(got, want) {
			err = errors.New("other data arrived")
		}
		served <- err
	}()
	c, err := b.dialOption(ln, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if st := b.stats(a); st.Reasons[slowpath.ReasonOptionConflict] != 1 || st.Reasons[fastpath.ReasonClosed] != 0 {
		t.Errorf("reasons %v, want %s", st.Reasons, slowpath.ReasonOptionConflict)
	}
}

// To a server whose receive buffer is smaller than a segment the kernel sends
// segments that its windows hold, because it never saw a larger one, and as small
// they arrive. It would let each of the others wait for a timer.
func TestTinyReceiveBuffer(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
		a, z := b.both()
		ip, _ := b.addr(v6)
		ln := b.listenOption(ip.String(), unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
		// What Linux makes of that, and the largest window.
		const buffer = 2304 / 2
		for i := range uint64(2) { // afresh and resumed
			c, s, err := b.connectTo(ln, ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			defer s.Close()
			// Small frames first: what they take beside data is not there for
			// the large ones.
			for range 100 {
				if err := swap(c, s, stream(i, 5), stream(i, 5)); err != nil {
					t.Fatal(err)
				}
			}
			if err := swap(c, s, stream(i, 50_000), stream(i+2, 50_000)); err != nil {
				t.Fatal(err)
			}
			if n := tcpInfo(t, c).Snd_mss; n > buffer {
				t.Errorf("connection %d: segments of %d bytes for a window of %d", i, n, buffer)
			}
			if n := tcpInfo(t, s).Rcv_mss; n > buffer/2 {
				t.Errorf("connection %d: received in segments of %d bytes, with a window of %d", i, n, buffer)
			}
			if err := carry(c, s, stream(i+4, 100), stream(i+6, 100)); err != nil {
				t.Error(err)
			}
		}
		b.idle(a, z)
		b.encryptedOnly(a, z, 2)
	})
}

// listenOption listens on B at an address, with a socket option set.
func (b *bed) listenOption(ip string, level, name, value int) (ln net.Listener) {
	b.t.Helper()
	err := b.path.B.NS.Do(func() (err error) {
		lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
			var serr error
			if err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), level, name, value) }); err != nil {
				return err
			}
			return serr
		}}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(b.ctx, "tcp", net.JoinHostPort(ip, "0"))
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { ln.Close() })
	return ln
}

// A server that never accepts in time, and one that waits for data before it
// accepts (TCP_DEFER_ACCEPT), are served like any other (T18).
func TestDeferAccept(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.listenOption(b.path.B.Addr4().String(), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 5)
	msg := stream(9, 50000)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	for range 3 {
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if _, err := c.Write(msg); err == nil {
				_ = c.(*net.TCPConn).CloseWrite()
			}
		}()
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, msg) {
			t.Fatalf("echoed %d of %d bytes: %v", len(got), len(msg), err)
		}
		c.Close()
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 3)
}

// A connection to a closed port is refused at once, and one whose server resets
// it is reset.
func TestRefusedAndReset(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	if c, err := b.path.A.NS.Dial(b.ctx, "tcp", net.JoinHostPort(b.path.B.Addr4().String(), "9")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect to a closed port: %v, %v", c, err)
	}
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}()
	// The reset may come before connect has returned.
	c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
	if err == nil {
		defer c.Close()
		_, err = io.ReadAll(c)
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a connection that its server resets ends with %v", err)
	}
	b.noFlows(a)
	b.noFlows(z)
}

// Connections on a VLAN are encrypted like others, each with its tag.
func TestVLAN(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	va, err := b.path.A.AddVLAN(7, netip.MustParsePrefix("10.250.7.1/24"), netip.MustParsePrefix("fd07::1/64"))
	if err != nil {
		t.Fatal(err)
	}
	vb, err := b.path.B.AddVLAN(7, netip.MustParsePrefix("10.250.7.2/24"), netip.MustParsePrefix("fd07::2/64"))
	if err != nil {
		t.Fatal(err)
	}
	a, z := b.both()
	c := *b
	c.path = &lab.Path{A: va, B: vb}
	eachIP(t, func(t *testing.T, v6 bool) {
		err := c.exchange(v6, stream(1, 3<<20), stream(2, 3<<20), func() {
			if f := b.flow(a); f.VLAN != 7 {
				t.Errorf("flow %+v, want VLAN 7", f)
			}
			b.flow(z)
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	b.noFlows(a)
	b.encryptedOnly(a, z, 2)
}

// Two queues on each host, all bound, all served.
func TestQueues(t *testing.T) {
	b := newBed(t, lab.Options{Queues: 2}, lab.ForwarderOptions{})
	a, z := b.both()
	st, err := a.Status(b.ctx)
	if err != nil || len(st.Queues) != 2 {
		t.Fatalf("status %+v: %v", st, err)
	}
	for i := range 8 {
		if err := b.exchange(i%2 == 1, stream(1, 1<<20), stream(2, 1<<20), nil); err != nil {
			t.Fatal(err)
		}
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 8)
}
