package e2e

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// detour makes A's packets to B leave by another device, and returns what
// listens there and how to end it.
type detour struct {
	name string
	take func(s *siege, v6 bool) (at *lab.PacketSocket, end func())
}

var detours = []detour{
	{"another interface", func(s *siege, v6 bool) (*lab.PacketSocket, func()) {
		to, via := s.path.B.Addr4(), s.sideIf.Addr4()
		if v6 {
			to, via = s.path.B.Addr6(), s.sideIf.Addr6()
		}
		dst := netip.PrefixFrom(to, to.BitLen())
		if err := s.second.AddRoute(dst, via); err != nil {
			s.t.Fatal(err)
		}
		return s.side, func() {
			route := &netlink.Route{LinkIndex: s.second.Index, Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}}
			if err := s.path.A.NS.Netlink().RouteDel(route); err != nil {
				s.t.Fatal(err)
			}
		}
	}},
	{"loopback", func(s *siege, v6 bool) (*lab.PacketSocket, func()) {
		lo, err := s.path.A.NS.Iface("lo")
		if err != nil {
			s.t.Fatal(err)
		}
		at := s.open(lo)
		to := s.path.B.Addr4()
		if v6 {
			to = s.path.B.Addr6()
		}
		if err := lo.AddAddress(netip.PrefixFrom(to, to.BitLen())); err != nil {
			s.t.Fatal(err)
		}
		return at, func() {
			link, err := s.path.A.NS.Netlink().LinkByIndex(lo.Index)
			if err == nil {
				err = s.path.A.NS.Netlink().AddrDel(link, &netlink.Addr{IPNet: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}})
			}
			if err != nil {
				s.t.Fatal(err)
			}
		}
	}},
}

// leaks reports whether the canary comes past until a connection of A to a
// closed port has been refused there.
func (s *siege) leaks(at *lab.PacketSocket) bool {
	s.t.Helper()
	to, local := s.sideIf.Addr4(), false
	if at != s.side {
		to, local = netip.MustParseAddr("127.0.0.1"), true
	}
	dst := netip.AddrPortFrom(to, 9)
	go func() {
		if c, err := s.path.A.NS.Dial(s.ctx, "tcp", dst.String()); err == nil {
			c.Close()
		}
	}()
	leaked := false
	for {
		frames, err := at.Receive(time.Now().Add(30 * time.Second))
		if err != nil {
			s.t.Fatalf("the end of what was sent is not seen: %v", err)
		}
		for _, b := range frames {
			leaked = leaked || bytes.Contains(b, canary[:24])
			if x, ok := frame.Parse(b); ok && x.TCP && x.Dst(b) == dst && x.Flags(b)&frame.SYN != 0 {
				if !local {
					s.refuse(b, &x)
				}
				return leaked
			}
		}
	}
}

// refuse answers a SYN at the attacker's end.
func (s *siege) refuse(syn []byte, x *frame.Info) {
	r := frame.Segment{
		SrcMAC: s.sideIf.MAC, DstMAC: s.second.MAC, Src: x.Dst(syn), Dst: x.Src(syn),
		Ack: x.Seq(syn) + 1, Flags: frame.RST | frame.ACK,
	}
	if _, err := s.side.Send(r.Append(nil)); err != nil {
		s.t.Fatal(err)
	}
}

// pour has A's application send the canary until the connection ends, and tells
// how.
func (s *siege) pour(v *victim) <-chan error {
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := v.client.Write(canary); err != nil {
				ended <- err
				return
			}
		}
	}()
	go func() { _, _ = io.Copy(io.Discard, v.server) }()
	return ended
}

// After a change of routes an encrypted connection's plaintext does not leave
// by another device, and the stream goes on when the change is undone.
func TestRouteChange(t *testing.T) {
	eachGuard(t, nil, func(t *testing.T, s *siege, guard bool) {
		for _, d := range detours {
			for _, v6 := range []bool{false, true} {
				t.Run(d.name+map[bool]string{false: "/IPv4", true: "/IPv6"}[v6], func(t *testing.T) {
					sub := *s
					sub.bed = &bed{t: t, ctx: s.ctx, path: s.path, fwd: s.fwd, wire: s.wire}
					sub.wayOut(&d, v6, guard)
				})
			}
		}
		if n, _ := s.wire.seen(); n != 0 {
			t.Errorf("%d segments with plaintext on the wire", n)
		}
	})
}

func (s *siege) wayOut(d *detour, v6, guard bool) {
	s.t.Helper()
	v := s.victim(v6)
	ended := s.pour(v)
	moved := func() uint64 {
		info, err := s.daemon.Session(s.ctx, v.client.LocalAddr(), v.client.RemoteAddr())
		if err != nil {
			s.t.Fatal(err)
		}
		return info.BytesOut
	}
	s.eventually("data is sent", func() (string, bool) { return "", moved() > 100000 })
	before := s.dropped()
	at, end := d.take(s, v6)
	if !guard {
		leaked, over := false, false
		s.eventually("plaintext leaves, or the connection ends", func() (string, bool) {
			select {
			case <-ended:
				over = true
			default:
			}
			leaked = leaked || s.leaks(at)
			return "", leaked || over
		})
		end()
		if !leaked {
			// Something of the host's own, a reset or an error, went first.
			s.t.Log("the connection ended before it sent anything; once more")
			s.wayOut(d, v6, guard)
		}
		return
	}
	s.eventually("the guard counts it", func() (string, bool) { return "", s.dropped() > before })
	if s.leaks(at) {
		s.t.Error("plaintext left")
	}
	end()
	from := moved()
	s.eventually("the stream goes on", func() (string, bool) { return "", moved() > from+100000 })
}

// pinnedCounts sums what the guards that are pinned in the lab have counted.
func (s *siege) pinnedCounts() (sum uint64) {
	s.t.Helper()
	found, err := daemon.Pinned(s.path.A.NS.Lab())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range found {
		if filepath.Base(path) != "netfilter_in4" {
			continue
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			s.t.Fatal(err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			s.t.Fatal(err)
		}
		program, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			s.t.Fatal(err)
		}
		sum += countsOf(s.t, program)
		program.Close()
	}
	return sum
}

func countsOf(t *testing.T, program *ebpf.Program) (sum uint64) {
	info, err := program.Info()
	if err != nil {
		t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if info, err := m.Info(); err != nil || info.Name != "guard_counters" {
			continue
		}
		for i := range m.MaxEntries() {
			var perCPU []uint64
			if err := m.Lookup(i, &perCPU); err != nil {
				t.Fatal(err)
			}
			for _, n := range perCPU {
				sum += n
			}
		}
	}
	return sum
}

// With the daemon dead all layers of the guard stand, until the next start or a
// clean-up removes them and ends what they kept shut (T22). With the guard off
// the same connection takes forged data and leaks at once.
func TestGuardOutlives(t *testing.T) {
	for _, how := range []string{"next start", "cleanup", "control, guard off"} {
		t.Run(how, func(t *testing.T) {
			mode := "on"
			if strings.HasPrefix(how, "control") {
				mode = "off"
			}
			s := newSiege(t, "--guard", mode)
			rest, busy := s.victim(false), s.victim(false)
			ended := s.pour(busy)
			s.eventually("data is sent", func() (string, bool) {
				f, err := s.daemon.Session(s.ctx, busy.client.LocalAddr(), busy.client.RemoteAddr())
				return "", err == nil && f.BytesOut > 100000
			})
			if err := s.daemon.Kill(); err != nil {
				t.Fatal(err)
			}
			forged := data.make(s, rest)
			if mode == "off" {
				doors[0].send(s, forged)
				if !data.with(s, rest, true) {
					t.Error("forged data did not come in")
				}
				s.eventually("plaintext leaves", func() (string, bool) {
					n, _ := s.wire.seen()
					return "", n != 0
				})
				return
			}

			before := s.pinnedCounts()
			doors[0].send(s, forged)
			s.eventually("the guard counts the forgery", func() (string, bool) { return "", s.pinnedCounts() > before })
			s.fence()
			if data.with(s, rest, false) {
				t.Error("forged data came in")
			}
			at, end := detours[0].take(s, false)
			before = s.pinnedCounts()
			s.eventually("the guard counts what would leave", func() (string, bool) { return "", s.pinnedCounts() > before })
			if s.leaks(at) {
				t.Error("plaintext left by another interface")
			}
			end()
			if n, _ := s.wire.seen(); n != 0 {
				t.Errorf("%d segments with plaintext on the wire", n)
			}

			if how == "cleanup" {
				out, err := daemon.Cleanup(s.ctx, program, s.path.A)
				if err != nil || !strings.Contains(out, "guard removed from eth0, 2 connections ended") {
					t.Errorf("%v: %s", err, out)
				}
			} else {
				s.daemon = s.bed.daemon(s.path.A, "--guard", "on")
				st, err := s.daemon.Status(s.ctx)
				if err != nil || st.Ended != 2 || st.Guard != "active" {
					t.Errorf("ended %d, guard %s: %v", st.Ended, st.Guard, err)
				}
				if err := s.daemon.Stop(); err != nil {
					t.Error(err)
				}
			}
			if _, err := read(rest, true); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the orphaned connection ends with %v", err)
			}
			if err := s.ends("the orphaned connection that sends", ended); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the orphaned connection that sends ends with %v", err)
			}
			// What is left is of the daemon on B.
			found, err := daemon.Pinned(s.path.A.NS.Lab())
			if err != nil {
				t.Fatal(err)
			}
			guards := 0
			for _, path := range found {
				if filepath.Base(path) == "cgroup_in" {
					guards++
				}
			}
			if guards != 1 {
				t.Errorf("%d guards are pinned: %v", guards, found)
			}
			if d, g := attached(t, s.path.A); len(d)+len(g) != 0 {
				t.Errorf("attached: %v %v", d, g)
			}
			if err := s.exchange(false, make([]byte, 1000), make([]byte, 1000), nil); err != nil {
				t.Errorf("plain connection afterwards: %v", err)
			}
		})
	}
}
