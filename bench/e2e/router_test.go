package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// routed is a bed whose hosts are in two networks with a router between them;
// the watched wire is between A and the router.
type routed struct {
	*bed
	router   *lab.Namespace
	toA, toB *lab.Iface // of the router
}

func newRouted(t *testing.T, o lab.Options, f lab.ForwarderOptions) *routed {
	t.Helper()
	b := newBed(t, o, f)
	r := &routed{bed: b, router: b.path.B.NS, toA: b.path.B}
	l := r.router.Lab()
	right, err := l.Namespace("right")
	if err != nil {
		t.Fatal(err)
	}
	toB, host, err := l.Connect(r.router, right, lab.LinkOptions{MTU: o.MTU, Neighbours: true, A: lab.EndOptions{Name: "right"}, B: o.B})
	if err != nil {
		t.Fatal(err)
	}
	r.toB = toB
	for _, s := range [][2]string{{"net/ipv4/ip_forward", "1"}, {"net/ipv6/conf/all/forwarding", "1"}} {
		if err := r.router.Sysctl(s[0], s[1]); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range []struct {
		i   *lab.Iface
		dst netip.Prefix
		via netip.Addr
	}{
		{b.path.A, host.IP4.Masked(), r.toA.Addr4()}, {b.path.A, host.IP6.Masked(), r.toA.Addr6()},
		{host, b.path.A.IP4.Masked(), toB.Addr4()}, {host, b.path.A.IP6.Masked(), toB.Addr6()},
	} {
		if err := e.i.AddRoute(e.dst, e.via); err != nil {
			t.Fatal(err)
		}
	}
	b.path = &lab.Path{A: b.path.A, B: host}
	return r
}

// sameSession fails the test unless both daemons have the same encrypted session.
func (b *bed) sameSession(a, z *daemon.Daemon) {
	b.t.Helper()
	fa, fz := b.flow(a), b.flow(z)
	if fa.SessionID == "" || fa.SessionID != fz.SessionID {
		b.t.Errorf("flows %+v and %+v", fa, fz)
	}
}

// narrowing is a transfer from A to B during which the router's link to B gets a
// smaller MTU. What comes the other way is small enough: a veth drops silently
// what its MTU does not allow.
func (r *routed) narrowing(t *testing.T, v6 bool, mtu int, hold func()) {
	t.Helper()
	client, server, err := r.connect(v6)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	defer server.Close()
	defer context.AfterFunc(r.ctx, func() { client.Close(); server.Close() })()
	want := stream(1, 6<<20)
	hold()
	sent := make(chan error, 1)
	go func() {
		_, err := client.Write(want)
		sent <- errors.Join(err, client.(*net.TCPConn).CloseWrite())
	}()
	got := make([]byte, 2<<20, len(want)+1)
	if _, err := io.ReadFull(server, got); err != nil {
		t.Fatal(err)
	}
	if err := r.toB.SetMTU(mtu); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(server)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatalf("after %d of %d bytes: %v", len(got)+len(rest), len(want), err)
	}
	if got = append(got, rest...); string(got) != string(want) {
		t.Errorf("%d bytes of %d, other data", len(got), len(want))
	}
}

// A router on the way has a smaller MTU behind it and says so by ICMP, from the
// start or in the middle of a transfer: the translator cuts what it sends, and
// the kernel learns of it (T21).
func TestPathMTU(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		t.Run("from the start", func(t *testing.T) {
			r := newRouted(t, lab.Options{}, lab.ForwarderOptions{})
			a, _ := r.both()
			if err := r.toB.SetMTU(1400); err != nil {
				t.Fatal(err)
			}
			if err := r.exchange(v6, stream(1, 4<<20), nil, func() { r.flow(a) }); err != nil {
				t.Fatal(err)
			}
			if st := r.stats(a); st.Counters["icmp_in"] == 0 {
				t.Error("the router's ICMP error did not come to the daemon")
			}
		})
		t.Run("in mid-flow", func(t *testing.T) {
			r := newRouted(t, lab.Options{}, lab.ForwarderOptions{})
			a, z := r.both()
			r.narrowing(t, v6, 1300, func() { r.sameSession(a, z) })
			if st := r.stats(a); st.Counters["icmp_in"] == 0 {
				t.Error("the router's ICMP error did not come to the daemon")
			}
		})
	})
}

// A black hole: the router drops what does not fit, and its ICMP errors are
// lost. The kernel finds out by probing (RFC 4821), and its smaller segments
// must get through, also those that repeat what was sealed in larger frames.
func TestPathMTUBlackhole(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		r := newRouted(t, lab.Options{}, lab.ForwarderOptions{})
		// Probe after the second time-out, to be sooner done.
		for _, s := range [][2]string{{"tcp_mtu_probing", "1"}, {"tcp_retries1", "1"}} {
			if err := r.path.A.NS.Sysctl("net/ipv4/"+s[0], s[1]); err != nil {
				t.Fatal(err)
			}
		}
		nf := newNetfilter(t, r.router, nftables.TableFamilyINet)
		out := nf.chain("out", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
		nf.rule(out, protocol(unix.IPPROTO_ICMP), dropped())
		nf.rule(out, protocol(unix.IPPROTO_ICMPV6), dropped())
		nf.apply()
		a, z := r.both()
		r.narrowing(t, v6, 1280, func() { r.sameSession(a, z) })
		if n := nf.counts(out); n[0]+n[1] == 0 {
			t.Error("the router had no ICMP error to lose")
		}
		if st := r.stats(a); st.Counters["icmp_in"] != 0 {
			t.Error("an ICMP error came to the daemon")
		}
	})
}

// The path swallows everything for a while, until the kernel has retransmitted
// several times.
func TestOutage(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	client, server, err := b.connect(false)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	defer server.Close()
	defer context.AfterFunc(b.ctx, func() { client.Close(); server.Close() })()
	b.sameSession(a, z)
	up, down := stream(1, 8<<20), stream(2, 8<<20)
	done := make(chan error, 1)
	go func() { done <- carry(client, server, up, down) }()
	b.eventually("data flows", func() (string, bool) { return "no data", b.wire.data() > 2<<20 })
	b.fwd.Set(lab.AtoB, lab.Impair{Drop: 1})
	b.fwd.Set(lab.BtoA, lab.Impair{Drop: 1})
	before, err := b.path.A.NS.TCPCounters()
	if err != nil {
		t.Fatal(err)
	}
	b.eventually("the kernel has tried several times", func() (string, bool) {
		n, err := b.path.A.NS.TCPCounters()
		if err != nil {
			return err.Error(), false
		}
		return "too few time-outs", n["TcpExt.TCPTimeouts"]-before["TcpExt.TCPTimeouts"] >= 3
	})
	b.fwd.Set(lab.AtoB, lab.Impair{})
	b.fwd.Set(lab.BtoA, lab.Impair{})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 1)
}

// The daemon runs on a host that forwards for containers, from an address of its own
// or from theirs: their connections are encrypted, too, in either direction.
func TestContainers(t *testing.T) {
	for name, masquerade := range map[string]bool{"routed": false, "masqueraded": true} {
		t.Run(name, func(t *testing.T) {
			eachIP(t, func(t *testing.T, v6 bool) {
				r := newRouted(t, lab.Options{}, lab.ForwarderOptions{})
				seen := r.path.B.Addr4()
				if v6 {
					seen = r.path.B.Addr6()
				}
				if masquerade {
					family := nftables.TableFamilyIPv4
					if seen = r.toA.Addr4(); v6 {
						family, seen = nftables.TableFamilyIPv6, r.toA.Addr6()
					}
					nf := newNetfilter(t, r.router, family)
					post := nf.chain("post", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
					nf.rule(post, protocol(unix.IPPROTO_TCP), outOf(r.toA.Name), []expr.Any{&expr.Masq{}})
					nf.apply()
				}
				a, host := r.daemon(r.path.A), r.daemon(r.toA)
				openers := []*bed{r.turned(), r.bed}
				if masquerade {
					openers = openers[:1]
				}
				for i, b := range openers {
					client, server, err := b.connect(v6)
					if err != nil {
						t.Fatal(err)
					}
					if s := server.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); i == 0 && s != seen {
						t.Errorf("connected from %v, want %v", s, seen)
					}
					r.sameSession(a, host)
					if err := carry(client, server, stream(1, 2<<20), stream(2, 2<<20)); err != nil {
						t.Fatal(err)
					}
					r.noFlows(a)
					r.noFlows(host)
				}
				r.encryptedOnly(a, host, uint64(len(openers)))
			})
		})
	}
}

// natPorts are those that the NAT gives to connections of A.
const natFirst, natLast = 40000, 40100

// Between the hosts is a NAT: A seems to connect to the router, B seems to be
// connected to by it, from another port.
func TestNAT(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		r := newRouted(t, lab.Options{}, lab.ForwarderOptions{})
		family, natFamily, seen, from := nftables.TableFamilyIPv4, uint32(unix.NFPROTO_IPV4), r.toA.Addr4(), r.toB.Addr4()
		if v6 {
			family, natFamily, seen, from = nftables.TableFamilyIPv6, unix.NFPROTO_IPV6, r.toA.Addr6(), r.toB.Addr6()
		}
		ip, _ := r.addr(v6)
		ln, err := r.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		nf := newNetfilter(t, r.router, family)
		pre := nf.chain("pre", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept)
		post := nf.chain("post", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
		port := func(p int) []byte { return binaryutil.BigEndian.PutUint16(uint16(p)) }
		nf.rule(pre, toPort(80), []expr.Any{
			&expr.Immediate{Register: 1, Data: ip.AsSlice()},
			&expr.Immediate{Register: 2, Data: port(ln.Addr().(*net.TCPAddr).Port)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: natFamily, RegAddrMin: 1, RegProtoMin: 2, Specified: true},
		})
		nf.rule(post, protocol(unix.IPPROTO_TCP), outOf("right"), []expr.Any{
			&expr.Immediate{Register: 1, Data: from.AsSlice()},
			&expr.Immediate{Register: 2, Data: port(natFirst)},
			&expr.Immediate{Register: 3, Data: port(natLast)},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: natFamily, RegAddrMin: 1, RegProtoMin: 2, RegProtoMax: 3, Specified: true},
		})
		nf.apply()
		a, z := r.both()
		// The second connection resumes the session of the first.
		for i := range 2 {
			client, server, err := r.connectTo(ln, net.JoinHostPort(seen.String(), "80"))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			defer server.Close()
			defer context.AfterFunc(r.ctx, func() { client.Close(); server.Close() })()
			if s := server.RemoteAddr().(*net.TCPAddr); s.AddrPort().Addr() != from || s.Port < natFirst || s.Port > natLast {
				t.Errorf("connected from %v, which the server sees as %v", client.LocalAddr(), s)
			}
			r.sameSession(a, z)
			if f := r.flow(z); f.Resumed != (i > 0) {
				t.Errorf("connection %d: %+v", i, f)
			}
			if err := carry(client, server, stream(1, 3<<20), stream(2, 3<<20)); err != nil {
				t.Fatal(err)
			}
			r.noFlows(a)
			r.noFlows(z)
		}
		r.encryptedOnly(a, z, 2)
	})
}

// A firewall on the router follows each connection, with strict windows, and
// drops what belongs to none: it finds nothing to drop.
func TestStatefulFirewall(t *testing.T) {
	for _, wire := range []struct {
		name string
		im   lab.Impair
	}{{"clean", lab.Impair{}}, {"impaired", lab.Impair{Drop: 0.01, Reorder: 0.02, Duplicate: 0.01}}} {
		t.Run(wire.name, func(t *testing.T) {
			eachIP(t, func(t *testing.T, v6 bool) {
				r := newRouted(t, lab.Options{}, lab.ForwarderOptions{AtoB: wire.im, BtoA: wire.im})
				nf := newNetfilter(t, r.router, nftables.TableFamilyINet)
				fw := nf.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
				nf.rule(fw, tracked(expr.CtStateBitINVALID), dropped())
				nf.rule(fw, tracked(expr.CtStateBitESTABLISHED), accepted())
				nf.rule(fw, tracked(expr.CtStateBitNEW), protocol(unix.IPPROTO_TCP), transport(13, []byte{2}), into(r.toA.Name), accepted())
				nf.rule(fw, dropped())
				nf.apply()
				for _, s := range [][2]string{{"tcp_be_liberal", "0"}, {"tcp_loose", "0"}, {"checksum", "1"}} {
					if err := r.router.Sysctl("net/netfilter/nf_conntrack_"+s[0], s[1]); err != nil {
						t.Fatal(err)
					}
				}
				a, z := r.both()
				for range 2 {
					if err := r.exchange(v6, stream(1, 4<<20), stream(2, 4<<20), func() { r.sameSession(a, z) }); err != nil {
						t.Fatal(err)
					}
				}
				n := nf.counts(fw)
				if n[1] == 0 || n[2] != 2 || wire.name == "clean" && n[0]+n[3] != 0 {
					t.Errorf("packets invalid, established, new, other: %v", n)
				}
				r.encryptedOnly(a, z, 2)
			})
		})
	}
}
