package e2e

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Many connections that say nothing: all of them are encrypted and work, and the
// daemons' memory for each is told. A daemon that is terminated ends them all.
func TestIdleFlows(t *testing.T) {
	n := *idleFlows
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	var cancel context.CancelFunc
	b.ctx, cancel = context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	a, z := b.both("--drain-timeout", "10ms")
	b.encryptsAgain(a, false)
	before := [2]int64{b.rss(a), b.rss(z)}

	begin := time.Now()
	var clients []*holding
	for left := n; left > 0; left -= perHolder {
		server := b.hold(b.ctx, b.path.B.NS, "listen %s", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
		clients = append(clients, b.hold(b.ctx, b.path.A.NS, "dial %s %d", server.answer(t), min(left, perHolder)))
	}
	for _, c := range clients {
		c.answer(t)
	}
	took := time.Since(begin)
	for i, d := range []*daemon.Daemon{a, z} {
		b.eventually("all connections are encrypted", func() (string, bool) {
			st, err := d.Status(b.ctx)
			return "", err == nil && st.Flows >= n
		})
		now := b.rss(d)
		per := (now - before[i]) / int64(n)
		t.Logf("daemon on %s: %d idle connections, resident memory %.1f -> %.1f MiB, %d bytes a connection",
			"ab"[i:i+1], n, float64(before[i])/(1<<20), float64(now)/(1<<20), per)
		if per > 32<<10 {
			t.Errorf("%d bytes a connection", per)
		}
	}
	t.Logf("%d connections opened in %v", n, took.Round(time.Millisecond))
	ask(t, clients, "write")
	b.encryptsAgain(a, false)
	begin = time.Now()
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	t.Logf("SIGTERM with all of them open took %v", time.Since(begin).Round(time.Millisecond))
	ask(t, clients, "ended")
}
