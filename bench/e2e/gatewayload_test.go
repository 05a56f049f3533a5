package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Many connections at once, in both directions, through gateways with several
// workers: all are encrypted between the gateways, and every queue of both NICs
// carries some.
func TestGatewayIperf(t *testing.T) {
	need(t, "iperf3")
	const queues = 2
	g := newGatewayBedOf(t, queues)
	flags := []string{"--workers", fmt.Sprint(queues)}
	a, z := g.gateway(0, flags...), g.gateway(1, flags...)
	ip, _ := g.addr(false)
	g.background(5201, "iperf3", "-s", "-B", ip.String())
	g.run("iperf3", "-c", ip.String(), "-P", "8", "--bidir", "-t", "3", "--connect-timeout", "5000")
	if err := g.exchange(false, stream(1, 4<<20), stream(2, 4<<20), nil); err != nil {
		t.Error(err)
	}
	g.noFlows(a)
	g.encryptedOnly(a, z, 8+8+1+1)
	for _, d := range []*daemon.Daemon{a, z} {
		st, err := d.Status(g.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(st.Workers) != queues || len(st.Queues) != 2*queues {
			t.Errorf("%d workers for %d queues", len(st.Workers), len(st.Queues))
		}
		for _, q := range st.Queues {
			if q.Received == 0 {
				t.Errorf("queue %d of %s received nothing: %+v", q.Queue, q.Interface, st.Queues)
			}
		}
	}
	g.diverts(a, false)
	g.diverts(z, false)
	if err := errors.Join(a.Stop(), z.Stop()); err != nil {
		t.Error(err)
	}
}

// What is not for the daemon does not come to it while it encrypts connections
// between the same hosts: datagrams, and connections that are to stay plain.
func TestGatewayPast(t *testing.T) {
	g := newGatewayBed(t)
	const port = "7777"
	a := g.gateway(0, "--exclude-ports", port)
	z := g.gateway(1, "--exclude-ports", port)
	client, server := g.connected()
	if err := swap(client, server, stream(1, 1<<20), stream(2, 1<<20)); err != nil {
		t.Fatal(err)
	}
	// quiet waits until nothing of the encrypted connection is on its way.
	quiet := func(d *daemon.Daemon) (received uint64) {
		g.eventually("the gateway is quiet", func() (string, bool) {
			before := received
			received = g.stats(d).Counters["xsk_received"]
			return "", received == before
		})
		return received
	}
	received := []uint64{quiet(a), quiet(z)}
	forwarded := g.stats(a).Counters["bpf_inner_forwarded"]

	datagrams := g.datagrams(1000)
	ip, _ := g.addr(false)
	ln, err := g.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), port))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, s, err := g.connectTo(ln, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	defer s.Close()
	if err := carry(c, s, stream(3, 4<<20), stream(4, 4<<20)); err != nil {
		t.Error(err)
	}

	for i, d := range []*daemon.Daemon{a, z} {
		st := g.stats(d).Counters
		// Some last ACKs of the encrypted one, which may take their time, do.
		if n := st["xsk_received"] - received[i]; n > 8 {
			t.Errorf("%d packets came to the daemon: %v", n, st)
		}
	}
	if n := g.stats(a).Counters["bpf_inner_forwarded"] - forwarded; n < uint64(datagrams)+2000 {
		t.Errorf("%d packets were forwarded", n)
	}
	if plain, _ := g.wire.seen(); plain == 0 {
		t.Error("the excluded connection was not plain")
	}
	if err := swap(client, server, stream(5, 1<<20), stream(6, 1<<20)); err != nil {
		t.Error(err)
	}
}

// datagrams has n datagrams echoed by B, one after the other, and returns how many
// were not lost.
func (b *bed) datagrams(n int) (got int) {
	b.t.Helper()
	ip, _ := b.addr(false)
	s, err := b.path.B.NS.ListenPacket("udp", net.JoinHostPort(ip.String(), "0"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer s.Close()
	go func() {
		buf := make([]byte, 2000)
		for {
			k, from, err := s.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = s.WriteTo(buf[:k], from)
		}
	}()
	c, err := b.path.A.NS.Dial(b.ctx, "udp", s.LocalAddr().String())
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 2000)
	for i := range n {
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Write(buf[:1+i%1400]); err != nil {
			b.t.Fatal(err)
		}
		if k, err := c.Read(buf); err == nil && k == 1+i%1400 {
			got++
		}
	}
	if got < n*9/10 {
		b.t.Errorf("%d of %d datagrams came back", got, n)
	}
	return got
}

// Tagged connections are encrypted beside others of the same addresses and ports,
// and keep their tags.
func TestGatewayVLAN(t *testing.T) {
	g := newGatewayBed(t)
	const id = 7
	var tagged [2]*lab.Iface
	for i, host := range []*lab.Iface{g.path.A, g.path.B} {
		var err error
		if tagged[i], err = host.AddVLAN(id, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 78, 0, byte(i + 1)}), 24)); err != nil {
			t.Fatal(err)
		}
	}
	a, z := g.gateway(0), g.gateway(1)
	if err := g.exchange(false, stream(1, 1<<20), stream(2, 1<<20), nil); err != nil {
		t.Error(err)
	}
	ln, err := g.path.B.NS.Listen("tcp", netip.AddrPortFrom(tagged[1].Addr4(), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, s, err := g.connectTo(ln, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	g.guarded(c, s)
	if fa, fz := g.flow(a), g.flow(z); fa.VLAN != id || fz.VLAN != id || fa.SessionID != fz.SessionID {
		t.Errorf("flows %+v and %+v", fa, fz)
	}
	if err := carry(c, s, stream(3, 1<<20), stream(4, 1<<20)); err != nil {
		t.Error(err)
	}
	if plain, _ := g.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext between the gateways", plain)
	}
	g.noFlows(a)
	g.noFlows(z)
}

// With generic XDP, for drivers that have no other, a gateway does the same.
func TestGatewayGeneric(t *testing.T) {
	g := newGatewayBed(t)
	for _, s := range g.sites {
		if err := errors.Join(s.Outer.SetFeature(lab.GRO, false), s.Inner.SetFeature(lab.GRO, false)); err != nil {
			t.Fatal(err)
		}
	}
	a, z := g.gateway(0, "--mode", "generic"), g.gateway(1, "--mode", "generic")
	if st, err := a.Status(g.ctx); err != nil || st.Mode != "generic" {
		t.Errorf("status %+v: %v", st, err)
	}
	if err := g.exchange(false, stream(1, 4<<20), stream(2, 4<<20), func() { g.flow(a); g.flow(z) }); err != nil {
		t.Error(err)
	}
	g.datagrams(100)
	if plain, _ := g.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext between the gateways", plain)
	}
	if err := errors.Join(a.Kill(), z.Kill()); err != nil {
		t.Fatal(err)
	}
	if err := g.exchange(true, stream(3, 1<<20), stream(4, 1<<20), nil); err != nil {
		t.Errorf("past gateways that died: %v", err)
	}
	// From generic to native, without the other programs' leave.
	a = g.gateway(0)
	if st, err := a.Status(g.ctx); err != nil || st.Mode != "copy" {
		t.Errorf("status %+v: %v", st, err)
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}

// A connection that is being opened when the gateway begins to hang waits for it.
func TestGatewayHungOpening(t *testing.T) {
	g := newGatewayBed(t)
	a, z := g.gateway(0), g.gateway(1)
	ln := g.echo()
	// The other gateway's answer does not come while that one hangs.
	g.halt(z)
	done := make(chan error, 1)
	go func() {
		c, err := g.path.A.NS.Dial(g.ctx, "tcp", ln.Addr().String())
		if err == nil {
			g.guarded(c)
		}
		done <- err
	}()
	g.eventually("the offer is made", func() (string, bool) {
		st, err := a.Status(g.ctx)
		return "", err == nil && st.HalfOpen == 1
	})
	g.halt(a)
	before := g.resent(g.path.A.NS)
	g.eventually("the SYN is sent again", func() (string, bool) { return "", g.resent(g.path.A.NS) >= before+2 })
	select {
	case err := <-done:
		t.Fatalf("connected past a gateway that hangs: %v", err)
	default:
	}
	g.resume(z)
	g.resume(a)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	g.flow(a)
	g.flow(z)
}
