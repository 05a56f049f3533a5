package e2e

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
)

// entries counts what is in the map with the given name of a daemon.
func (b *bed) entries(d *daemon.Daemon, name string) (n int) {
	b.t.Helper()
	for _, m := range b.maps(d, name) {
		n += b.count(m)
	}
	return n
}

// count counts what is in a map, which may change meanwhile.
func (b *bed) count(m *ebpf.Map) (n int) {
	b.t.Helper()
	var key, value []byte
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		n++
	}
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		b.t.Fatal(err)
	}
	return n
}

// diverts waits until a gateway has no connection, and its programs and its count
// agree on how many linger: none, if that is all that is wanted.
func (g *gatewayBed) diverts(d *daemon.Daemon, none bool) {
	g.t.Helper()
	g.noFlows(d)
	g.eventually("connections are not diverted any more", func() (string, bool) {
		counted, flows, pairs := g.stats(d).Counters["diverted_flows"], g.entries(d, "flows"), g.entries(d, "pairs")
		why := fmt.Sprintf("%d are counted, %d listed, between %d pairs of addresses", counted, flows, pairs)
		return why, int(counted) == flows && pairs == min(flows, 1) && !(none && flows > 0)
	})
}

// A gateway that hangs keeps shut what it has, also when a host behind it begins
// anew with the same ports. When it goes on, so do its connections, and what it
// counts is what is listed.
func TestGatewayHung(t *testing.T) {
	g := newGatewayBed(t)
	a, z := g.gateway(0), g.gateway(1)
	ln := g.echo()
	client, server := g.connected()
	again, err := g.path.A.NS.Dial(g.ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	g.guarded(again)
	g.echoed(again, stream(1, 20000))
	if n := g.entries(a, "flows"); n != 2 {
		t.Errorf("%d connections are diverted", n)
	}
	g.halt(a)
	g.eventually("the programs have noticed", func() (string, bool) {
		before, _ := g.wire.seen()
		if err := g.exchange(false, stream(2, 10000), stream(3, 10000), nil); err != nil {
			return err.Error(), false
		}
		after, _ := g.wire.seen()
		return "a new connection is encrypted, or waits", after > before
	})
	plain, _ := g.wire.seen()

	carried := make(chan error, 1)
	go func() { carried <- swap(client, server, stream(4, 100000), stream(5, 100000)) }()
	// The reset gets lost in the programs, the SYN waits for the daemon.
	from := again.LocalAddr().(*net.TCPAddr)
	if err := errors.Join(again.(*net.TCPConn).SetLinger(0), again.Close()); err != nil {
		t.Fatal(err)
	}
	before := g.resent(g.path.A.NS)
	done := make(chan dialled, 1)
	go func() {
		c, err := g.dialAgain(from, ln)
		done <- dialled{c, err}
	}()
	g.eventually("the SYN is sent again", func() (string, bool) { return "", g.resent(g.path.A.NS) > before })
	select {
	case r := <-done:
		t.Fatalf("connected past a gateway that hangs, with the ports of a connection that it has: %v", r.err)
	case err := <-carried:
		t.Fatalf("data passed a gateway that hangs: %v", err)
	default:
	}
	if n := g.entries(a, "flows"); n != 2 {
		t.Errorf("%d connections are diverted while the gateway hangs", n)
	}
	g.resume(a)
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	g.guarded(r.c)
	g.echoed(r.c, stream(6, 20000))
	if err := <-carried; err != nil {
		t.Fatal(err)
	}
	if after, _ := g.wire.seen(); after != plain {
		t.Errorf("%d segments with plaintext of connections that were encrypted", after-plain)
	}
	for _, c := range []net.Conn{client, server, r.c} {
		c.Close()
	}
	g.diverts(a, false)
	g.diverts(z, false)
	if err := errors.Join(a.Stop(), z.Stop()); err != nil {
		t.Error(err)
	}
}

// While a gateway hangs no other one takes its place.
func TestGatewayHungTwice(t *testing.T) {
	g := newGatewayBed(t)
	a := g.gateway(0)
	g.gateway(1)
	client, server := g.connected()
	g.halt(a)
	_, err := daemon.Start(g.ctx, program, g.sites[0].Outer, nil, "--inner-interface", g.sites[0].Inner.Name)
	if err == nil || !strings.Contains(err.Error(), "exit status 2") || !strings.Contains(err.Error(), "process hangs") {
		t.Errorf("a second gateway: %v", err)
	}
	g.resume(a)
	if err := swap(client, server, stream(1, 100000), stream(2, 100000)); err != nil {
		t.Error(err)
	}
	if plain, _ := g.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext between the gateways", plain)
	}
}

// The choice of --bypass is that of the last start, whatever the one before it
// was, and also when that start fails. A connection that was encrypted by a
// gateway that died is shut by all of them, until one that starts resets it.
func TestGatewayBypassChoice(t *testing.T) {
	for _, choice := range [][2]string{{"forward", "block"}, {"block", "forward"}, {"block", "block"}} {
		t.Run(choice[0]+" then "+choice[1], func(t *testing.T) {
			g := newGatewayBed(t)
			a := g.gateway(0, "--bypass", choice[0])
			g.gateway(1)
			client, server := g.connected()
			if err := swap(client, server, stream(1, 100000), stream(2, 100000)); err != nil {
				t.Fatal(err)
			}
			if err := a.Kill(); err != nil {
				t.Fatal(err)
			}
			g.passes(choice[0] == "forward")
			plain, _ := g.wire.seen()
			if _, err := client.Write(stream(3, 4000)); err != nil {
				t.Fatal(err)
			}

			d, err := daemon.Start(g.ctx, program, g.sites[0].Outer, nil, "--inner-interface", g.sites[0].Inner.Name, "--bypass", choice[1], "--mode", "zerocopy")
			if err == nil {
				t.Fatal("a veth has zero-copy", d.Stop())
			}
			if !strings.Contains(err.Error(), "exit status 2") {
				t.Error(err)
			}
			g.passes(choice[1] == "forward")
			resent := g.resends(g.path.A.NS)
			g.eventually("the old connection goes on trying", func() (string, bool) {
				return "nothing of it was sent again", g.resends(g.path.A.NS) > resent
			})

			a = g.gateway(0, "--bypass", choice[1])
			if st, err := a.Status(g.ctx); err != nil || st.Ended != 1 || st.Bypass != choice[1] {
				t.Errorf("status %+v, %v; one connection was left over", st, err)
			}
			if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the old connection ends with %v", err)
			}
			after, _ := g.wire.seen()
			if choice[0] == "block" && choice[1] == "block" && after != plain {
				t.Errorf("%d segments of the old connection passed in plaintext", after-plain)
			}
			// The peer learns of it when it sends, if its gateway has sent nothing.
			if _, err := server.Write(stream(4, 4000)); err != nil && !errors.Is(err, unix.ECONNRESET) {
				t.Fatal(err)
			}
			server.Close()
			g.diverts(a, true)
			if err := g.exchange(false, stream(5, 100000), stream(6, 100000), func() { g.flow(a) }); err != nil {
				t.Error(err)
			}
			if err := a.Kill(); err != nil {
				t.Fatal(err)
			}
			g.passes(choice[1] == "forward")
			out, err := g.sites[0].Outer.NS.Command(g.ctx, program, "run", "--cleanup", "--interface", "eth0", "--inner-interface", "eth1").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "the bypass between eth0 and eth1 is removed") {
				t.Errorf("cleanup: %v\n%s", err, out)
			}
			g.unreachable()
		})
	}
}

// A gateway that blocks leaves nothing when it ends in order, except what keeps the
// connections of an earlier one shut: their ends have sent nothing since, and know
// of no reset.
func TestGatewayKeepsShut(t *testing.T) {
	g := newGatewayBed(t)
	a := g.gateway(0, "--bypass", "block")
	g.gateway(1)
	client, _ := g.connected()
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	a = g.gateway(0, "--bypass", "block")
	if err := g.exchange(false, stream(1, 100000), stream(2, 100000), func() { g.flow(a) }); err != nil {
		t.Error(err)
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	if n, attached := g.left(g.sites[0].Outer); n != 1 || !attached {
		t.Errorf("%d connections are kept shut, attached %v\n%s", n, attached, a.Logs())
	}
	if _, err := client.Write(stream(3, 4000)); err != nil {
		t.Fatal(err)
	}
	g.unreachable()
	a = g.gateway(0)
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the old connection ends with %v", err)
	}
	if plain, _ := g.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext between the gateways", plain)
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}

// passes demands that new connections get past the place of gateway A, which has
// no daemon, or that they do not.
func (g *gatewayBed) passes(want bool) {
	g.t.Helper()
	if !want {
		g.unreachable()
		return
	}
	if err := g.exchange(false, []byte("up"), []byte("down"), nil); err != nil {
		g.t.Errorf("a new connection without the daemon: %v", err)
	}
}
