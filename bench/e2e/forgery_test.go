package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

// openings has an attacker complete the handshake of a connection that is
// offered encryption, by another interface and without encryption, and bring the
// first bytes of the stream with it.
var openings = []struct {
	name string
	// begin starts a connection whose peer's answer the path loses, and returns
	// what the attacker sends, and the end of the application's attempt.
	begin func(s *siege, v6 bool) (forged [][]byte, opened <-chan net.Conn)
}{
	{"active", func(s *siege, v6 bool) ([][]byte, <-chan net.Conn) {
		s.fwd.Set(lab.BtoA, lab.Impair{Drop: 1})
		ip, _ := s.addr(v6)
		ln := s.echoServer(net.JoinHostPort(ip.String(), "0"))
		opened := make(chan net.Conn, 1)
		from := len(s.bed.wire.since(0))
		go func() {
			if c, err := s.path.A.NS.Dial(s.ctx, "tcp", ln.Addr().String()); err == nil {
				opened <- c
			}
		}()
		syn, x := s.offered(from, lab.AtoB)
		answer := frame.Segment{Src: x.Dst(syn), Dst: x.Src(syn), Seq: 7000, Ack: x.Seq(syn) + 1, Flags: frame.SYN | frame.ACK, Window: 1000}
		first := answer
		first.Seq, first.Flags, first.Payload = 7001, frame.ACK|frame.PSH, []byte(forgedData)
		return [][]byte{bare(answer), bare(first)}, opened
	}},
	{"passive", func(s *siege, v6 bool) ([][]byte, <-chan net.Conn) {
		s.fwd.Set(lab.AtoB, lab.Impair{Drop: 1})
		ip := s.path.A.Addr4()
		if v6 {
			ip = s.path.A.Addr6()
		}
		ln, err := s.path.A.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { ln.Close() })
		opened := make(chan net.Conn, 1)
		from := len(s.bed.wire.since(0))
		go func() {
			if c, err := ln.Accept(); err == nil {
				opened <- c
			}
		}()
		go func() {
			if c, err := s.path.B.NS.Dial(s.ctx, "tcp", ln.Addr().String()); err == nil {
				_, _ = io.Copy(c, c)
				c.Close()
			}
		}()
		answer, x := s.offered(from, lab.AtoB)
		first := frame.Segment{
			Src: x.Dst(answer), Dst: x.Src(answer), Seq: x.Ack(answer), Ack: x.Seq(answer) + 1,
			Flags: frame.ACK | frame.PSH, Window: 1000, Payload: []byte(forgedData),
		}
		return [][]byte{bare(first)}, opened
	}},
}

func bare(f frame.Segment) []byte {
	f.SrcMAC, f.DstMAC = make(net.HardwareAddr, 6), make(net.HardwareAddr, 6)
	return f.Append(nil)
}

// offered waits for the first SYN or SYN-ACK of a direction, after n of them,
// that offers encryption.
func (s *siege) offered(n int, dir lab.Dir) (b []byte, x frame.Info) {
	s.t.Helper()
	s.eventually("encryption is offered", func() (string, bool) {
		for _, o := range s.bed.wire.since(n) {
			if o.dir == dir {
				b = o.frame
				return "", true
			}
		}
		return "", false
	})
	x, _ = frame.Parse(b)
	return b, x
}

// A forged answer by a side door does not open a connection that was offered
// encryption, so that no forged bytes stand before a stream whose session ID is
// compared later. When the true answer comes, it is encrypted.
func TestForgedOpening(t *testing.T) {
	eachGuard(t, nil, func(t *testing.T, s *siege, guard bool) {
		for _, o := range openings {
			for _, v6 := range []bool{false, true} {
				t.Run(o.name+map[bool]string{false: "/IPv4", true: "/IPv6"}[v6], func(t *testing.T) {
					sub := *s
					sub.bed = &bed{t: t, ctx: s.ctx, path: s.path, fwd: s.fwd, wire: s.wire}
					sub.opening(o.begin, v6, guard)
				})
			}
		}
	})
}

func (s *siege) opening(begin func(*siege, bool) ([][]byte, <-chan net.Conn), v6, guard bool) {
	s.t.Helper()
	before := s.dropped()
	forged, opened := begin(s, v6)
	for _, f := range forged {
		doors[0].send(s, f)
	}
	heal := func() {
		s.fwd.Set(lab.AtoB, lab.Impair{})
		s.fwd.Set(lab.BtoA, lab.Impair{})
	}
	if !guard {
		defer heal()
		select {
		case c := <-opened:
			defer c.Close()
			_ = c.(*net.TCPConn).SetLinger(0)
			if got, err := read(&victim{client: c}, true); err != nil || got != forgedData {
				s.t.Errorf("with the guard off the application reads %q, %v", got, err)
			}
		case <-time.After(30 * time.Second):
			s.t.Error("with the guard off it did not open the connection")
		}
		return
	}
	s.eventually("the guard counts it", func() (string, bool) { return "", s.dropped() > before })
	s.fence()
	select {
	case <-opened:
		s.t.Fatal("a forged answer opened the connection")
	default:
	}
	heal()
	select {
	case c := <-opened:
		defer c.Close()
		_ = c.(*net.TCPConn).SetDeadline(time.Now().Add(30 * time.Second))
		if err := said(c, c, "an echo"); err != nil {
			s.t.Error(err)
		}
		if _, err := s.daemon.Session(s.ctx, c.LocalAddr(), c.RemoteAddr()); err != nil {
			s.t.Error(err)
		}
	case <-time.After(30 * time.Second):
		s.t.Error("the true answer did not open the connection")
	}
}

// With generic XDP what the daemon injects is told from the wire's packets by a
// random source address. Who knows it gets past XDP, and not past the guard.
func TestForgedSourceAddress(t *testing.T) {
	eachGuard(t, []string{"--mode", "generic"}, func(t *testing.T, s *siege, guard bool) {
		nic := s.open(s.path.A)
		secret := func(v *victim) net.HardwareAddr {
			for deadline := time.Now().Add(30 * time.Second); ; {
				frames, err := nic.Receive(deadline)
				if err != nil {
					t.Fatalf("the address of injected packets is not seen: %v", err)
				}
				for _, b := range frames {
					if x, ok := frame.Parse(b); ok && x.TCP && string(x.Payload(b)) == "answer" && x.Dst(b) == v.local {
						return net.HardwareAddr(bytes.Clone(b[6:12]))
					}
				}
			}
		}
		for _, v6 := range []bool{false, true} {
			v := s.victim(v6)
			mac := secret(v)
			if bytes.Equal(mac, s.path.B.MAC) {
				t.Fatal("injected packets have the peer's address")
			}
			before := s.dropped()
			s.transmit(s.cable, s.path.A, mac, data.make(s, v))
			if !guard {
				if !data.with(s, v, true) {
					t.Error("with the guard off it did nothing")
				}
				continue
			}
			s.eventually("the guard counts it", func() (string, bool) { return "", s.dropped() > before })
			s.fence()
			if data.with(s, v, false) {
				t.Fatal("it came in")
			}
			s.say(v.server, v.client, "the stream goes on")
		}
	})
}

// The tests below come by the wire, where the translator judges and the guard
// has no part. Their control is the same segment on a plain connection between
// the same hosts, which takes it.

// plainPort is excluded from encryption.
const plainPort = "5555"

// onWire is a connection at rest whose numbers on the wire are known.
func (s *siege) onWire(encrypted, v6 bool) *victim {
	s.t.Helper()
	far := s.open(s.path.MidB)
	port := plainPort
	if encrypted {
		port = "0"
	}
	ip, _ := s.addr(v6)
	ln, err := s.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), port))
	if err != nil {
		s.t.Fatal(err)
	}
	defer ln.Close()
	v := &victim{}
	if v.client, err = s.path.A.NS.Dial(s.ctx, "tcp", ln.Addr().String()); err != nil {
		s.t.Fatal(err)
	}
	if v.server, err = ln.Accept(); err != nil {
		s.t.Fatal(err)
	}
	for _, c := range []net.Conn{v.client, v.server} {
		_ = c.(*net.TCPConn).SetLinger(0)
	}
	s.guarded(v.client, v.server)
	v.local, v.remote = v.client.LocalAddr().(*net.TCPAddr).AddrPort(), ln.Addr().(*net.TCPAddr).AddrPort()
	s.say(v.client, v.server, "question")
	s.say(v.server, v.client, "answer")
	// Both messages have arrived, so their segments are queued here. The answer
	// acknowledges the question.
	for {
		frames, err := far.Receive(time.Now().Add(10 * time.Millisecond))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return v
		}
		if err != nil {
			s.t.Fatal(err)
		}
		for _, b := range frames {
			x, ok := frame.Parse(b)
			if !ok || !x.TCP || x.Src(b) != v.remote || len(x.Payload(b)) == 0 {
				continue
			}
			v.seq, v.ack = x.Seq(b)+uint32(len(x.Payload(b))), x.Ack(b)
			if ts, ok := frame.FindOption(x.Options(b), frame.OptTimestamp); ok {
				v.opts = append([]byte{frame.OptNOP, frame.OptNOP, frame.OptTimestamp, 10}, ts...)
			}
		}
	}
}

// garbage is a whole frame (RFC 8548, section 4.2) that nobody sealed.
func garbage(rekey byte) string {
	b := []byte{rekey, 0, 0}
	binary.BigEndian.PutUint16(b[1:], uint16(len(forgedData)))
	return string(b) + forgedData
}

// aborted fails unless A's application reads nothing and then a reset, which is
// no end of file, with the reason noted.
func (s *siege) aborted(v *victim) {
	s.t.Helper()
	if got, err := read(v, true); got != "" || !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
		s.t.Errorf("the application reads %q, %v, want a reset", got, err)
	}
	s.eventually("the reason is noted", func() (string, bool) {
		fs, err := s.daemon.Flows(s.ctx)
		for _, f := range fs {
			if f.Local == v.local.String() && f.Remote == v.remote.String() {
				return f.Reason, f.Reason == fastpath.ReasonAuth && f.RekeysIn == 0
			}
		}
		return "not listed", err != nil
	})
}

// Forged segments on the wire, inside the window or exactly at its edge, change
// nothing of an encrypted stream. A frame that is not authentic ends it.
func TestForgedOnTheWire(t *testing.T) {
	s := newSiege(t, "--exclude-ports", plainPort)
	atEdge := func(flags uint8, payload string, shift uint32) func(v *victim) [][]byte {
		return func(v *victim) [][]byte {
			f := v.segment(flags, payload)
			f.Seq += shift
			return [][]byte{bare(f)}
		}
	}
	whole := func(payload string) func(v *victim) [][]byte { return atEdge(frame.ACK|frame.PSH, payload, 0) }
	took := func(v *victim) bool {
		got, err := read(v, true)
		return err == nil && bytes.Contains([]byte(got), []byte(forgedData))
	}
	challenged := func(name string) func(v *victim) bool {
		before, err := s.path.A.NS.TCPCounters()
		if err != nil {
			t.Fatal(err)
		}
		return func(*victim) bool {
			s.eventually(name+" moves", func() (string, bool) {
				now, err := s.path.A.NS.TCPCounters()
				return "", err == nil && now[name] > before[name]
			})
			return true
		}
	}
	for _, c := range []struct {
		name string
		ends bool // a frame that is not authentic ends the connection
		make func(v *victim) [][]byte
		// What the plain connection does with it, or with what control makes.
		succeeds func(v *victim) bool
		control  func(v *victim) [][]byte
	}{
		// First, as fragments are dropped once the hosts have had encrypted
		// connections.
		{"fragments", false, func(v *victim) [][]byte { return fragments(whole(garbage(0))(v)[0]) }, took, nil},
		{"data", true, whole(garbage(0)), took, nil},
		{"data with the rekey bit", true, whole(garbage(1)), took, nil},
		{"an empty frame with the rekey bit", true, whole("\x01\x00\x11" + forgedData[:17]), func(v *victim) bool {
			got, err := read(v, true)
			return err == nil && got == "\x01\x00\x11"+forgedData[:17]
		}, nil},
		{"FIN", false, atEdge(frame.FIN|frame.ACK, "", 0), func(v *victim) bool {
			_, err := read(v, true)
			return err == io.EOF
		}, nil},
		// TCP itself takes only the one at the edge, where an encrypted
		// connection is reset as well.
		{"RST in the window", false, atEdge(frame.RST, "", 1), func(v *victim) bool {
			_, err := read(v, true)
			return errors.Is(err, unix.ECONNRESET)
		}, atEdge(frame.RST, "", 0)},
		{"SYN in the window", false, atEdge(frame.SYN, "", 1), challenged("TcpExt.TCPSYNChallenge"), nil},
		// Of data that was never sent: TCP ignores it just so. The control is
		// one that shuts the window, which is not authenticated.
		{"ACK", false, func(v *victim) [][]byte {
			f := v.segment(frame.ACK, "")
			f.Ack += 5000
			return [][]byte{bare(f)}
		}, func(v *victim) bool {
			s.eventually("the window is shut", func() (string, bool) { return "", tcpInfo(s.t, v.client).Snd_wnd == 0 })
			return true
		}, func(v *victim) [][]byte {
			f := v.segment(frame.ACK, "")
			f.Window = 0
			return [][]byte{bare(f)}
		}},
	} {
		for _, v6 := range []bool{false, true} {
			t.Run(c.name+map[bool]string{false: "/IPv4", true: "/IPv6"}[v6], func(t *testing.T) {
				sub := *s
				sub.bed = &bed{t: t, ctx: s.ctx, path: s.path, fwd: s.fwd, wire: s.wire}
				control := c.control
				if control == nil {
					control = c.make
				}
				taken := false
				for try := 0; try < 3 && !taken; try++ { // a packet may get lost
					v := sub.onWire(false, v6)
					sub.transmit(s.cable, s.path.A, s.path.B.MAC, control(v)...)
					taken = c.succeeds(v)
				}
				if !taken {
					t.Error("the plain connection did not take it")
				}
				for _, from := range []net.HardwareAddr{s.path.B.MAC, {2, 0, 0, 0, 0, 0x99}} { // spoofed, and any other
					v := sub.onWire(true, v6)
					sub.transmit(s.cable, s.path.A, from, c.make(v)...)
					sub.fence()
					if c.ends {
						sub.aborted(v)
						continue
					}
					for range 3 {
						sub.say(v.server, v.client, "the stream goes on")
						sub.say(v.client, v.server, "in both directions")
					}
					if info, err := s.daemon.Session(s.ctx, v.client.LocalAddr(), v.client.RemoteAddr()); err != nil || info.RekeysIn != 0 {
						t.Errorf("%+v, %v", info, err)
					}
				}
			})
		}
	}
}

// A bit that is changed in a genuine frame, that which asks for rekeying, ends the
// connection. A plain stream is changed.
func TestFlippedRekeyBit(t *testing.T) {
	var armed atomic.Pointer[netip.AddrPort] // whose next segment with data is changed
	flip := func(_ lab.Dir, b []byte) lab.Verdict {
		x, ok := frame.Parse(b)
		if from := armed.Load(); ok && x.TCP && len(x.Payload(b)) > 0 && from != nil && x.Src(b) == *from && armed.CompareAndSwap(from, nil) {
			x.Payload(b)[0] ^= 1
			x.FixChecksums(b)
		}
		return lab.Pass
	}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: flip})
	a, _ := b.both("--exclude-ports", plainPort)
	s := &siege{bed: b, daemon: a}
	for _, v6 := range []bool{false, true} {
		for _, encrypted := range []bool{true, false} {
			v := s.onWire(encrypted, v6)
			armed.Store(&v.remote)
			if _, err := io.WriteString(v.server, "genuine"); err != nil {
				t.Fatal(err)
			}
			if encrypted {
				s.aborted(v)
			} else if got, err := read(v, true); err != nil || got != "fenuine" {
				t.Errorf("the plain connection reads %q, %v", got, err)
			}
		}
	}
}
