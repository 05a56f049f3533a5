package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// attached lists what hangs on a host's interface: XDP and tcx programs,
// qdiscs, and TAP devices.
func attached(t *testing.T, host *lab.Iface) (diversion, guard []string) {
	t.Helper()
	err := host.NS.Do(func() error {
		l, err := netlink.LinkByName(host.Name)
		if err != nil {
			return err
		}
		if x := l.Attrs().Xdp; x != nil && x.Attached {
			diversion = append(diversion, "XDP program")
		}
		for name, at := range map[string]ebpf.AttachType{"tcx ingress": ebpf.AttachTCXIngress, "tcx egress": ebpf.AttachTCXEgress} {
			r, err := link.QueryPrograms(link.QueryOptions{Target: host.Index, Attach: at})
			if err != nil {
				return err
			}
			for range r.Programs {
				diversion = append(diversion, name)
			}
		}
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "tuntap" || l.Type() == "tun" {
				diversion = append(diversion, "device "+l.Attrs().Name)
			}
		}
		qs, err := netlink.QdiscList(l)
		if err != nil {
			return err
		}
		for _, q := range qs {
			if q.Type() == "clsact" {
				guard = append(guard, "clsact qdisc")
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return diversion, guard
}

// nothingPinned fails when a daemon of the bed's lab left a pin.
func (b *bed) nothingPinned() {
	b.t.Helper()
	if found, err := daemon.Pinned(b.path.A.NS.Lab()); err != nil || len(found) != 0 {
		b.t.Errorf("pinned: %v, %v", found, err)
	}
}

// chatter is a connection whose client keeps sending.
type chatter struct {
	client, server net.Conn
	sent           chan error // how sending ended
	got            chan error // how receiving ended
}

func (b *bed) chatter(data []byte) *chatter {
	b.t.Helper()
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer ln.Close()
	return b.chatterTo(ln, data)
}

func (b *bed) chatterTo(ln net.Listener, data []byte) *chatter {
	b.t.Helper()
	c := &chatter{sent: make(chan error, 1), got: make(chan error, 1)}
	accepted := make(chan net.Conn, 1)
	go func() {
		s, err := ln.Accept()
		if err != nil {
			b.t.Error(err)
		}
		accepted <- s
	}()
	var err error
	if c.client, err = b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String()); err != nil {
		b.t.Fatal(err)
	}
	c.server = <-accepted
	b.t.Cleanup(func() { c.client.Close(); c.server.Close() })
	go func() {
		for {
			if _, err := c.client.Write(data); err != nil {
				c.sent <- err
				return
			}
		}
	}()
	go func() {
		_, err := io.Copy(io.Discard, c.server)
		c.got <- err
	}()
	return c
}

func (b *bed) ends(what string, ch <-chan error) error {
	b.t.Helper()
	select {
	case err := <-ch:
		return err
	case <-time.After(60 * time.Second):
		b.t.Fatalf("%s did not end", what)
		return nil
	}
}

// A killed daemon: plain connections go on, new ones are plain, nothing of the
// diversion is left, and no plaintext of the encrypted connection leaves. The
// next daemon starts at once and ends that connection (T22).
func TestKilled(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	flags := []string{"--exclude-ports", "5555"}
	a, z := b.daemon(b.path.A, flags...), b.daemon(b.path.B, flags...)

	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "5555"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	quiet := bytes.Repeat([]byte{0}, 1000) // no canary on the plain connection
	plain := b.chatterTo(ln, quiet)
	secret := b.chatter(canary)
	b.eventually("the encrypted connection carries data", func() (string, bool) {
		f, err := a.Flow(b.ctx)
		return "", err == nil && f.BytesOut > 100000
	})
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	if d, g := attached(t, b.path.A); len(d) != 0 || len(g) == 0 {
		t.Errorf("after the kill are attached: %v, guard %v", d, g)
	}
	// New connections are plain, and work.
	if err := b.exchange(false, quiet, quiet, nil); err != nil {
		t.Errorf("new connection after the kill: %v", err)
	}
	select {
	case err := <-plain.sent:
		t.Errorf("the plain connection ended: %v", err)
	case err := <-plain.got:
		t.Errorf("the plain connection ended: %v", err)
	default:
	}
	// Long enough for several retransmissions of the kernel, which would be
	// plaintext.
	wait, cancel := context.WithTimeout(b.ctx, 1500*time.Millisecond)
	<-wait.Done()
	cancel()
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext of an encrypted connection on the wire", n)
	}

	a = b.daemon(b.path.A, flags...)
	if err := b.ends("the orphaned connection's sender", secret.sent); err == nil {
		t.Error("the orphaned connection's sender saw no error")
	}
	if err := b.ends("the orphaned connection's receiver", secret.got); err == nil {
		t.Error("the orphaned connection's receiver saw an end of file, not an error")
	}
	if st, err := a.Status(b.ctx); err != nil || st.Ended != 1 {
		t.Errorf("the new daemon ended %d connections, want 1: %v", st.Ended, err)
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext of an encrypted connection on the wire", n)
	}
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a) }); err != nil {
		t.Errorf("encrypted connection with the new daemon: %v", err)
	}
	plain.client.Close()
	if err := errors.Join(a.Stop(), z.Stop()); err != nil {
		t.Error(err)
	}
	for _, host := range []*lab.Iface{b.path.A, b.path.B} {
		if d, g := attached(t, host); len(d)+len(g) != 0 {
			t.Errorf("after the stop are attached on %s: %v %v", host.NS.ShortName(), d, g)
		}
	}
	b.nothingPinned()
}

// SIGTERM drains, aborts what is left, and leaves nothing behind.
func TestTerminated(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, "--drain-timeout", "300ms")
	z := b.daemon(b.path.B)
	secret := b.chatter(canary)
	b.eventually("the encrypted connection carries data", func() (string, bool) {
		f, err := a.Flow(b.ctx)
		return "", err == nil && f.BytesOut > 100000
	})
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
		t.Errorf("after SIGTERM are attached: %v %v", d, g)
	}
	if err := b.ends("the sender", secret.sent); err == nil {
		t.Error("the sender saw no error")
	}
	if err := b.ends("the receiver", secret.got); err == nil {
		t.Error("the receiver saw an end of file, not an error")
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
	b.noFlows(z)
	if err := b.exchange(false, make([]byte, 1000), make([]byte, 1000), nil); err != nil {
		t.Errorf("plain connection afterwards: %v", err)
	}
	if err := z.Stop(); err != nil {
		t.Error(err)
	}
}

// A daemon that hangs is noticed: new connections are plain, the encrypted one
// waits without a leak, and goes on with the daemon.
func TestHung(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A)
	b.daemon(b.path.B)
	secret := b.chatter(canary)
	moved := func(least uint64) {
		b.eventually("the encrypted connection carries data", func() (string, bool) {
			f, err := a.Flow(b.ctx)
			return "", err == nil && f.BytesOut > least
		})
	}
	moved(100000)
	b.halt(a)
	b.eventually("new connections are plain", func() (string, bool) {
		ctx, cancel := context.WithTimeout(b.ctx, 2*time.Second)
		defer cancel()
		c := *b
		c.ctx = ctx
		err := c.exchange(false, make([]byte, 1000), make([]byte, 1000), nil)
		if err != nil {
			return err.Error(), false
		}
		return "", true
	})
	b.resume(a)
	moved(b.flow(a).BytesOut)
	select {
	case err := <-secret.sent:
		t.Errorf("the encrypted connection ended: %v", err)
	default:
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
}

// The link goes down and up: connections go on. The device goes away: the
// daemon says so and ends.
func TestLink(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A)
	b.daemon(b.path.B)
	secret := b.chatter(canary)
	moved := func() {
		b.t.Helper()
		f := b.flow(a)
		b.eventually("the connection carries data", func() (string, bool) {
			g, err := a.Flow(b.ctx)
			return "", err == nil && g.BytesOut > f.BytesOut+100000
		})
	}
	moved()
	if err := b.path.A.SetDown(); err != nil {
		t.Fatal(err)
	}
	b.eventually("the daemon sees the link down", func() (string, bool) {
		return a.Logs(), strings.Contains(a.Logs(), "interface is down")
	})
	if err := b.path.A.SetUp(); err != nil {
		t.Fatal(err)
	}
	moved()
	select {
	case err := <-secret.sent:
		t.Errorf("the connection ended: %v", err)
	default:
	}
	if err := b.path.A.Delete(); err != nil {
		t.Fatal(err)
	}
	b.eventually("the daemon ends", func() (string, bool) {
		_, err := a.Status(b.ctx)
		return "", err != nil && strings.Contains(a.Logs(), "device is gone")
	})
}

// The TAP device is set down by somebody: it is set up again. It is deleted: the
// daemon says so, ends, and leaves nothing behind.
func TestTAPTakenAway(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, _ := b.both()
	st, err := a.Status(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	nl := b.path.A.NS.Netlink()
	tap, err := nl.LinkByName(st.Inner)
	if err != nil {
		t.Fatal(err)
	}
	if err := nl.LinkSetDown(tap); err != nil {
		t.Fatal(err)
	}
	b.encryptsAgain(a, false)
	if err := nl.LinkDel(tap); err != nil {
		t.Fatal(err)
	}
	if err := a.Wait(b.ctx); err == nil || !strings.Contains(a.Logs(), "device is gone") {
		t.Errorf("the daemon ended with %v", err)
	}
	if err := b.exchange(false, make([]byte, 1000), make([]byte, 1000), func() {}); err != nil {
		t.Errorf("a connection after that: %v", err)
	}
}
