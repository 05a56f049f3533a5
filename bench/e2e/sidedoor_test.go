package e2e

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// The tests of this file come to host A by side doors, with segments that its
// TCP would take for genuine: they know the inner numbers, which they read on the
// TAP device. Each attempt is made with the guard off as well, and must then
// succeed.

// siege is a bed whose host A has a second interface, to a namespace of the
// attacker's.
type siege struct {
	*bed
	daemon *daemon.Daemon
	second *lab.Iface        // of A
	side   *lab.PacketSocket // the attacker's end of it
	sideIf *lab.Iface
	cable  *lab.PacketSocket // on the path, at the end of A's cable
	inner  *lab.PacketSocket // what A's kernel gets from the daemon
}

func newSiege(t *testing.T, flags ...string) *siege {
	t.Helper()
	s := &siege{bed: newBed(t, lab.Options{}, lab.ForwarderOptions{})}
	l := s.path.A.NS.Lab()
	attacker, err := l.Namespace("attacker")
	if err != nil {
		t.Fatal(err)
	}
	if s.second, s.sideIf, err = l.Connect(s.path.A.NS, attacker, lab.LinkOptions{
		Neighbours: true, A: lab.EndOptions{Name: "eth1"}, B: lab.EndOptions{NoAddress: true, NoOffload: true},
	}); err != nil {
		t.Fatal(err)
	}
	s.daemon = s.bed.daemon(s.path.A, flags...)
	s.bed.daemon(s.path.B)
	s.side, s.cable = s.open(s.sideIf), s.open(s.path.MidA)
	s.watchInner()
	return s
}

func (s *siege) open(i *lab.Iface) *lab.PacketSocket {
	s.t.Helper()
	p, err := i.OpenPacket()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { p.Close() })
	return p
}

func (s *siege) watchInner() {
	s.t.Helper()
	st, err := s.daemon.Status(s.ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	tap, err := s.path.A.NS.Iface(st.Inner)
	if err != nil {
		s.t.Fatal(err)
	}
	s.inner = s.open(tap)
}

// victim is a connection of A's with B, at rest, and the numbers of A's kernel.
type victim struct {
	client, server net.Conn
	local, remote  netip.AddrPort
	seq, ack       uint32 // of the next segment of B that A's kernel expects
	opts           []byte // the timestamps that it will take
}

// victim opens a connection and exchanges a few bytes.
func (s *siege) victim(v6 bool) *victim {
	s.t.Helper()
	ip, _ := s.addr(v6)
	ln, err := s.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
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
	// Reset at the end: an orphan that is out of step would keep its interface
	// from going until it gives up.
	for _, c := range []net.Conn{v.client, v.server} {
		if err := c.(*net.TCPConn).SetLinger(0); err != nil {
			s.t.Fatal(err)
		}
	}
	s.guarded(v.client, v.server)
	v.local, v.remote = v.client.LocalAddr().(*net.TCPAddr).AddrPort(), ln.Addr().(*net.TCPAddr).AddrPort()
	s.say(v.client, v.server, "question")
	s.say(v.server, v.client, "answer")
	// The answer, as A's kernel got it.
	deadline := time.Now().Add(30 * time.Second)
	for v.seq == 0 {
		frames, err := s.inner.Receive(deadline)
		if err != nil {
			s.t.Fatalf("the inner numbers are not seen: %v", err)
		}
		for _, b := range frames {
			x, ok := frame.Parse(b)
			if !ok || !x.TCP || x.Src(b) != v.remote || x.Dst(b) != v.local || string(x.Payload(b)) != "answer" {
				continue
			}
			v.seq, v.ack = x.Seq(b)+uint32(len("answer")), x.Ack(b)
			if ts, ok := frame.FindOption(x.Options(b), frame.OptTimestamp); ok {
				v.opts = append([]byte{frame.OptNOP, frame.OptNOP, frame.OptTimestamp, 10}, ts...)
			}
		}
	}
	return v
}

// say sends a message and waits for its arrival.
func (s *siege) say(from, to net.Conn, message string) {
	s.t.Helper()
	if err := said(from, to, message); err != nil {
		s.t.Fatal(err)
	}
}

func said(from, to net.Conn, message string) error {
	if _, err := io.WriteString(from, message); err != nil {
		return err
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(to, got); err != nil {
		return err
	}
	if string(got) != message {
		return errors.New("other data arrived: " + string(got))
	}
	return nil
}

// segment is one that v's kernel takes for B's.
func (v *victim) segment(flags uint8, payload string) frame.Segment {
	return frame.Segment{Src: v.remote, Dst: v.local, Seq: v.seq, Ack: v.ack, Flags: flags, Window: 500, Options: v.opts, Payload: []byte(payload)}
}

func (v *victim) v6() bool { return v.local.Addr().Is6() }

// A door is a way to A's TCP that does not lead through the daemon. It takes
// the Ethernet frame of a segment.
type door struct {
	name  string
	only6 bool
	send  func(s *siege, f []byte)
}

// fragments cuts a frame into fragments of its IP packet; before are extension
// headers of IPv6, of which the first has the type before[0].
func fragments(f []byte, before ...byte) [][]byte {
	x, _ := frame.Parse(f)
	body := f[x.L4:x.End]
	cut := (len(body) / 2) &^ 7
	var out [][]byte
	for i, part := range [][]byte{body[:cut], body[cut:]} {
		g := append([]byte(nil), f[:x.L4]...)
		at, more := uint16(i*cut), uint16(1-i)
		if !x.V6 {
			binary.BigEndian.PutUint16(g[x.L3+2:], uint16(x.L4-x.L3+len(part)))
			binary.BigEndian.PutUint16(g[x.L3+4:], 0x4711)
			binary.BigEndian.PutUint16(g[x.L3+6:], more<<13|at/8)
			g = append(g, part...)
			frame.FixIPv4Checksum(g, x.L3, x.L4)
			out = append(out, g)
			continue
		}
		g[x.L3+6] = unix.IPPROTO_FRAGMENT
		if len(before) > 0 {
			g[x.L3+6] = before[0]
			g = append(g, unix.IPPROTO_FRAGMENT, 0, 1, 4, 0, 0, 0, 0) // options that pad
		}
		g = append(g, frame.ProtoTCP, 0)
		g = binary.BigEndian.AppendUint16(g, at|more)
		g = append(append(g, 0, 0, 0x47, 0x11), part...)
		binary.BigEndian.PutUint16(g[x.L3+4:], uint16(len(g)-x.L3-frame.IPv6Len))
		out = append(out, g)
	}
	return out
}

// extended puts a header with options, which only pad, before TCP.
func extended(f []byte, kind byte) []byte {
	x, _ := frame.Parse(f)
	g := append([]byte(nil), f[:x.L4]...)
	g[x.L3+6] = kind
	g = append(append(g, frame.ProtoTCP, 0, 1, 4, 0, 0, 0, 0), f[x.L4:x.End]...)
	binary.BigEndian.PutUint16(g[x.L3+4:], uint16(x.End-x.L4+8))
	return g
}

func (s *siege) transmit(p *lab.PacketSocket, to *lab.Iface, from net.HardwareAddr, frames ...[]byte) {
	s.t.Helper()
	for _, f := range frames {
		copy(f, to.MAC)
		copy(f[6:], from)
	}
	if _, err := p.Send(frames...); err != nil {
		s.t.Fatal(err)
	}
}

// loopback sends the IP packet of a frame to A from A itself.
func (s *siege) loopback(f []byte) {
	s.t.Helper()
	x, _ := frame.Parse(f)
	err := s.path.A.NS.Do(func() error {
		family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: s.path.A.Addr4().As4()})
		if x.V6 {
			family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: s.path.A.Addr6().As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, f[x.L3:x.End], 0, to)
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

var doors = []door{
	{"another interface", false, func(s *siege, f []byte) { s.transmit(s.side, s.second, s.sideIf.MAC, f) }},
	{"another interface, the peer's MAC", false, func(s *siege, f []byte) { s.transmit(s.side, s.second, s.path.B.MAC, f) }},
	{"fragments by another interface", false, func(s *siege, f []byte) {
		s.transmit(s.side, s.second, s.sideIf.MAC, fragments(f)...)
	}},
	{"loopback", false, func(s *siege, f []byte) { s.loopback(f) }},
	{"extension header on the wire", true, func(s *siege, f []byte) {
		s.transmit(s.cable, s.path.A, s.path.B.MAC, extended(f, unix.IPPROTO_DSTOPTS))
	}},
	{"hop-by-hop options by another interface", true, func(s *siege, f []byte) {
		s.transmit(s.side, s.second, s.sideIf.MAC, extended(f, unix.IPPROTO_HOPOPTS))
	}},
	{"fragments behind an extension header on the wire", true, func(s *siege, f []byte) {
		s.transmit(s.cable, s.path.A, s.path.B.MAC, fragments(f, unix.IPPROTO_DSTOPTS)...)
	}},
}

// fence returns when A has taken in what was sent by its second interface and
// by the wire before: the packets of an interface are handled in order, and A
// answers a SYN to a closed port.
func (s *siege) fence() {
	s.t.Helper()
	for _, f := range []struct {
		at   *lab.PacketSocket
		from net.HardwareAddr
		to   *lab.Iface
		src  netip.Addr
	}{{s.side, s.sideIf.MAC, s.second, s.sideIf.Addr4()}, {s.cable, s.path.B.MAC, s.path.A, s.path.B.Addr4()}} {
		src, dst := netip.AddrPortFrom(f.src, 7), netip.AddrPortFrom(f.to.Addr4(), 9)
		syn := frame.Segment{Src: src, Dst: dst, SrcMAC: f.from, DstMAC: f.to.MAC, Flags: frame.SYN, Seq: 1, Window: 1000}
		if _, err := f.at.Send(syn.Append(nil)); err != nil {
			s.t.Fatal(err)
		}
		for answered := false; !answered; {
			frames, err := f.at.Receive(time.Now().Add(30 * time.Second))
			if err != nil {
				s.t.Fatalf("no answer from a closed port: %v", err)
			}
			for _, b := range frames {
				x, ok := frame.Parse(b)
				answered = answered || ok && x.TCP && x.Src(b) == dst && x.Dst(b) == src && x.Flags(b)&frame.RST != 0
			}
		}
	}
}

// dropped returns how many packets the guard has dropped.
func (s *siege) dropped() (n uint64) {
	s.t.Helper()
	for name, v := range s.stats(s.daemon).Counters {
		if len(name) > 6 && name[:6] == "guard_" && name != "guard_in_injected" {
			n += v
		}
	}
	return n
}

func tcpInfo(t *testing.T, c net.Conn) (info *unix.TCPInfo) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err == nil {
		var err2 error
		err = raw.Control(func(fd uintptr) { info, err2 = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
		err = errors.Join(err, err2)
	}
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// A forgery is a segment and what it does to a connection that takes it. with
// reports whether it did, and waits if it is sure to.
type forgery struct {
	name string
	make func(s *siege, v *victim) []byte
	with func(s *siege, v *victim, wait bool) bool
}

// read reports what a read from A's application gives; without wait, only what
// is there at once.
func read(v *victim, wait bool) (string, error) {
	d := 5 * time.Millisecond
	if wait {
		d = 10 * time.Second
	}
	_ = v.client.SetReadDeadline(time.Now().Add(d))
	defer v.client.SetReadDeadline(time.Time{})
	b := make([]byte, 100)
	n, err := v.client.Read(b)
	return string(b[:n]), err
}

const forgedData = "these bytes are not from the peer: canary of the side doors"

func tcpSegment(flags uint8, payload string) func(*siege, *victim) []byte {
	return func(_ *siege, v *victim) []byte {
		f := v.segment(flags, payload)
		f.SrcMAC, f.DstMAC = make(net.HardwareAddr, 6), make(net.HardwareAddr, 6)
		return f.Append(nil)
	}
}

var data = forgery{"data", tcpSegment(frame.ACK|frame.PSH, forgedData), func(s *siege, v *victim, wait bool) bool {
	got, err := read(v, wait)
	return err == nil && got == forgedData
}}

// counted is what a counter of A's kernel says.
func counted(name string, before *int64, forge func(*siege, *victim) []byte) forgery {
	value := func(s *siege) int64 {
		c, err := s.path.A.NS.TCPCounters()
		if err != nil {
			s.t.Fatal(err)
		}
		return c[name]
	}
	return forgery{make: func(s *siege, v *victim) []byte {
		*before = value(s)
		return forge(s, v)
	}, with: func(s *siege, _ *victim, wait bool) bool {
		if wait {
			s.eventually(name+" moves", func() (string, bool) { return "", value(s) != *before })
		}
		return value(s) != *before
	}}
}

func forgeries() []forgery {
	syn := counted("TcpExt.TCPSYNChallenge", new(int64), func(s *siege, v *victim) []byte {
		v = &victim{local: v.local, remote: v.remote, seq: v.seq + 100, ack: v.ack}
		return tcpSegment(frame.SYN, "")(s, v)
	})
	syn.name = "SYN in the window"
	return []forgery{
		data,
		{"RST", tcpSegment(frame.RST, ""), func(s *siege, v *victim, wait bool) bool {
			_, err := read(v, wait)
			return errors.Is(err, unix.ECONNRESET)
		}},
		{"FIN", tcpSegment(frame.FIN|frame.ACK, ""), func(s *siege, v *victim, wait bool) bool {
			_, err := read(v, wait)
			return err == io.EOF
		}},
		syn,
		{"ACK that shuts the window", func(_ *siege, v *victim) []byte {
			f := v.segment(frame.ACK, "")
			f.SrcMAC, f.DstMAC, f.Window = make(net.HardwareAddr, 6), make(net.HardwareAddr, 6), 0
			return f.Append(nil)
		}, func(s *siege, v *victim, wait bool) bool {
			if wait {
				s.eventually("the window is shut", func() (string, bool) { return "", tcpInfo(s.t, v.client).Snd_wnd == 0 })
			}
			return tcpInfo(s.t, v.client).Snd_wnd == 0
		}},
		{"ICMP: packet too big", func(s *siege, v *victim) []byte { return tooBig(s, v) }, func(s *siege, v *victim, wait bool) bool {
			small := func() bool { return tcpInfo(s.t, v.client).Pmtu < 1400 }
			if wait {
				// The kernel looks at it when it sends the next time.
				s.eventually("the path MTU falls", func() (string, bool) { return "", small() })
			}
			return small()
		}},
	}
}

// tooBig is an ICMP error about what A's kernel would send next.
func tooBig(s *siege, v *victim) []byte {
	sent := frame.Segment{Src: v.local, Dst: v.remote, SrcMAC: make(net.HardwareAddr, 6), DstMAC: make(net.HardwareAddr, 6), Seq: v.ack, Ack: v.seq, Flags: frame.ACK}
	quoted := sent.Append(nil)[frame.EthLen:]
	if v.v6() {
		return frame.AppendICMP(nil, s.path.B.Addr6(), v.local.Addr(), 2, 0, 1280, quoted)
	}
	return frame.AppendICMP(nil, s.path.B.Addr4(), v.local.Addr(), 3, 4, 600, quoted)
}

// assault makes one attempt on a fresh connection. With the guard it must do
// nothing and be counted, and the stream goes on; without, it must succeed.
func (s *siege) assault(v6, guard bool, d *door, f *forgery) {
	s.t.Helper()
	v := s.victim(v6)
	forged := f.make(s, v)
	before := s.dropped()
	d.send(s, forged)
	if !guard {
		if !f.with(s, v, true) {
			s.t.Error("with the guard off it did nothing")
		}
		return
	}
	s.eventually("the guard counts it", func() (string, bool) { return "", s.dropped() > before })
	s.fence()
	if f.with(s, v, false) {
		s.t.Fatal("it came in")
	}
	for range 3 {
		s.say(v.server, v.client, "the stream goes on")
		s.say(v.client, v.server, "in both directions")
	}
	info, err := s.daemon.Session(s.ctx, v.client.LocalAddr(), v.client.RemoteAddr())
	if err != nil {
		s.t.Fatal(err)
	}
	if want := uint64(len("answer") + 3*len("the stream goes on")); info.BytesIn != want {
		s.t.Errorf("the daemon opened %d bytes, want %d", info.BytesIn, want)
	}
}

func eachGuard(t *testing.T, flags []string, fn func(t *testing.T, s *siege, guard bool)) {
	for _, guard := range []bool{true, false} {
		name, mode := "guard on", "on"
		if !guard {
			name, mode = "control, guard off", "off"
		}
		t.Run(name, func(t *testing.T) { fn(t, newSiege(t, append([]string{"--guard", mode}, flags...)...), guard) })
	}
}

// Forged data comes in by no door, and nothing forged by another interface.
func TestSideDoors(t *testing.T) {
	eachGuard(t, nil, func(t *testing.T, s *siege, guard bool) {
		if st, err := s.daemon.Status(s.ctx); err != nil || st.Guard != map[bool]string{true: "active", false: "off"}[guard] {
			t.Fatalf("guard %q %+v: %v", st.Guard, st.Layers, err)
		}
		attempt := func(name string, v6 bool, d *door, f *forgery) {
			t.Run(name+map[bool]string{false: "/IPv4", true: "/IPv6"}[v6], func(t *testing.T) {
				sub := *s
				sub.bed = &bed{t: t, ctx: s.ctx, path: s.path, fwd: s.fwd, wire: s.wire}
				sub.assault(v6, guard, d, f)
			})
		}
		for i := range doors {
			for _, v6 := range []bool{false, true} {
				if v6 || !doors[i].only6 {
					attempt("data/"+doors[i].name, v6, &doors[i], &data)
				}
			}
		}
		for _, f := range forgeries()[1:] {
			for _, v6 := range []bool{false, true} {
				attempt(f.name+"/another interface", v6, &doors[0], &f)
			}
		}
	})
}
