package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// gatewayBed is two hosts that know nothing of encryption, each behind a place
// for a gateway, and a watched wire between those.
type gatewayBed struct {
	*bed
	sites [2]lab.Site
}

func newGatewayBed(t *testing.T) *gatewayBed {
	t.Helper()
	return newGatewayBedOf(t, 1)
}

// newGatewayBedOf has NICs with so many queues.
func newGatewayBedOf(t *testing.T, queues int) *gatewayBed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	t.Cleanup(cancel)
	l := lab.Start(t)
	bare := lab.EndOptions{NoAddress: true}
	path, err := l.Middle(lab.Options{A: bare, B: bare, Queues: queues})
	if err != nil {
		t.Fatal(err)
	}
	g := &gatewayBed{bed: &bed{t: t, ctx: ctx, wire: &watch{}}}
	if g.fwd, err = path.Forward(lab.ForwarderOptions{Seed: 1, Tap: g.wire.tap}); err != nil {
		t.Fatal(err)
	}
	if g.sites, err = l.Behind([2]*lab.Iface{path.A, path.B}, queues); err != nil {
		t.Fatal(err)
	}
	g.path = &lab.Path{A: g.sites[0].Host, B: g.sites[1].Host, Mid: path.Mid, MidA: path.MidA, MidB: path.MidB}
	for _, mid := range []*lab.Iface{path.MidA, path.MidB} {
		if err := mid.SetFeature(lab.GRO, true); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// gateway starts the program on both NICs of gateway k.
func (g *gatewayBed) gateway(k int, flags ...string) *daemon.Daemon {
	g.t.Helper()
	return g.daemon(g.sites[k].Outer, append([]string{"--inner-interface", g.sites[k].Inner.Name}, flags...)...)
}

// Two hosts without the daemon behind two gateways: what is between the gateways
// is encrypted, and nothing of it is copied from one NIC to the other.
func TestGateway(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		g := newGatewayBed(t)
		a, z := g.gateway(0), g.gateway(1)
		if st, err := a.Status(g.ctx); err != nil || st.Inner != "eth1" || st.Bypass != "forward" || len(st.Queues) != 2 {
			t.Errorf("status %+v: %v", st, err)
		}
		err := g.exchange(v6, stream(1, 20<<20), stream(2, 20<<20), func() {
			fa, fz := g.flow(a), g.flow(z)
			if fa.SessionID == "" || fa.SessionID != fz.SessionID || fa.Local != fz.Remote || fa.Role != "A" || fz.Role != "B" {
				t.Errorf("flows %+v and %+v", fa, fz)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if plain, _ := g.wire.seen(); plain != 0 {
			t.Errorf("%d segments with plaintext between the gateways", plain)
		}
		for _, d := range []*daemon.Daemon{a, z} {
			c := g.stats(d).Counters
			if in, out := c["in_place_in"], c["in_place_out"]; in < 9*c["copied_in"] || out < 9*c["copied_out"] || in == 0 || out == 0 {
				t.Errorf("in place %d in and %d out, copied %d and %d", in, out, c["copied_in"], c["copied_out"])
			}
			g.noFlows(d)
		}
		if err := errors.Join(a.Stop(), z.Stop()); err != nil {
			t.Error(err)
		}
	})
}

// cable joins both sides of a place for a gateway without one.
func (g *gatewayBed) cable(k int) {
	g.t.Helper()
	if _, err := lab.NewForwarder(g.sites[k].Outer, g.sites[k].Inner, lab.ForwarderOptions{Seed: 1}); err != nil {
		g.t.Fatal(err)
	}
}

// unreachable demands that host A cannot connect to host B.
func (g *gatewayBed) unreachable() {
	g.t.Helper()
	ln := g.echo()
	defer ln.Close()
	ctx, cancel := context.WithTimeout(g.ctx, 1500*time.Millisecond)
	defer cancel()
	if c, err := g.path.A.NS.Dial(ctx, "tcp", ln.Addr().String()); err == nil {
		c.Close()
		g.t.Error("there is still a way through")
	}
}

// gatewayIdle counts what came to a gateway's daemon.
func gatewayIdle(c map[string]uint64) string {
	if n := c["to_slow_path"] + c["outer_packets"] + c["inner_packets"]; n > 40 {
		return fmt.Sprintf("%d packets came to the daemon", n)
	}
	return ""
}

// A connection whose other end has no encryption is forwarded without the
// daemon, and so is everything that is not TCP.
func TestGatewayPlain(t *testing.T) {
	g := newGatewayBed(t)
	a := g.gateway(0)
	g.cable(1)
	if err := g.exchange(false, stream(1, 4<<20), stream(2, 4<<20), nil); err != nil {
		t.Fatal(err)
	}
	c := g.stats(a).Counters
	if why := gatewayIdle(c); why != "" {
		t.Error(why)
	}
	if c["bpf_outer_forwarded"] < 1000 || c["bpf_inner_forwarded"] < 1000 {
		t.Errorf("%d packets forwarded inwards and %d outwards", c["bpf_outer_forwarded"], c["bpf_inner_forwarded"])
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}

// A gateway works with a host that runs the daemon itself, whoever opens.
func TestGatewayAndHost(t *testing.T) {
	for _, active := range []string{"host", "gateway"} {
		t.Run(active+" opens", func(t *testing.T) {
			g := newGatewayBed(t)
			k := 0 // the gateway is before host A, who opens
			host := g.path.B
			if active == "host" {
				k, host = 1, g.path.A
			}
			g.cable(1 - k)
			gw, d := g.gateway(k), g.daemon(host)
			err := g.exchange(false, stream(1, 4<<20), stream(2, 4<<20), func() {
				if a, b := g.flow(gw), g.flow(d); a.SessionID != b.SessionID {
					t.Errorf("session IDs %q and %q", a.SessionID, b.SessionID)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if plain, _ := g.wire.seen(); plain != 0 {
				t.Errorf("%d segments with plaintext on the wire", plain)
			}
			if err := errors.Join(gw.Stop(), d.Stop()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A killed gateway forwards what is not encrypted, and nothing of what was; the
// one that is started next resets those connections. With --bypass block nothing
// passes any more.
func TestGatewayBypass(t *testing.T) {
	t.Run("forward", func(t *testing.T) {
		g := newGatewayBed(t)
		a, z := g.gateway(0), g.gateway(1)
		client, server, err := g.connect(false)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		defer server.Close()
		g.flow(a)
		if err := a.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := g.exchange(false, stream(1, 1<<20), stream(2, 1<<20), nil); err != nil {
			t.Fatalf("a new connection past the dead gateway: %v", err)
		}
		before, _ := g.wire.seen()
		if before == 0 {
			t.Error("the new connection was not plain")
		}
		if _, err := client.Write(stream(3, 4000)); err != nil {
			t.Fatal(err)
		}
		resent := g.resends(g.path.A.NS)
		g.eventually("the old connection goes on trying", func() (string, bool) {
			return "nothing of it was sent again", g.resends(g.path.A.NS) > resent+1
		})
		if after, _ := g.wire.seen(); after != before {
			t.Errorf("%d segments of the old connection passed in plaintext", after-before)
		}
		a = g.gateway(0)
		if st, err := a.Status(g.ctx); err != nil || st.Ended != 1 {
			t.Errorf("status %+v, %v; one connection was left over", st, err)
		}
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the old connection ends with %v", err)
		}
		// The other end learns of it when it sends, if its gateway has sent nothing.
		_, err = server.Write(stream(4, 4000))
		if err == nil {
			_, err = server.Read(make([]byte, 1))
		}
		if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("the other end of the old connection ends with %v", err)
		}
		if err := g.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { g.flow(a) }); err != nil {
			t.Error(err)
		}
		if err := errors.Join(a.Stop(), z.Stop()); err != nil {
			t.Error(err)
		}
		// Stopped in order, it forwards on, until it is told not to, and has nothing
		// shut.
		for _, site := range g.sites {
			if n, attached := g.left(site.Outer); n != 0 || !attached {
				t.Errorf("%d connections are shut by a gateway that ended in order, attached %v", n, attached)
			}
		}
		if err := g.exchange(false, stream(1, 1000), stream(2, 1000), nil); err != nil {
			t.Errorf("past gateways that ended: %v", err)
		}
		for _, s := range g.sites {
			out, err := s.Outer.NS.Command(g.ctx, program, "run", "--cleanup", "--interface", s.Outer.Name).CombinedOutput()
			if err == nil || !strings.Contains(string(out), "name its other interface with --inner-interface") {
				t.Errorf("cleanup of one interface: %v\n%s", err, out)
			}
			out, err = s.Outer.NS.Command(g.ctx, program, "run", "--cleanup", "--interface", s.Outer.Name, "--inner-interface", s.Inner.Name).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "the bypass between eth0 and eth1 is removed") {
				t.Errorf("cleanup: %v\n%s", err, out)
			}
		}
		g.unreachable()
	})
	t.Run("block", func(t *testing.T) {
		g := newGatewayBed(t)
		g.cable(1)
		a := g.gateway(0, "--bypass", "block")
		if err := g.exchange(false, stream(1, 1000), stream(2, 1000), nil); err != nil {
			t.Fatal(err)
		}
		if err := a.Kill(); err != nil {
			t.Fatal(err)
		}
		g.unreachable()
		// The other end encrypts now.
		a, z := g.gateway(0, "--bypass", "block"), g.daemon(g.path.B)
		client, server := g.connected()
		g.flow(a)
		if err := g.exchange(false, stream(1, 1000), stream(2, 1000), nil); err != nil {
			t.Fatal(err)
		}
		client.Close()
		server.Close()
		if err := errors.Join(a.Stop(), z.Stop()); err != nil {
			t.Error(err)
		}
		if n, attached := g.left(g.sites[0].Outer); attached {
			t.Errorf("a gateway that ended in order is still there, with %d connections", n)
		}
		g.unreachable()
	})
}

// left returns how many connections the program on a gateway's interface lists,
// and whether there is one.
func (g *gatewayBed) left(i *lab.Iface) (n int, attached bool) {
	g.t.Helper()
	l, err := i.NS.Netlink().LinkByIndex(i.Index)
	if err != nil {
		g.t.Fatal(err)
	}
	x := l.Attrs().Xdp
	if x == nil || !x.Attached {
		return 0, false
	}
	program, err := ebpf.NewProgramFromID(ebpf.ProgramID(x.ProgId))
	if err != nil {
		g.t.Fatal(err)
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		g.t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			g.t.Fatal(err)
		}
		if info, err := m.Info(); err == nil && info.Name == "flows" {
			n = g.count(m)
		}
		m.Close()
	}
	return n, true
}
