package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// gatewayBed is two hosts that know nothing of encryption, each behind a place
// for a gateway, and a watched wire between those.
type gatewayBed struct {
	*bed
	outer, inner [2]*lab.Iface // of the gateways, on the side of host A and of host B
}

func newGatewayBed(t *testing.T) *gatewayBed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	t.Cleanup(cancel)
	l := lab.Start(t)
	bare := lab.EndOptions{NoAddress: true}
	path, err := l.Middle(lab.Options{A: bare, B: bare})
	if err != nil {
		t.Fatal(err)
	}
	g := &gatewayBed{bed: &bed{t: t, ctx: ctx, wire: &watch{}}, outer: [2]*lab.Iface{path.A, path.B}}
	if g.fwd, err = path.Forward(lab.ForwarderOptions{Seed: 1, Tap: g.wire.tap}); err != nil {
		t.Fatal(err)
	}
	g.path = &lab.Path{Mid: path.Mid, MidA: path.MidA, MidB: path.MidB}
	cable := lab.LinkOptions{Net4: netip.MustParsePrefix("10.77.0.0/24"), Net6: netip.MustParsePrefix("fd77::/64")}
	behind := lab.EndOptions{Name: "eth1", NoAddress: true}
	for k, gw := range g.outer {
		host, err := l.Namespace([]string{"ha", "hb"}[k])
		if err != nil {
			t.Fatal(err)
		}
		var h *lab.Iface
		if k == 0 {
			cable.B = behind
			g.path.A, g.inner[k], err = l.Connect(host, gw.NS, cable)
			h = g.path.A
		} else {
			cable.A, cable.B = behind, lab.EndOptions{}
			g.inner[k], g.path.B, err = l.Connect(gw.NS, host, cable)
			h = g.path.B
		}
		if err != nil {
			t.Fatal(err)
		}
		// What XDP forwards must be whole, and a veth takes it only with NAPI.
		for _, f := range []lab.Feature{lab.TSO, lab.GSO, lab.TxChecksum} {
			if err := h.SetFeature(f, false); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.SetFeature(lab.GRO, true); err != nil {
			t.Fatal(err)
		}
	}
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
	return g.daemon(g.outer[k], append([]string{"--inner-interface", g.inner[k].Name}, flags...)...)
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
	if _, err := lab.NewForwarder(g.outer[k], g.inner[k], lab.ForwarderOptions{Seed: 1}); err != nil {
		g.t.Fatal(err)
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
