package slowpath

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// seeded returns a deterministic source of randomness.
func seeded(n uint64) *rand.ChaCha8 {
	var s [32]byte
	binary.LittleEndian.PutUint64(s[:], n)
	return rand.NewChaCha8(s)
}

// link says what packets look like: addresses, family and VLAN tag.
type link struct {
	v6   bool
	vlan uint16
}

func (l link) addr(n byte) []byte {
	if l.v6 {
		return []byte{0xfd, 15: n}
	}
	return []byte{10, 0, 0, n}
}

func (l link) endpoint(n byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(l.addr(n))
	return netip.AddrPortFrom(a, port)
}

// key is the flow as host n sees it.
func (l link) key(n byte, port uint16, peer byte, pport uint16) packet.Key {
	k := packet.KeyOf(l.endpoint(n, port), l.endpoint(peer, pport))
	k.VLAN = l.vlan
	return k
}

// tcp is a segment to be built.
type tcp struct {
	src, dst     byte
	sport, dport uint16
	seq, ack     uint32
	flags        uint8
	ae           bool
	wnd          uint16
	opts         []byte
	data         []byte
}

// frame builds the packet. The TCP checksum is zero, as the Machine's own.
func (l link) frame(x tcp) []byte {
	f := []byte{2, 0, 0, 0, 0, x.dst, 2, 0, 0, 0, 0, x.src}
	if l.vlan != 0 {
		f = binary.BigEndian.AppendUint16(append(f, 0x81, 0x00), l.vlan)
	}
	n := packet.TCPLen + len(x.opts) + len(x.data)
	if l.v6 {
		f = append(f, 0x86, 0xdd, 0x60, 0, 0, 0, byte(n>>8), byte(n), 6, 64)
		f = append(append(f, l.addr(x.src)...), l.addr(x.dst)...)
	} else {
		t := n + packet.IPv4Len
		f = append(f, 0x08, 0x00, 0x45, 0, byte(t>>8), byte(t), 0, 1, 0x40, 0, 64, 6, 0, 0)
		f = append(append(f, l.addr(x.src)...), l.addr(x.dst)...)
		packet.PutIPv4Checksum(f[len(f)-packet.IPv4Len:])
	}
	f = binary.BigEndian.AppendUint16(f, x.sport)
	f = binary.BigEndian.AppendUint16(f, x.dport)
	f = binary.BigEndian.AppendUint32(f, x.seq)
	f = binary.BigEndian.AppendUint32(f, x.ack)
	off := byte((packet.TCPLen + len(x.opts)) / 4 << 4)
	if x.ae {
		off |= aeBit
	}
	f = append(f, off, x.flags)
	f = binary.BigEndian.AppendUint16(f, x.wnd)
	f = append(f, 0, 0, 0, 0)
	return append(append(f, x.opts...), x.data...)
}

// linuxSYN are the options of a SYN of Linux.
func linuxSYN(mss int, tsval, tsecr uint32) []byte {
	b := []byte{2, 4, byte(mss >> 8), byte(mss), 4, 2, 8, 10}
	b = binary.BigEndian.AppendUint32(b, tsval)
	b = binary.BigEndian.AppendUint32(b, tsecr)
	return append(b, 1, 3, 3, 7)
}

// parse reads a frame that a test made or got.
func parse(t testing.TB, frame []byte, dir packet.Direction) *packet.Segment {
	t.Helper()
	var s packet.Segment
	if err := packet.Parse(frame, dir, &s); err != nil {
		t.Fatalf("frame of a Machine: %v: %x", err, frame)
	}
	return &s
}

// event is something that happens at a time of the simulation.
type event struct {
	at  time.Duration
	seq int
	fn  func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	o := *h
	e := o[len(o)-1]
	*h = o[:len(o)-1]
	return e
}

// delivery is what becomes of a frame on the wire.
type delivery struct {
	frame []byte
	delay time.Duration
}

// sim is two hosts and a wire in virtual time.
type sim struct {
	t      testing.TB
	link   link
	now    time.Duration
	events eventHeap
	nev    int
	delay  time.Duration // one way
	// undivertDelay is how long a diversion outlives its end, so that
	// stragglers come to the Machine.
	undivertDelay time.Duration
	computing     time.Duration // how long a Job takes
	a, b          *simHost
	wired         int
	// wire decides the fate of the n-th frame; nil delivers all.
	wire func(n int, from *simHost, f []byte) []delivery
	log  []string
}

const (
	clientPort = 40000
	serverPort = 80
	clientData = "PLAINTEXT of the client"
	serverData = "PLAINTEXT of the server"
)

func newSim(t testing.TB, l link, ca, cb *Config) *sim {
	s := &sim{t: t, link: l, delay: 5 * time.Millisecond}
	s.a = newSimHost(s, 1, clientPort, 2, serverPort, ca)
	s.b = newSimHost(s, 2, serverPort, 1, clientPort, cb)
	s.a.other, s.b.other = s.b, s.a
	s.a.stack.data, s.b.stack.data = clientData, serverData
	return s
}

func (s *sim) at(d time.Duration, fn func()) {
	s.nev++
	heap.Push(&s.events, event{s.now + d, s.nev, fn})
}

// run lets time pass until the given time.
func (s *sim) run(until time.Duration) {
	for len(s.events) > 0 && s.events[0].at <= until {
		e := heap.Pop(&s.events).(event)
		s.now = e.at
		e.fn()
	}
	s.now = until
}

// simHost is a host with a daemon in front of a tiny TCP.
type simHost struct {
	s        *sim
	n        byte
	key      packet.Key
	other    *simHost
	m        *Machine // nil: no daemon
	stack    simTCP
	diverted bool
	diverts  int
	est      *Established
	fast     simFast
	reports  []Info
	ticking  time.Duration
}

func newSimHost(s *sim, n byte, port uint16, peer byte, pport uint16, cfg *Config) *simHost {
	h := &simHost{s: s, n: n, key: s.link.key(n, port, peer, pport), ticking: -1}
	h.stack = simTCP{h: h, port: port, peer: peer, pport: pport, iss: 0xfffffff0 + uint32(n)<<8, wnd: 64240, mss: 1460, ts: 1000 * uint32(n)}
	if cfg != nil {
		h.m = New(*cfg, seeded(uint64(n)))
	}
	return h
}

func (h *simHost) last() Info {
	if len(h.reports) == 0 {
		return Info{}
	}
	return h.reports[len(h.reports)-1]
}

func (h *simHost) arm() {
	if h.m == nil {
		return
	}
	at, ok := h.m.Deadline()
	if !ok || h.ticking >= 0 && h.ticking <= at && h.ticking >= h.s.now {
		return
	}
	h.ticking = at
	h.s.at(max(0, at-h.s.now), func() {
		if h.ticking != at {
			return
		}
		h.ticking = -1
		h.do(h.m.Tick(h.s.now))
		h.arm()
	})
}

// do carries out actions and checks what must hold for all of them.
func (h *simHost) do(acts []Action) {
	for _, a := range acts {
		switch a.Kind {
		case SendOuter:
			h.toWire(a.Frame)
		case SendInner:
			p := parse(h.s.t, a.Frame, packet.FromOuter)
			if h.state() == StateNegotiating && p.Len() > 0 {
				h.s.t.Errorf("host %d: payload of a negotiating flow given to the inner stack", h.n)
			}
			h.s.at(0, func() { h.toStack(a.Frame) })
		case Divert:
			h.diverts++
			h.diverted = true
		case Undivert:
			n := h.diverts
			h.s.at(h.s.undivertDelay, func() { h.diverted = h.diverted && n != h.diverts })
		case Install:
			if h.est != nil {
				h.s.t.Errorf("host %d: installed twice", h.n)
			}
			h.est = a.Est
			h.fast.install(h)
		case Reinject:
			h.fast.input(a.Dir, a.Frame)
		case Report:
			h.reports = append(h.reports, a.Info)
		case Agree:
			h.s.at(h.s.computing, func() {
				a.Job.Run()
				h.do(h.m.Agreed(a.Job, h.s.now))
				h.arm()
			})
		}
	}
}

func (h *simHost) state() State {
	for _, i := range slices.Backward(h.reports) {
		return i.State
	}
	return ""
}

// finish fills in the checksum as a port does, and checks the rest.
func (h *simHost) finish(f []byte) {
	p := parse(h.s.t, f, packet.FromInner)
	if f[p.L4+tcpChecksum] != 0 || f[p.L4+tcpChecksum+1] != 0 {
		h.s.t.Errorf("host %d: TCP checksum not left zero", h.n)
	}
	if !p.V6 && packet.Fold(packet.Sum(f[p.L3:p.L4], 0)) != 0xffff {
		h.s.t.Errorf("host %d: bad IPv4 checksum", h.n)
	}
	packet.FullChecksum(f, p.L3, p.L4, p.V6)
}

func (h *simHost) toWire(f []byte) {
	h.finish(f)
	s := h.s
	n := s.wired
	s.wired++
	p := parse(s.t, f, packet.FromInner)
	s.log = append(s.log, fmt.Sprintf("%v host %d: #%d flags %02x seq %d ack %d wnd %d eno %v len %d", s.now, h.n, n, p.Flags, p.Seq, p.Ack, p.Wnd, hasENO(p.Options()), p.Len()))
	ds := []delivery{{f, 0}}
	if s.wire != nil {
		ds = s.wire(n, h, f)
	}
	for _, d := range ds {
		s.at(s.delay+d.delay, func() { h.other.fromWire(bytes.Clone(d.frame)) })
	}
}

func isSYN(p *packet.Segment) bool { return p.Flags&(packet.SYN|packet.ACK) == packet.SYN }

func (h *simHost) fromWire(f []byte) {
	p := parse(h.s.t, f, packet.FromOuter)
	switch {
	case h.est != nil:
		h.fast.input(packet.FromOuter, f)
	case h.m != nil && (h.diverted || isSYN(p) && hasENO(p.Options())):
		h.do(h.m.Input(packet.FromOuter, f, h.s.now))
		h.arm()
	default:
		h.stack.input(p)
	}
}

func (h *simHost) fromStack(f []byte) {
	p := parse(h.s.t, f, packet.FromInner)
	switch {
	case h.est != nil:
		h.fast.input(packet.FromInner, f)
	case h.m != nil && (h.diverted || isSYN(p)):
		h.do(h.m.Input(packet.FromInner, f, h.s.now))
		h.arm()
	default:
		h.toWire(f)
	}
}

func (h *simHost) toStack(f []byte) {
	h.finish(f)
	h.stack.input(parse(h.s.t, f, packet.FromOuter))
}

// simFast stands for the fast path: it acknowledges what the peer sends, sends
// the Init message again until it is acknowledged, and answers copies of the
// inner handshake.
type simFast struct {
	h       *simHost
	rx, una int
	leaks   int // segments with data of the inner stack
	heard   bool
}

func (q *simFast) install(h *simHost) {
	q.h, q.rx, q.una = h, h.est.RxOffset+len(h.est.RxPending), h.est.TxAcked
	q.resend()
}

func (q *simFast) resend() {
	if q.una == len(q.h.est.TxInit) {
		return
	}
	q.h.s.at(300*time.Millisecond, func() {
		if q.una < len(q.h.est.TxInit) {
			q.send(q.una, q.h.est.TxInit[q.una:])
		}
		q.resend()
	})
}

func (q *simFast) send(off int, data []byte) {
	e := q.h.est
	h := packet.Header{Seq: e.ISS + 1 + uint32(off), Ack: e.IRS + 1 + uint32(q.rx), Flags: packet.ACK | packet.PSH, Wnd: 1000}
	if e.TSOK {
		h.Opts = []byte{1, 1, 8, 10}
		h.Opts = binary.BigEndian.AppendUint32(h.Opts, e.TSLocal)
		h.Opts = binary.BigEndian.AppendUint32(h.Opts, e.TSRemote)
	}
	if e.Unheard && !q.heard {
		h.Opts = append(h.Opts, packet.OptENO, 2, packet.OptNOP, packet.OptNOP)
	}
	q.h.toWire(compose(&e.OuterTmpl, &h, data))
}

func (q *simFast) input(dir packet.Direction, f []byte) {
	e := q.h.est
	p := parse(q.h.s.t, f, dir)
	if dir == packet.FromInner {
		if p.Flags&packet.SYN != 0 {
			q.h.s.at(0, func() { q.h.toStack(bytes.Clone(e.Release)) })
		} else if p.Len() > 0 {
			q.leaks++
		}
		return
	}
	q.heard = q.heard || p.Flags&packet.SYN == 0
	if p.Flags&packet.ACK != 0 {
		if n := int(packet.SeqDiff(p.Ack, e.ISS+1)); n > q.una && n <= len(e.TxInit) {
			q.una = n
		}
	}
	if p.Len() > 0 || p.Flags&packet.SYN != 0 {
		q.send(len(e.TxInit), nil)
	}
}

// simTCP is an inner stack that knows just enough of TCP to open a connection
// and to send a few bytes.
type simTCP struct {
	h            *simHost
	port, pport  uint16
	peer         byte
	state        string // closed, listen, syn-sent, syn-rcvd, established, reset
	iss, irs     uint32
	wnd          uint16
	mss          int
	ts           uint32
	ecn, ae      bool
	mute         bool   // does not answer SYNs
	opts         []byte // nil: those of Linux
	data         string
	got          []byte
	sawMSS       int
	sawTFO       bool
	sawAE        bool
	sawENO       bool
	acked        bool
	tries        int
	peerTS       uint32
	established  time.Duration
	synFlags     uint8
	noRetransmit bool
}

func (c *simTCP) synOpts() []byte {
	if c.opts != nil {
		return c.opts
	}
	c.ts++
	return linuxSYN(c.mss, c.ts, c.peerTS)
}

func (c *simTCP) send(flags uint8, seq, ack uint32, opts []byte, data string) {
	x := tcp{src: c.h.n, dst: c.peer, sport: c.port, dport: c.pport, seq: seq, ack: ack, flags: flags, wnd: c.wnd, opts: opts, data: []byte(data)}
	x.ae = c.ae && flags&packet.SYN != 0
	c.h.fromStack(c.h.s.link.frame(x))
}

func (c *simTCP) connect() {
	c.state = "syn-sent"
	c.synFlags = packet.SYN
	if c.ecn {
		c.synFlags |= packet.ECE | packet.CWR
	}
	c.sendSYN()
}

func (c *simTCP) sendSYN() {
	if c.state != "syn-sent" || c.tries > 5 {
		return
	}
	wait := time.Second << c.tries
	c.tries++
	if !c.noRetransmit {
		c.h.s.at(wait, c.sendSYN)
	}
	c.send(c.synFlags, c.iss, 0, c.synOpts(), "")
}

func (c *simTCP) sendSYNACK() {
	if c.state != "syn-rcvd" || c.tries > 5 {
		return
	}
	c.h.s.at(time.Second<<c.tries, c.sendSYNACK)
	c.tries++
	c.synack()
}

func (c *simTCP) synack() { c.send(c.synFlags, c.iss, c.irs+1, c.synOpts(), "") }

func (c *simTCP) sendData() {
	if c.acked || c.state != "established" || c.tries > 40 {
		return
	}
	c.tries++
	c.h.s.at(300*time.Millisecond, c.sendData)
	c.send(packet.ACK|packet.PSH, c.iss+1, c.irs+1+uint32(len(c.got)), nil, c.data)
}

func (c *simTCP) ack() {
	seq := c.iss + 1
	if c.acked {
		seq += uint32(len(c.data))
	}
	c.send(packet.ACK, seq, c.irs+1+uint32(len(c.got)), nil, "")
}

func (c *simTCP) open() {
	c.state, c.tries, c.established = "established", 0, c.h.s.now
	c.sendData()
}

func (c *simTCP) input(p *packet.Segment) {
	if p.Flags&packet.SYN != 0 {
		o := readSYNOptions(p.Options())
		c.sawMSS, c.sawTFO = o.mss, o.tfo
		c.sawENO = c.sawENO || o.enos > 0
		c.sawAE = c.sawAE || p.Frame[p.L4+tcpOffset]&aeBit != 0
		c.peerTS = p.TSval
	} else {
		c.sawENO = c.sawENO || hasENO(p.Options())
	}
	ok := p.Flags&packet.ACK != 0 && p.Ack == c.iss+1
	switch c.state {
	case "listen":
		if isSYN(p) && !c.mute {
			c.state, c.irs, c.tries = "syn-rcvd", p.Seq, 0
			c.synFlags = packet.SYN | packet.ACK
			if c.ecn && p.Flags&(packet.ECE|packet.CWR) == packet.ECE|packet.CWR {
				c.synFlags |= packet.ECE
			}
			c.sendSYNACK()
		}
	case "syn-sent":
		switch {
		case p.Flags&packet.RST != 0:
			if ok {
				c.state = "reset"
			}
		case p.Flags&packet.SYN != 0 && ok:
			c.irs = p.Seq
			c.state = "established"
			c.ack()
			c.open()
		case isSYN(p):
			c.irs, c.state, c.tries = p.Seq, "syn-rcvd", 0
			c.synFlags |= packet.ACK
			c.sendSYNACK()
		}
	case "syn-rcvd":
		switch {
		case p.Flags&packet.RST != 0:
			if p.Seq == c.irs+1 {
				c.state = "reset"
			}
		case isSYN(p):
			c.synack()
		case ok:
			c.open()
			c.receive(p)
		}
	case "established":
		switch {
		case p.Flags&packet.RST != 0:
			if p.Seq == c.irs+1+uint32(len(c.got)) {
				c.state = "reset"
			}
		case p.Flags&packet.SYN != 0:
			c.ack()
		default:
			c.receive(p)
		}
	}
}

func (c *simTCP) receive(p *packet.Segment) {
	if p.Flags&packet.ACK != 0 && p.Ack == c.iss+1+uint32(len(c.data)) {
		c.acked = true
	}
	if p.Len() == 0 {
		return
	}
	if p.Seq == c.irs+1+uint32(len(c.got)) {
		c.got = append(c.got, p.Payload()...)
	}
	c.ack()
}

// dump is called when a test failed.
func (s *sim) dump() {
	for _, l := range s.log {
		s.t.Log(l)
	}
	for _, h := range []*simHost{s.a, s.b} {
		s.t.Logf("host %d: reports %+v stack %s got %q", h.n, h.reports, h.stack.state, h.stack.got)
	}
}

// outcome is how the connection ended for both sides, and fails the test if
// they do not agree or if an invariant was broken.
func (s *sim) outcome() string {
	s.t.Helper()
	a, b := s.a, s.b
	for _, h := range []*simHost{a, b} {
		if h.stack.sawENO && h.m != nil {
			s.t.Errorf("host %d: inner stack saw an ENO option", h.n)
		}
		if n := h.m.halfOpen(); n != 0 {
			s.t.Errorf("host %d: %d flows still half-open", h.n, n)
		}
	}
	switch {
	case a.est != nil && b.est != nil:
		s.agree()
		if len(a.stack.got)+len(b.stack.got) != 0 {
			s.t.Errorf("an inner stack got %q, %q on an encrypted flow", a.stack.got, b.stack.got)
		}
		if a.stack.state != "established" || b.stack.state != "established" {
			s.t.Errorf("encrypted, but the stacks are %s and %s", a.stack.state, b.stack.state)
		}
		return "encrypted"
	case a.stack.state == "established" && b.stack.state == "established" && a.est == nil && b.est == nil:
		if string(a.stack.got) != serverData || string(b.stack.got) != clientData {
			s.t.Errorf("plain flow carried %q and %q", a.stack.got, b.stack.got)
		}
		for _, h := range []*simHost{a, b} {
			if st := h.last().State; h.m != nil && st != StatePlain && st != "" {
				s.t.Errorf("host %d: plain flow is called %q", h.n, st)
			}
			if h.diverted {
				s.t.Errorf("host %d: plain flow is still diverted", h.n)
			}
		}
		return "plain"
	case a.stack.state == "established" || b.stack.state == "established":
		s.t.Errorf("disagreement: stacks %s, %s; installed %v, %v", a.stack.state, b.stack.state, a.est != nil, b.est != nil)
		return "disagreement"
	}
	if len(a.stack.got)+len(b.stack.got) != 0 {
		s.t.Errorf("an inner stack got %q, %q on a failed flow", a.stack.got, b.stack.got)
	}
	return "failed"
}

func (m *Machine) halfOpen() int {
	if m == nil {
		return 0
	}
	return m.Len()
}

// agree checks that what both sides hand to their fast paths fits together.
func (s *sim) agree() {
	s.t.Helper()
	a, b := s.a.est, s.b.est
	if b.Role == crypto.RoleA {
		a, b = b, a
	}
	switch {
	case a.Session.ID() != b.Session.ID():
		s.t.Errorf("session IDs differ")
	case a.Role != crypto.RoleA || b.Role != crypto.RoleB || !a.Active:
		s.t.Errorf("roles %v, %v", a.Role, b.Role)
	case a.ISS != b.IRS || a.IRS != b.ISS:
		s.t.Errorf("initial sequence numbers differ")
	case a.TEP != b.TEP || a.Session.AEAD() != b.Session.AEAD():
		s.t.Errorf("algorithms differ")
	case len(a.TxInit) != b.RxOffset || len(b.TxInit) != a.RxOffset:
		s.t.Errorf("offsets: %d sent, %d received; %d sent, %d received", len(a.TxInit), b.RxOffset, len(b.TxInit), a.RxOffset)
	case a.TSOK != b.TSOK || a.SACKOK != b.SACKOK || a.WScaleOK != b.WScaleOK || a.LocalWScale != b.RemoteWScale || b.LocalWScale != a.RemoteWScale:
		s.t.Errorf("TCP parameters differ")
	case a.ECNOK != b.ECNOK:
		s.t.Errorf("ECN differs")
	}
	for _, x := range []struct{ from, to *Established }{{a, b}, {b, a}} {
		src := []byte("\x00some application data")
		frame := make([]byte, crypto.FrameHeader+len(src)+crypto.TagLen)
		off := uint64(len(x.from.TxInit))
		n := x.from.Session.SendKey(0).Seal(frame, bytes.Clone(src), 0, off)
		plain, ok := x.to.Session.RecvKey(0).Open(frame[:n], uint64(x.to.RxOffset))
		if !ok || !bytes.Equal(plain, src) {
			s.t.Errorf("a frame of role %v does not open", x.from.Role)
		}
	}
}

// open runs a whole connection.
func (s *sim) open() string {
	s.t.Helper()
	s.b.stack.state = "listen"
	s.a.stack.connect()
	s.run(130 * time.Second)
	return s.outcome()
}
