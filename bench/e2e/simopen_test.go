package e2e

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

const (
	simPortA = 7001
	simPortB = 7002
)

// simultaneous has both hosts connect to each other's bound port; ForwardCrossing
// sees to it that the SYNs cross.
func (b *bed) simultaneous(v6 bool) (a, z net.Conn, err error) {
	ipA, ipB := b.path.A.Addr4(), b.path.B.Addr4()
	if v6 {
		ipA, ipB = b.path.A.Addr6(), b.path.B.Addr6()
	}
	epA := &net.TCPAddr{IP: ipA.AsSlice(), Port: simPortA}
	epB := &net.TCPAddr{IP: ipB.AsSlice(), Port: simPortB}
	type dialed struct {
		c   net.Conn
		err error
	}
	second := make(chan dialed, 1)
	go func() {
		c, err := b.path.B.NS.DialFrom(b.ctx, "tcp", epB, epA.String())
		second <- dialed{c, err}
	}()
	a, err = b.path.A.NS.DialFrom(b.ctx, "tcp", epA, epB.String())
	d := <-second
	if err = errors.Join(err, d.err); err != nil {
		for _, c := range []net.Conn{a, d.c} {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, err
	}
	b.guarded(a, d.c)
	return a, d.c, nil
}

func newCrossingBed(t *testing.T) *bed {
	t.Helper()
	return newBedWith(t, lab.Options{}, lab.ForwarderOptions{}, (*lab.Path).ForwardCrossing)
}

const roleB = "[[rule]]\nrole = \"B\"\n"

// Two kernels open one connection at the same time. With the b bit set on one
// side it is encrypted, and that host is host B (RFC 8547 section 4.3).
func TestSimultaneousOpen(t *testing.T) {
	for _, hostB := range []string{"a", "b"} {
		t.Run(hostB+" is host B", func(t *testing.T) {
			b := newCrossingBed(t)
			var flags [2][]string
			roles := [2]string{"A", "A"}
			at := map[string]int{"a": 0, "b": 1}[hostB]
			flags[at], roles[at] = config(t, roleB), "B"
			a, z := b.daemon(b.path.A, flags[0]...), b.daemon(b.path.B, flags[1]...)
			eachIP(t, func(t *testing.T, v6 bool) {
				_, before := b.wire.seen()
				ca, cz, err := b.simultaneous(v6)
				if err != nil {
					t.Fatal(err)
				}
				fa, fz := b.flow(a), b.flow(z)
				if fa.Role != roles[0] || fz.Role != roles[1] || fa.SessionID == "" || fa.SessionID != fz.SessionID {
					t.Errorf("flows %+v and %+v, want roles %v", fa, fz, roles)
				}
				if want := crypto.AllTEPs[0].String(); fa.TEP != want || fz.TEP != want {
					t.Errorf("negotiated %s and %s, both prefer %s", fa.TEP, fz.TEP, want)
				}
				// Each side speaks first once, to one that has said nothing since
				// the handshake.
				from, to := ca, cz
				if v6 {
					from, to = cz, ca
				}
				greeting := stream(3, 100)
				if _, err := from.Write(greeting); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(greeting))
				if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, greeting) {
					t.Fatalf("the greeting did not arrive: %v", err)
				}
				if err := swap(ca, cz, stream(1, 2<<20), stream(2, 2<<20)); err != nil {
					t.Fatal(err)
				}
				ca.Close()
				cz.Close()
				b.idle(a, z)
				for _, d := range []lab.Dir{lab.AtoB, lab.BtoA} {
					if !crossed(b.wire.since(before), d) {
						t.Errorf("no SYN and SYN-ACK with the same ENO option %v", d)
					}
				}
			})
			b.encryptedOnly(a, z, 2)
		})
	}
}

// The SYN-ACK of a simultaneous open overtakes its SYN: for host a this is a
// connection it opened alone, for host b, whose SYN arrives later, one that both
// did. Each has sent and received an ACK with ENO, so it is encrypted (RFC 8547
// section 4.6).
func TestSimultaneousOpenOvertaken(t *testing.T) {
	var (
		mu   sync.Mutex
		held [2][]byte
		bed  *bed
	)
	inject := func(d lab.Dir, frame []byte) {
		if err := bed.fwd.Inject(d, frame); err != nil {
			t.Error(err)
		}
	}
	late := func(d lab.Dir, b []byte) lab.Verdict {
		x, ok := frame.Parse(b)
		if !ok || !x.TCP || x.Flags(b)&frame.SYN == 0 {
			return lab.Pass
		}
		mu.Lock()
		defer mu.Unlock()
		synack := x.Flags(b)&frame.ACK != 0
		switch {
		case !synack && held[d] == nil:
			held[d] = bytes.Clone(b)
			if held[lab.AtoB] != nil && held[lab.BtoA] != nil {
				inject(lab.AtoB, held[lab.AtoB])
			}
			return lab.Drop
		case synack && d == lab.BtoA && held[d] != nil:
			inject(d, b)
			inject(d, held[d])
			held[d] = nil
			return lab.Drop
		case !synack:
			return lab.Drop
		}
		return lab.Pass
	}
	bed = newBedWith(t, lab.Options{}, lab.ForwarderOptions{Hook: late}, func(p *lab.Path, o lab.ForwarderOptions) (*lab.Forwarder, error) {
		return p.Forward(o)
	})
	a, z := bed.daemon(bed.path.A), bed.daemon(bed.path.B, config(t, roleB)...)
	ca, cz, err := bed.simultaneous(false)
	if err != nil {
		t.Fatal(err)
	}
	if fa, fz := bed.flow(a), bed.flow(z); fa.Role != "A" || fz.Role != "B" || fa.SessionID == "" || fa.SessionID != fz.SessionID {
		t.Errorf("flows %+v and %+v", fa, fz)
	}
	if err := swap(ca, cz, stream(1, 2<<20), stream(2, 2<<20)); err != nil {
		t.Fatal(err)
	}
	ca.Close()
	cz.Close()
	bed.idle(a, z)
	bed.encryptedOnly(a, z, 1)
	if offers := bed.wire.since(0); crossed(offers, lab.AtoB) || !crossed(offers, lab.BtoA) {
		t.Error("host a took the SYN, or host b did not")
	}
}

// crossed reports whether a host sent a SYN and a SYN-ACK with one and the same
// ENO option.
func crossed(offers []offer, d lab.Dir) bool {
	var syn, synack string
	for _, o := range offers {
		switch {
		case o.dir != d:
		case o.synack:
			synack = string(o.option)
		default:
			syn = string(o.option)
		}
	}
	return syn != "" && syn == synack
}

// With the same b bit on both sides, whichever, a simultaneous open is plain TCP.
func TestSimultaneousOpenOfEquals(t *testing.T) {
	for _, c := range []struct{ name, config string }{{"both A", ""}, {"both B", roleB}} {
		t.Run(c.name, func(t *testing.T) {
			b := newCrossingBed(t)
			a, z := b.both(config(t, c.config)...)
			ca, cz, err := b.simultaneous(false)
			if err != nil {
				t.Fatal(err)
			}
			// No canary: this data may be seen.
			if err := swap(ca, cz, make([]byte, 1<<20), make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			b.plainFor(a, slowpath.ReasonSimultaneous)
			b.plainFor(z, slowpath.ReasonSimultaneous)
		})
	}
}

// An opener with b = 1 and a listener, who always has it, have the same role:
// plain TCP (RFC 8547 section 4.3).
func TestSameRole(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.daemon(b.path.A, config(t, roleB)...), b.daemon(b.path.B)
	b.plainMeet(b.echo())
	b.plainFor(a, slowpath.ReasonPeerNoENO)
	b.plainFor(z, slowpath.ReasonRoleConflict)
}

// plainFor checks that a daemon made one connection plain, for that reason.
func (b *bed) plainFor(d *daemon.Daemon, reason string) {
	b.t.Helper()
	st := b.stats(d)
	if len(st.Reasons) != 1 || st.Reasons[reason] != 1 {
		b.t.Errorf("reasons %v, want one %s", st.Reasons, reason)
	}
}

// In mandatory application-aware mode a connection is encrypted only if the
// other side is application-aware, too (RFC 8547 section 4.2).
func TestApplicationAware(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, config(t, `
[[rule]]
remote-ports = "6010-6019"
app-aware = "off"
[[rule]]
remote-ports = "6020-6029"
app-aware = "on"
[[rule]]
remote-ports = "6030-6039"
app-aware = "mandatory"
`)...)
	z := b.daemon(b.path.B, config(t, `
[[rule]]
local-ports = "6011,6021,6031"
app-aware = "off"
[[rule]]
local-ports = "6012,6022,6032"
app-aware = "on"
[[rule]]
local-ports = "6013,6023,6033"
app-aware = "mandatory"
`)...)
	for _, c := range []struct {
		name, port       string
		reasonA, reasonZ string // of a plain connection
	}{
		{name: "off and off", port: "6011"},
		{name: "off and on", port: "6012"},
		{name: "off and mandatory", port: "6013", reasonA: slowpath.ReasonPeerNoENO, reasonZ: slowpath.ReasonNotAppAware},
		{name: "on and off", port: "6021"},
		{name: "on and on", port: "6022"},
		{name: "on and mandatory", port: "6023"},
		{name: "mandatory and off", port: "6031", reasonA: slowpath.ReasonNotAppAware, reasonZ: slowpath.ReasonNoENOInAck},
		{name: "mandatory and on", port: "6032"},
		{name: "mandatory and mandatory", port: "6033"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ln := b.echoOn(c.port)
			beforeA, beforeZ := b.stats(a), b.stats(z)
			if c.reasonA == "" {
				b.meet(a, z, ln)
			} else {
				b.plainMeet(ln)
			}
			b.idle(a, z)
			for _, s := range []struct {
				before, after fastpath.Stats
				reason        string
			}{{beforeA, b.stats(a), c.reasonA}, {beforeZ, b.stats(z), c.reasonZ}} {
				want := s.reason
				if want == "" {
					want = fastpath.ReasonClosed
				}
				for r, n := range s.after.Reasons {
					if got := n - s.before.Reasons[r]; (got != 0) != (r == want) {
						t.Errorf("%d connections ended with %s, want one with %s", got, r, want)
					}
				}
			}
		})
	}
}

// plainMeet is meet for a connection that may be read on the way.
func (b *bed) plainMeet(ln net.Listener) {
	b.t.Helper()
	c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
	if err != nil {
		b.t.Fatal(err)
	}
	b.guarded(c)
	b.echoed(c, make([]byte, 20000))
	c.Close()
}
