package e2e

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// mtu changes that of interfaces.
func (b *bed) mtu(n int, ifaces ...*lab.Iface) {
	b.t.Helper()
	for _, i := range ifaces {
		if err := i.SetMTU(n); err != nil {
			b.t.Fatal(err)
		}
	}
}

// sees waits until daemons know an MTU.
func (b *bed) sees(mtu int, ds ...*daemon.Daemon) {
	b.t.Helper()
	for _, d := range ds {
		b.eventually("the daemon sees the MTU", func() (string, bool) {
			st, err := d.Status(b.ctx)
			return "", err == nil && st.MTU == mtu
		})
	}
}

// A smaller MTU of the interface takes effect at once, for connections that are
// open and for new ones: what is longer is dropped on the way without a word.
func TestMTULowered(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	client, server := b.connected()
	if err := swap(client, server, stream(1, 1<<20), stream(2, 1<<20)); err != nil {
		t.Fatal(err)
	}
	b.mtu(1300, b.path.A, b.path.MidA, b.path.MidB, b.path.B)
	b.sees(1300, a, z)
	if err := swap(client, server, stream(3, 1<<20), stream(4, 1<<20)); err != nil {
		t.Errorf("the connection that was open: %v", err)
	}
	if err := b.exchange(true, stream(5, 1<<20), stream(6, 1<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Errorf("a new connection: %v", err)
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
}

// A larger MTU is used by new connections as far as the sockets, which were bound
// before, take it; the peer is told of what they take, and sends no more.
func TestMTURaised(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	pair, err := lab.Start(t).Pair(lab.Options{Neighbours: true})
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, ctx: ctx, path: &lab.Path{A: pair.A, B: pair.B}, wire: &watch{}}
	a, z := b.both()
	for _, mtu := range []int{1700, 3000} {
		b.mtu(mtu, b.path.A, b.path.B)
		b.sees(mtu, a, z)
		for _, v6 := range []bool{false, true} {
			if err := b.exchange(v6, stream(1, 2<<20), stream(2, 2<<20), func() { b.flow(a); b.flow(z) }); err != nil {
				t.Errorf("MTU %d: %v", mtu, err)
			}
		}
	}
	if !strings.Contains(a.Logs(), "until the daemon is restarted") {
		t.Errorf("the log says nothing of the limit:\n%s", a.Logs())
	}
	b.idle(a, z)
	for _, d := range []string{a.Logs(), z.Logs()} {
		if strings.Contains(d, "level=ERROR") {
			t.Error(d)
		}
	}
	if c := b.stats(a).Counters; c["xsk_rx_dropped"] != 0 {
		t.Errorf("%d packets did not fit", c["xsk_rx_dropped"])
	}
}

// The interface is removed: the daemon ends with status 1 and says why, and ends
// the connections that it encrypted. One that is started when the interface has
// returned, as the service manager does, encrypts again, and nothing of the old
// connections is on the wire.
func TestDeviceReturns(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A)
	z := b.daemon(b.path.B)
	secret := b.chatter(canary)
	b.eventually("the connection carries data", func() (string, bool) {
		f, err := a.Flow(b.ctx)
		return "", err == nil && f.BytesOut > 100000
	})
	old := b.path.A
	if err := old.Delete(); err != nil {
		t.Fatal(err)
	}
	if err := a.Wait(b.ctx); err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(a.Logs(), "device is gone") {
		t.Errorf("the daemon ended with %v:\n%s", err, a.Logs())
	}
	if err := b.ends("the sender", secret.sent); err == nil {
		t.Error("the sender saw no error")
	}
	l := old.NS.Lab()
	back, far, err := l.Connect(old.NS, b.path.Mid, lab.LinkOptions{
		Net4: old.IP4.Masked(), Net6: old.IP6.Masked(), Neighbours: true,
		A: lab.EndOptions{Name: old.Name}, B: lab.EndOptions{Name: "back", NoAddress: true, NoOffload: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.path.A = back
	for _, e := range [][2]*lab.Iface{{back, b.path.B}, {b.path.B, back}} {
		if err := errors.Join(e[0].AddNeighbour(e[1].Addr4(), e[1].MAC), e[0].AddNeighbour(e[1].Addr6(), e[1].MAC)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := lab.NewForwarder(far, b.path.MidB, lab.ForwarderOptions{Seed: 2, Tap: b.wire.tap}); err != nil {
		t.Fatal(err)
	}
	a = b.daemon(back)
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a) }); err != nil {
		t.Error(err)
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
	b.noFlows(a)
	if err := errors.Join(a.Stop(), z.Stop()); err != nil {
		t.Error(err)
	}
}
