package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"

	"github.com/safchain/ethtool"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// What can be had is used and told; what cannot is an error, not something else.
func TestModes(t *testing.T) {
	for _, mode := range []string{"auto", "copy", "generic"} {
		t.Run(mode, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a, z := b.both("--mode", mode)
			want := mode
			if mode == "auto" {
				want = "copy" // a veth has no zero-copy
			}
			st, err := a.Status(b.ctx)
			if err != nil || st.Mode != want || len(st.Queues) != 1 || st.Queues[0].Mode != want || (st.Queues[0].Refused != "") != (mode == "auto") {
				t.Errorf("status %+v: %v", st, err)
			}
			if err := b.exchange(false, stream(1, 2<<20), stream(2, 2<<20), func() { b.flow(a); b.flow(z) }); err != nil {
				t.Fatal(err)
			}
			b.noFlows(a)
			b.encryptedOnly(a, z, 1)
			if err := errors.Join(a.Stop(), z.Stop()); err != nil {
				t.Error(err)
			}
			if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
				t.Errorf("still attached: %v %v", d, g)
			}
		})
	}
	for _, c := range []struct{ name, iface, mode, says string }{
		{"zerocopy", "", "zerocopy", "no zero-copy"}, // a veth has none
		{"loopback", "lo", "auto", "lo is the loopback device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			host := b.path.A
			out, err := host.NS.Command(b.ctx, program, "run", "--interface", cmp.Or(c.iface, host.Name), "--mode", c.mode, "--control", host.NS.Lab().Dir()+"/no.sock").CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 2 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), c.says) {
				t.Errorf("%v\n%s", err, out)
			}
			if d, g := attached(t, host); len(d)+len(g) != 0 {
				t.Errorf("still attached: %v %v", d, g)
			}
		})
	}
}

// channels returns the numbers of an interface's queues, after change, if any.
func (b *bed) channels(i *lab.Iface, change func(*ethtool.Channels)) (c ethtool.Channels) {
	b.t.Helper()
	err := i.NS.Do(func() error {
		tool, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer tool.Close()
		if c, err = tool.GetChannels(i.Name); err == nil && change != nil {
			change(&c)
			_, err = tool.SetChannels(i.Name, c)
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// Queues that are not to be served are taken from the interface while the
// daemon runs, or the daemon does not start: no packet of an encrypted
// connection ever comes where nobody receives it.
func TestSomeQueues(t *testing.T) {
	b := newBed(t, lab.Options{A: lab.EndOptions{Queues: 2}}, lab.ForwarderOptions{})
	// A veth wants a receive queue for every transmit queue of its peer.
	b.channels(b.path.MidA, func(c *ethtool.Channels) { c.TxCount = 1 })

	a, z := b.daemon(b.path.A, "--queues", "0"), b.daemon(b.path.B)
	if st, err := a.Status(b.ctx); err != nil || st.Mode != "copy" || len(st.Queues) != 1 || st.Queues[0].Queue != 0 {
		t.Errorf("status %+v: %v", st, err)
	}
	if n := b.channels(b.path.A, nil).RxCount; n != 1 {
		t.Errorf("%d receive queues while one is served", n)
	}
	if !strings.Contains(a.Logs(), "1 receive queues instead of 2") {
		t.Errorf("not told:\n%s", a.Logs())
	}
	if err := b.exchange(false, stream(1, 2<<20), stream(2, 2<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Error(err)
	}
	b.noFlows(a)
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	if n := b.channels(b.path.A, nil).RxCount; n != 2 {
		t.Errorf("%d receive queues after the end, there were 2", n)
	}

	out, err := b.path.A.NS.Command(b.ctx, program, "run", "--interface", b.path.A.Name, "--queues", "1", "--control", b.path.A.NS.Lab().Dir()+"/q.sock").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || strings.Count(strings.TrimSpace(string(out)), "\n") != 0 || !strings.Contains(string(out), "only 1 are named") {
		t.Errorf("the second queue alone, on a veth: %v\n%s", err, out)
	}
	if n := b.channels(b.path.A, nil).RxCount; n != 2 {
		t.Errorf("%d receive queues after a refused start", n)
	}
}

// An interface that is given more queues while the daemon runs goes on receiving
// on those that have a socket, and has its new ones when the daemon has ended.
// Where that cannot be, the log says what to do.
func TestQueuesAdded(t *testing.T) {
	b := newBed(t, lab.Options{A: lab.EndOptions{Queues: 2}}, lab.ForwarderOptions{})
	b.channels(b.path.MidA, func(c *ethtool.Channels) { c.TxCount = 1 })
	b.channels(b.path.A, func(c *ethtool.Channels) { c.RxCount = 1 })
	a, z := b.both()
	client, server := b.connected()
	more := func(c *ethtool.Channels) { c.RxCount = 2 }
	for range 2 { // also the second time
		b.channels(b.path.A, more)
		b.eventually("the interface receives on the queue that is served", func() (string, bool) {
			n := b.channels(b.path.A, nil).RxCount
			return fmt.Sprintf("%d queues", n), n == 1
		})
	}
	if err := swap(client, server, stream(1, 1<<20), stream(2, 1<<20)); err != nil {
		t.Errorf("the connection that was open: %v", err)
	}
	b.eventually("the log tells of it", func() (string, bool) {
		return a.Logs(), strings.Contains(a.Logs(), "more receive queues")
	})
	if strings.Contains(a.Logs(), "level=ERROR") {
		t.Errorf("the log:\n%s", a.Logs())
	}

	// Its peer's transmit queues keep a veth from giving receive queues back.
	b.channels(b.path.A, more)
	b.channels(b.path.MidA, func(c *ethtool.Channels) { c.TxCount = 2 })
	b.eventually("the log tells of the queues that are not served", func() (string, bool) {
		return a.Logs(), strings.Contains(a.Logs(), "restart it")
	})
	b.channels(b.path.MidA, func(c *ethtool.Channels) { c.TxCount = 1 })
	for _, c := range []net.Conn{client, server} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	b.idle(a, z)
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	if n := b.channels(b.path.A, nil).RxCount; n != 2 {
		t.Errorf("%d receive queues after the end, there were 2", n)
	}
}

// A second daemon on the same interface is refused and does not disturb the first.
func TestSecondDaemon(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	if d, err := daemon.Start(ctx, program, b.path.A, nil); err == nil {
		_ = d.Kill()
		t.Error("a second daemon started on the same interface")
	}
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Fatal(err)
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 1)
}

// The plain connections that --require refuses do not come about, in either
// direction; encrypted ones do.
func TestRequire(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, "--require")
	if err := b.exchange(false, stream(1, 1000), stream(2, 1000), nil); err == nil {
		t.Error("a plain connection came about under --require")
	}
	back := bed{t: t, ctx: b.ctx, path: &lab.Path{A: b.path.B, B: b.path.A}}
	if err := back.exchange(false, stream(1, 1000), stream(2, 1000), nil); err == nil {
		t.Error("a plain connection from outside came about under --require")
	}
	z := b.daemon(b.path.B, "--require")
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Error(err)
	}
	if plain, _ := b.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext on the wire", plain)
	}
}
