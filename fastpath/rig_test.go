package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// rigConfig is a flow for the scripted tests. The zero value, made whole by
// newRig, is IPv4 without SACK, timestamps or scaling, both sides at offset 0.
type rigConfig struct {
	v6, sack, ts, ecn bool
	shift             uint8 // both ways, not 0: window scaling
	vlan              uint16
	aead              crypto.AEAD
	innerWnd, peerWnd int
	rxEdge            int
	init              int // bytes of an Init message of ours that nobody acknowledged
	active, crossed   bool
	mss               int
	releaseWnd        uint16 // window in the segment that ends the inner handshake
	engine            EngineConfig
	chunks            int
	port              uint16
}

// pkt is what the engine sent somewhere.
type pkt struct {
	packet.Segment
	o, a int64 // offsets of sequence and acknowledgement number
	vnet xdp.VnetHdr
}

// rig is an engine with one flow between a scripted peer and a scripted local
// stack.
type rig struct {
	t    testing.TB
	c    rigConfig
	e    *Engine
	u    *xdp.Umem
	now  time.Duration
	est  *slowpath.Established
	f    *flow
	init []byte

	peer   *crypto.Session // the peer's end
	gen    uint32          // the peer's sending generation
	sealed uint64          // outer offset of the peer's next frame
	opened uint64          // outer offset of our next frame, as the peer reads
	rxGen  uint32
	wire   []byte // our stream, as the peer reassembled it
	wireOK spans

	outs   []pkt
	ins    []pkt
	icmps  [][]byte
	events []Event

	auto    bool // the inner stack takes and acknowledges everything
	autoWnd uint64
	got     []byte // what the inner stack took in order
	eof     bool
	innerTS uint32
	peerTS  uint32
}

const (
	rigISS = 0xfffffff0 // ours: the stream wraps soon
	rigIRS = 0x7ffffff0
)

func newRig(t testing.TB, c rigConfig) *rig {
	t.Helper()
	if c.aead == 0 {
		c.aead = crypto.AES128GCM
	}
	if c.innerWnd == 0 {
		c.innerWnd = 60000
	}
	if c.peerWnd == 0 {
		c.peerWnd = 60000
	}
	if c.rxEdge == 0 {
		c.rxEdge = c.innerWnd
	}
	if c.mss == 0 {
		c.mss = 1460
	}
	if c.chunks == 0 {
		c.chunks = 2048
	}
	if c.port == 0 {
		c.port = 40000
	}
	u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: c.chunks, ChunkSize: 2048})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	r := &rig{t: t, c: c, u: u, now: time.Second, auto: true, autoWnd: uint64(c.innerWnd), innerTS: 1000, peerTS: 500}
	c.engine.Umem, c.engine.Drain = u, r.drain
	r.e = NewEngine(c.engine)
	r.install()
	return r
}

// install puts the rig's flow into its engine.
func (r *rig) install() {
	c := r.c
	rng := rand.New(rand.NewPCG(7, 7))
	_, sess := sessionPair(rng, c.aead, 75)
	local, remote := addr16(c.v6, 0, 0), addr16(c.v6, 1, 0)
	r.peer = sess(crypto.RoleA)
	// Not of the streams' content: that must never be seen on the wire.
	r.init = make([]byte, c.init)
	for i := range r.init {
		r.init[i] = byte(i) | 0x80
	}
	est := &slowpath.Established{
		Key:     packet.Key{Local: local, Remote: remote, LPort: 443, RPort: c.port, VLAN: c.vlan},
		Session: sess(crypto.RoleB), Role: crypto.RoleB, TEP: crypto.TEPX25519, Active: c.active, Crossed: c.crossed, ISS: rigISS, IRS: rigIRS,
		PeerMSS: c.mss, InnerMSS: c.mss, WScaleOK: c.shift != 0, LocalWScale: c.shift, RemoteWScale: c.shift,
		SACKOK: c.sack, TSOK: c.ts, ECNOK: c.ecn, TSLocal: r.innerTS, TSRemote: r.peerTS,
		TxInit: r.init, PeerWnd: c.peerWnd, RxEdge: c.rxEdge, InnerWnd: c.innerWnd,
		OuterTmpl: makeTemplate(local, remote, c.v6, c.vlan, 443, c.port, 0),
		InnerTmpl: makeTemplate(remote, local, c.v6, c.vlan, c.port, 443, 0),
	}
	est.Release = makeFrame(remote, local, c.v6, c.vlan, c.port, 443, 0)
	tcp := est.Release[len(est.Release)-packet.TCPLen:]
	binary.BigEndian.PutUint32(tcp[4:], rigIRS+1)
	binary.BigEndian.PutUint32(tcp[8:], rigISS+1)
	binary.BigEndian.PutUint16(tcp[14:], c.releaseWnd)
	if c.active && !c.crossed {
		binary.BigEndian.PutUint32(tcp[4:], rigIRS)
		tcp[13] |= packet.SYN
	}
	r.est = est
	r.wire, r.wireOK = append([]byte(nil), r.init...), nil
	r.wireOK.add(0, uint64(c.init))
	r.opened = uint64(c.init)
	r.e.Install(est, r.now)
	r.drain()
	r.f = r.e.tab.find(&est.Key)
}

// drain parses the engine's outputs into outs, ins and events.
func (r *rig) drain() {
	r.t.Helper()
	r.e.FinishOut(nil)
	for _, d := range r.e.Out() {
		b := bytes.Clone(r.u.Bytes(d.Addr, int(d.Len)))
		r.u.Free(d.Addr)
		var p pkt
		if err := packet.Parse(b, packet.FromInner, &p.Segment); err != nil {
			r.t.Fatalf("packet to the wire: %v", err)
		}
		if !p.ChecksumOK(false) {
			r.t.Fatalf("packet to the wire with a bad checksum: %s", segText(b))
		}
		p.o, p.a = offOf(rigISS, p.Seq, 0), offOf(rigIRS, p.Ack, 0)
		r.reassemble(&p)
		r.outs = append(r.outs, p)
	}
	r.e.ClearOut()
	var acks []seg
	for i := range r.e.In() {
		in := &r.e.In()[i]
		b := bytes.Clone(in.Header())
		for _, d := range in.Data() {
			b = append(b, d...)
		}
		var p pkt
		p.vnet = xdp.ParseVnetHdr(b)
		if err := packet.Parse(b[xdp.VnetHdrLen:], packet.FromOuter, &p.Segment); err == packet.ErrNotTCP {
			r.icmps = append(r.icmps, b[xdp.VnetHdrLen:])
			continue
		} else if err != nil {
			r.t.Fatalf("packet to the inner stack: %v", err)
		}
		p.o, p.a = offOf(rigIRS, p.Seq, 0), offOf(rigISS, p.Ack, 0)
		r.ins = append(r.ins, p)
		if r.auto && r.take(&p) {
			acks = append(acks, seg{})
		}
	}
	r.e.ClearIn()
	r.events = append(r.events, r.e.Events()...)
	if len(acks) > 0 {
		r.inner(seg{})
	}
}

// take is the inner stack's receiver; it reports whether an ACK is due.
func (r *rig) take(p *pkt) bool {
	if p.Flags&(packet.RST|packet.SYN) != 0 || p.Len() == 0 && p.Flags&packet.FIN == 0 {
		return false
	}
	if p.o == int64(len(r.got)) && !r.eof {
		r.got = append(r.got, p.Payload()...)
		r.eof = p.Flags&packet.FIN != 0
	}
	return true
}

// reassemble is the peer's receiver.
func (r *rig) reassemble(p *pkt) {
	n := p.Len()
	if n == 0 {
		return
	}
	end := int(p.o) + n
	if end > len(r.wire) {
		r.wire = append(r.wire, make([]byte, end-len(r.wire))...)
	}
	for i, c := range p.Payload() {
		at := uint64(p.o) + uint64(i)
		if r.wireOK.covers(at, at+1) && r.wire[at] != c {
			r.t.Fatalf("other byte on the wire at %d", at)
		}
		r.wire[at] = c
	}
	r.wireOK.add(uint64(p.o), uint64(end))
}

// frame is one frame of ours as the peer opened it.
type frame struct {
	o, n    uint64
	control byte
	flags   byte
	urgent  uint16
	data    []byte
}

// readFrames opens the frames that the peer has whole and not yet read.
func (r *rig) readFrames() (fs []frame) {
	r.t.Helper()
	for {
		s, ok := r.wireOK.next(r.opened)
		if !ok || s.s > r.opened {
			return fs
		}
		b := bytes.Clone(r.wire[r.opened:s.e])
		n, err := crypto.FrameLen(b)
		if err != nil {
			r.t.Fatal(err)
		}
		if n == 0 || n > len(b) {
			return fs
		}
		f := frame{o: r.opened, n: uint64(n), control: b[0]}
		if b[0]&crypto.ControlRekey != 0 {
			r.rxGen++
		}
		plain, ok := r.peer.RecvKey(r.rxGen).Open(b[:n], r.opened)
		if !ok {
			r.t.Fatalf("frame at %d does not open under generation %d", r.opened, r.rxGen)
		}
		if f.flags, f.urgent, f.data, err = crypto.ParsePlain(plain); err != nil {
			r.t.Fatal(err)
		}
		fs = append(fs, f)
		r.opened += uint64(n)
	}
}

// seal makes the peer's next frame.
func (r *rig) seal(flags byte, data []byte) []byte {
	return r.sealWith(0, flags, data)
}

func (r *rig) sealWith(control, flags byte, data []byte) []byte {
	if control&crypto.ControlRekey != 0 {
		r.gen++
	}
	plain := append([]byte{flags}, data...)
	b := make([]byte, crypto.FrameHeader+len(plain)+crypto.TagLen)
	n := r.peer.SendKey(r.gen).Seal(b, plain, control, r.sealed)
	r.sealed += uint64(n)
	return b[:n]
}

// seg is a segment that a script sends. Offsets count from 0; zero values of
// ack and wnd mean what an honest sender would say.
type seg struct {
	o       int64 // from the peer: outer offset; from the inner stack: inner offset
	data    []byte
	flags   uint8 // beside ACK
	noAck   bool
	ack     int64 // 0: everything that was sent; -1: really 0
	wnd     int   // unscaled field; 0: generous; -1: really 0
	urg     uint16
	tos     uint8
	ts      uint32 // 0: newest
	gso     int
	badSum  bool
	garbage int // bytes of options that are malformed
	sack    [][2]int64
}

func (r *rig) build(s *seg, t *packet.Template, isn, ackISN uint32, ack int64, wnd int, ts uint32) []byte {
	var opts [packet.MaxOptions]byte
	n := 0
	if r.c.ts {
		other := r.innerTS
		if isn == rigISS {
			other = r.peerTS
		}
		putTS(opts[:], ts, other)
		n = 12
	}
	if len(s.sack) > 0 {
		opts[n], opts[n+1], opts[n+2], opts[n+3] = packet.OptNOP, packet.OptNOP, packet.OptSACK, uint8(2+8*len(s.sack))
		n += 4
		for _, b := range s.sack {
			binary.BigEndian.PutUint32(opts[n:], seqOf(ackISN, uint64(b[0])))
			binary.BigEndian.PutUint32(opts[n+4:], seqOf(ackISN, uint64(b[1])))
			n += 8
		}
	}
	if s.garbage > 0 {
		for i := range s.garbage {
			opts[n+i] = 0xfe
		}
		n += s.garbage
	}
	h := packet.Header{Seq: seqOf(isn, uint64(s.o)), Ack: seqOf(ackISN, uint64(ack)), Flags: s.flags, Wnd: uint16(wnd), Urg: s.urg, Opts: opts[:n]}
	if !s.noAck {
		h.Flags |= packet.ACK
	}
	t.SetECN(s.tos)
	b := make([]byte, packet.MaxHeaders+len(s.data))
	hl := t.Compose(b, &h, len(s.data))
	copy(b[hl:], s.data)
	return b[:hl+len(s.data)]
}

// peerFrame builds a segment of the peer.
func (r *rig) peerFrame(s seg) []byte {
	ack := s.ack
	if ack == 0 {
		if d, ok := r.wireOK.next(0); ok && d.s == 0 {
			ack = int64(d.e)
		}
	} else if ack == -1 {
		ack = 0
	}
	wnd := s.wnd
	if wnd == 0 {
		wnd = r.c.peerWnd >> r.c.shift
	} else if wnd == -1 {
		wnd = 0
	}
	ts := s.ts
	if ts == 0 {
		r.peerTS++
		ts = r.peerTS
	}
	t := r.est.InnerTmpl
	b := r.build(&s, &t, rigIRS, rigISS, ack, wnd, ts)
	l4 := t.L4()
	packet.FullChecksum(b, t.L3(), l4, t.V6())
	if s.badSum {
		b[l4+16] ^= 0x40
	}
	return b
}

// outer gives the engine segments of the peer in one vector.
func (r *rig) outer(ss ...seg) {
	r.t.Helper()
	bs := make([][]byte, len(ss))
	for i := range ss {
		bs[i] = r.peerFrame(ss[i])
	}
	r.outerFrames(bs...)
}

func (r *rig) outerFrames(bs ...[]byte) {
	r.t.Helper()
	var v []xdp.Desc
	for _, b := range bs {
		if len(b) > 2048-xdp.Headroom {
			r.e.OuterFrame(b, r.now)
			r.drain()
			continue
		}
		addr, ok := r.u.Alloc()
		if !ok {
			r.t.Fatal("out of chunks")
		}
		addr += xdp.Headroom
		copy(r.u.Bytes(addr, len(b)), b)
		v = append(v, xdp.Desc{Addr: addr, Len: uint32(len(b))})
		if len(v) == VectorSize {
			r.e.OuterIn(v, r.now)
			r.drain()
			v = v[:0]
		}
	}
	if len(v) > 0 {
		r.e.OuterIn(v, r.now)
	}
	r.drain()
	r.check()
}

// stream sends bytes of the peer from outer offset o on in segments of size n,
// each in a vector of its own.
func (r *rig) stream(o uint64, b []byte, n int, last uint8) {
	r.t.Helper()
	for len(b) > 0 {
		k := min(n, len(b))
		fl := uint8(0)
		if k == len(b) {
			fl = last
		}
		r.outer(seg{o: int64(o), data: b[:k], flags: fl})
		o += uint64(k)
		b = b[k:]
	}
}

// innerBuf builds a packet of the inner stack with its virtio-net header.
func (r *rig) innerBuf(s seg) []byte {
	ack := s.ack
	if ack == 0 {
		ack = int64(len(r.got))
		if r.eof {
			ack++
		}
	} else if ack == -1 {
		ack = 0
	}
	wnd := s.wnd
	if wnd == 0 {
		wnd = int(r.autoWnd) >> r.c.shift
	} else if wnd == -1 {
		wnd = 0
	}
	ts := s.ts
	if ts == 0 {
		r.innerTS++
		ts = r.innerTS
	}
	t := r.est.OuterTmpl
	f := r.build(&s, &t, rigISS, rigIRS, ack, wnd, ts)
	packet.PartialChecksum(f, t.L3(), t.L4(), len(f)-t.L4(), t.V6())
	b := make([]byte, xdp.VnetHdrLen+len(f))
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(t.L4()), CsumOffset: 16}
	if s.gso > 0 {
		v.GSOType, v.GSOSize = xdp.VnetGSOTCPv4, uint16(s.gso)
		if t.V6() {
			v.GSOType = xdp.VnetGSOTCPv6
		}
	}
	v.Put(b)
	copy(b[xdp.VnetHdrLen:], f)
	return b
}

// inner gives the engine packets of the inner stack in one vector.
func (r *rig) inner(ss ...seg) {
	r.t.Helper()
	for _, s := range ss {
		r.e.InnerIn(r.innerBuf(s), r.now)
	}
	r.e.Flush(r.now)
	r.drain()
	r.check()
}

// advance lets time pass, tick by tick.
func (r *rig) advance(d time.Duration) {
	r.t.Helper()
	end := r.now + d
	for {
		at, ok := r.e.Deadline()
		if !ok || at > end {
			break
		}
		r.now = max(r.now, at)
		r.e.Tick(r.now)
		r.drain()
		r.check()
	}
	r.now = end
}

// check holds the engine to its books.
func (r *rig) check() {
	r.t.Helper()
	if b := r.e.buf; r.u.Available()+b.held != r.u.Chunks() || b.held < 0 || b.used < 0 || b.used > b.budget {
		r.t.Fatalf("%d chunks free and %d held of %d, %d bytes of slabs of %d", r.u.Available(), b.held, r.u.Chunks(), b.used, b.budget)
	}
}

// forget drops what was recorded.
func (r *rig) forget() { r.outs, r.ins, r.icmps, r.events = nil, nil, nil, nil }

// ended returns the reason for which the flow ended, "" if it did not.
func (r *rig) ended() string {
	for _, ev := range r.events {
		if ev.Kind == FlowEnded {
			return ev.Info.Reason
		}
	}
	return ""
}

func (r *rig) wantEnded(reason string) {
	r.t.Helper()
	if got := r.ended(); got != reason {
		r.t.Fatalf("flow ended by %q, want %q", got, reason)
	}
}

// acks returns the acknowledgements that were sent to the peer.
func (r *rig) acks() (a []int64) {
	for i := range r.outs {
		a = append(a, r.outs[i].a)
	}
	return a
}

// resets returns the resets among ps.
func resets(ps []pkt) (rs []pkt) {
	for _, p := range ps {
		if p.Flags&packet.RST != 0 {
			rs = append(rs, p)
		}
	}
	return rs
}

// withData returns the packets of ps that carry data.
func withData(ps []pkt) (d []pkt) {
	for _, p := range ps {
		if p.Len() > 0 {
			d = append(d, p)
		}
	}
	return d
}

// gone lets the flow expire and checks that nothing of it is left.
func (r *rig) gone() {
	r.t.Helper()
	r.advance(time.Hour)
	if r.e.tab.n != 0 || len(r.e.timers.h) != 0 || r.e.buf.used != 0 || r.e.buf.held != 0 || r.u.Available() != r.u.Chunks() {
		r.t.Fatalf("left over: %d flows, %d timers, %d bytes, %d chunks", r.e.tab.n, len(r.e.timers.h), r.e.buf.used, r.u.Chunks()-r.u.Available())
	}
}

func newFlow(est *slowpath.Established, now time.Duration) *flow {
	f := new(flow)
	f.init(est, now)
	return f
}
