package fastpath

import (
	"encoding/binary"
	"time"
	"unsafe" // for addresses to prefetch

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

const (
	minRTO      = 200 * time.Millisecond
	maxInnerRTO = 2 * time.Second
	finWait     = time.Second           // for a valid retransmission after a bare FIN (T9)
	delayedAck  = 40 * time.Millisecond // RFC 1122 allows 500 ms, Linux takes 40
	// How long the numbers of a flow that has ended are kept (T20): as long as
	// the kernel's TIME_WAIT where the peer may still miss our last ACK, the
	// shorter time where it cannot, or after a reset, or when there are many; in
	// any case until the inner stack would have sent again what it takes for lost.
	lingerLong  = 60 * time.Second
	lingerReset = 10 * time.Second
	lingerShort = 2 * time.Second
	// A SYN of the peer begins a plain connection only when whatever the local
	// stack had sent before it heard of a reset has come out of its queue: it
	// would pass for the new connection's. One that is negotiated gives nothing
	// of the local stack's out before that has answered the SYN.
	resetQuiet = 500 * time.Millisecond
	manyLinger = 1 << 16

	// Control bytes are sent again as often as Linux sends data again, a quarter of
	// an hour: an outage that plain TCP survives ends no flow. An Init message that
	// was never acknowledged is given up earlier.
	maxCtlTries  = 15
	maxCtlRTO    = 120 * time.Second
	maxInitTries = 9

	// A local stack can give a connection up without a word: it does so with an
	// end of stream that nobody acknowledges, and with one that was never answered.
	// Each flow is looked at once in patrolEvery, so many slots of the table at a
	// time: what that costs, mostly a cache line of each flow, no packet notices.
	patrolEvery = 5 * time.Minute
	patrolSlots = 64

	// pawsIdle is how long a flow must have been idle for the peer's last timestamp
	// to say nothing any more (RFC 7323 section 5.5).
	pawsIdle = 24 * 24 * time.Hour
	ctlSize  = 512 // most control bytes of a segment that is sent again

	// minOutMSS keeps an absurd MTU from cutting segments to nothing.
	minOutMSS = 88

	// maxInnerPayload keeps an inner packet's IP length within 16 bits.
	maxInnerPayload = 65535 - packet.IPv6Len - packet.TCPLen - packet.MaxOptions
	maxInnerPieces  = 64

	// VectorSize is the most packets that are worked on together.
	VectorSize = 256
)

// Reasons of flows that the fast path ended, beside those of package slowpath.
const (
	ReasonClosed        = "closed"          // both directions ended authentically
	ReasonAuth          = "auth"            // a frame failed authentication (TC 3.6)
	ReasonTruncated     = "truncated"       // FIN without FINp (TC 3.7)
	ReasonDataAfterFINp = "data-after-finp" // TC 3.7
	ReasonFrameLength   = "frame-length"    // clen too short for a tag and flags
	ReasonFrameFormat   = "frame-format"    // an authentic frame without its urgent field
	ReasonKeyExhausted  = "key-exhausted"   // no frame can be sealed any more within the limits of the keys
	ReasonPeerReset     = "peer-reset"
	ReasonLocalReset    = "local-reset"
	ReasonPeerSilent    = "peer-silent" // control bytes were never acknowledged
	ReasonReplaced      = "replaced"    // the local stack reused the ports
	ReasonShutdown      = "shutdown"    // the daemon was told to stop
	ReasonRestored      = "vm-restored" // this virtual machine was cloned or restored (T23)
)

// EngineConfig sizes an Engine. Zero values take the defaults.
type EngineConfig struct {
	Umem    *xdp.Umem
	Virtual bool // outer packets may carry just the pseudo-header sum (T12)
	// InnerChunks: the inner port is one of AF_XDP, too, so that packets come by
	// InnerChunks, and go by InnerOut, in chunks of Umem.
	InnerChunks  bool
	InnerVirtual bool   // Virtual, of the inner port
	Memory       int    // bytes for retained frames and custody of all flows, with their records, default 256 MiB
	FlowBudget   int    // the same for one flow and direction, default 8 MiB
	RekeyFrames  uint64 // frames sealed under one key, default and most by AEAD (T11)
	RekeyBytes   uint64 // plaintext bytes sealed under one key, default DefaultRekeyBytes
	// RekeyEvery is how long one key is used for data; 0: any time.
	RekeyEvery time.Duration
	// TCPKeepalive relays the inner stack's keep-alive probes as such, instead
	// of asking the peer for an authentic answer (TC 3.9).
	TCPKeepalive bool
	Drain        func() // called when an output vector is full: it must empty both
	// Elsewhere is shown packets whose flow this engine does not have, before
	// they count as the slow path's, and reports whether another worker has the
	// flow and gets the packet; nil: there is none. pkt is a frame from the
	// wire, or as InnerIn or InnerFrame takes it, and is not used after the call.
	Elsewhere func(dir packet.Direction, k *packet.Key, pkt []byte) bool
}

// EngineStats counts what an Engine did.
type EngineStats struct {
	OuterIn, InnerIn                             uint64 // packets received for live flows
	SegmentsOut, AcksOut, Retransmits            uint64
	InnerSegments, InnerAcks, InnerResends       uint64
	Sealed, Opened                               uint64 // frames
	BadChecksum, Malformed, PAWS, BadSeq, BadAck uint64
	BeyondWindow, OverBudget                     uint64
	Duplicates, OutOfOrder                       uint64
	OOODrops, InnerGaps, InnerGapDrops           uint64
	NoChunk, NoMemory                            uint64 // transmissions and claims lost to exhaustion
	Challenges, ResetsIgnored                    uint64
	ICMPIn, ICMPDropped                          uint64
	ToSlow, Unknown                              uint64
	// Segments with data, by direction: those that left in the chunk they had
	// come in, those that were copied because they are small (see smallPiece),
	// and others that were copied.
	InPlaceOut, SmallOut, CopiedOut uint64
	InPlaceIn, SmallIn, CopiedIn    uint64
}

// EventKind says what happened to a flow.
type EventKind uint8

const (
	// FlowEnded: the flow is closed or aborted, Info tells how. Its number
	// space lingers.
	FlowEnded EventKind = iota
	// FlowGone: the flow has left the table; its map entries can go.
	FlowGone
	// SlowFrame: Frame is for the slow path.
	SlowFrame
)

// Event is a message from an Engine to the slow path's side. Events must be
// handled in order.
type Event struct {
	Kind    EventKind
	Key     packet.Key
	Dir     packet.Direction // SlowFrame
	Frame   []byte           // SlowFrame: owned by the receiver
	Flags   uint8            // SlowFrame: of TCP
	Via     int              // SlowFrame: the worker that received it, see Engine.SetVia
	Info    FlowInfo         // FlowEnded
	Destroy bool             // FlowGone: the local socket may still be there and must not be left
}

// InnerPacket is a packet for the local stack: virtio-net header and packet
// headers, then the payload's pieces. It is valid until the next call of the
// engine.
type InnerPacket struct {
	buf    [xdp.VnetHdrLen + packet.MaxHeaders]byte
	hdrLen int
	raw    []byte // a whole packet with its virtio-net header instead of buf
	data   [][]byte

	// With EngineConfig.InnerChunks: the chunk that the data lies in, if it is to
	// leave from there.
	place ref
	off   uint32
}

// Header returns the virtio-net header and the packet's headers.
func (p *InnerPacket) Header() []byte {
	if p.raw != nil {
		return p.raw
	}
	return p.buf[:p.hdrLen]
}

// Data returns the payload's pieces.
func (p *InnerPacket) Data() [][]byte { return p.data }

type outMeta struct {
	l3, l4 uint8
	v6     bool
	summed bool
	sum    uint64 // of the payload, see packet.Sum; if summed
}

// Engine translates the flows of one worker. It does no I/O: packets and time
// go in, packets and events come out. Only one goroutine may use it.
type Engine struct {
	cfg    EngineConfig
	umem   *xdp.Umem
	buf    *buffers
	tab    *table
	pool   flowPool
	recs   ringPool[rec]
	pieces ringPool[piece]
	trimAt time.Duration // when the pools of queues let go of what is too much
	timers timerHeap

	patrolAt  time.Duration
	patrolled int // the slot of the table to look at next

	now time.Duration
	st  EngineStats

	dirty    []*flow
	open     []crypto.OpenOp
	openMeta []openMeta
	seal     []crypto.SealOp
	group    [groupSize]grouped
	opts     [packet.MaxOptions]byte
	sackOpt  [packet.MaxOptions]byte

	out       []xdp.Desc
	outMeta   []outMeta
	offload   bool // the port computes checksums
	in        []InnerPacket
	nIn       int
	inDesc    []xdp.Desc // instead, with InnerChunks
	inMeta    []outMeta
	working   []ref // chunks of the vector from the inner port
	limbo     []ref // see releaseLater
	lingering int
	events    []Event

	captures []*capture

	// reinjected is set while a frame is worked on that the slow path gave
	// back: it must not go there a second time.
	reinjected bool
	via        int

	stages *StageTimes // nil: not measured
}

// NewEngine makes an engine without flows.
func NewEngine(cfg EngineConfig) *Engine {
	if cfg.Memory == 0 {
		cfg.Memory = 256 << 20
	}
	if cfg.FlowBudget == 0 {
		cfg.FlowBudget = 8 << 20
	}
	if cfg.RekeyBytes == 0 {
		cfg.RekeyBytes = DefaultRekeyBytes
	}
	e := &Engine{
		cfg: cfg, umem: cfg.Umem, buf: newBuffers(cfg.Umem, cfg.Memory), tab: newTable(),
		open: make([]crypto.OpenOp, 0, VectorSize), openMeta: make([]openMeta, 0, VectorSize),
		seal: make([]crypto.SealOp, 0, VectorSize),
		out:  make([]xdp.Desc, 0, 2*VectorSize), outMeta: make([]outMeta, 0, 2*VectorSize),
		in: make([]InnerPacket, VectorSize), dirty: make([]*flow, 0, VectorSize), via: -1,
	}
	e.recs.bytes, e.pieces.bytes = &e.buf.rings, &e.buf.rings
	if cfg.InnerChunks {
		e.in = e.in[:1]
		e.inDesc, e.inMeta = make([]xdp.Desc, 0, 2*VectorSize), make([]outMeta, 0, 2*VectorSize)
		e.working = make([]ref, 0, VectorSize)
	}
	for i := range e.in {
		e.in[i].data = make([][]byte, 0, maxInnerPieces)
	}
	return e
}

// Out returns the frames to transmit on the wire; the chunks belong to the
// caller. FinishOut must have been called on them.
func (e *Engine) Out() []xdp.Desc { return e.out }

// ClearOut empties the outgoing vector.
func (e *Engine) ClearOut() { e.out, e.outMeta = e.out[:0], e.outMeta[:0] }

// FinishOut completes the outgoing vector's TCP checksums: in software, or
// through request, which asks the port's hardware for the checksum over
// [start, end of frame) to be stored at start+offset. The port is expected to go
// on doing what it did the last time.
func (e *Engine) FinishOut(request func(d *xdp.Desc, start, offset uint16)) {
	e.offload = request != nil
	if len(e.captures) > 0 {
		e.tapOut()
	}
	e.finish(e.out, e.outMeta, request)
	e.mark(StageEmit)
}

func (e *Engine) finish(out []xdp.Desc, meta []outMeta, request func(d *xdp.Desc, start, offset uint16)) {
	for i := range out {
		d, m := &out[i], &meta[i]
		if m.l4 == 0 {
			continue
		}
		f := e.umem.Bytes(d.Addr, int(d.Len))
		if request == nil && m.summed {
			packet.HeadChecksum(f, int(m.l3), int(m.l4), m.v6, m.sum)
			continue
		}
		if request == nil {
			packet.FullChecksum(f, int(m.l3), int(m.l4), m.v6)
			continue
		}
		packet.PartialChecksum(f, int(m.l3), int(m.l4), len(f)-int(m.l4), m.v6)
		request(d, uint16(m.l4), 16)
	}
}

// In returns the packets for the local stack.
func (e *Engine) In() []InnerPacket { return e.in[:e.nIn] }

// ClearIn empties the vector of packets for the local stack.
func (e *Engine) ClearIn() {
	if len(e.captures) > 0 {
		e.tapIn()
	}
	for i := range e.in[:e.nIn] {
		p := &e.in[i]
		clear(p.data)
		p.data, p.raw = p.data[:0], nil
	}
	e.nIn = 0
	for _, r := range e.limbo {
		e.buf.release(r)
	}
	e.limbo = e.limbo[:0]
}

// releaseLater ends a hold on custody, but not before the packets for the local
// stack that may point to it have been taken.
func (e *Engine) releaseLater(r ref) {
	if e.nIn > 0 {
		e.limbo = append(e.limbo, r)
	} else {
		e.buf.release(r)
	}
}

// Events returns and forgets the events since the last call; the slice is
// valid until the next call of the engine.
func (e *Engine) Events() []Event {
	ev := e.events
	e.events = e.events[:0]
	return ev
}

// Stats returns the counters.
func (e *Engine) Stats() EngineStats { return e.st }

// Flows returns the number of live flows and the number of those that linger.
func (e *Engine) Flows() (live, linger int) {
	e.tab.each(func(f *flow) {
		if f.state == flowLive {
			live++
		} else {
			linger++
		}
	})
	return live, linger
}

// Snapshot appends a description of each live flow to dst.
func (e *Engine) Snapshot(dst []FlowInfo) []FlowInfo { return e.describe(dst, e.all()) }

// all returns all flows, live or not.
func (e *Engine) all() []*flow {
	fs := make([]*flow, 0, e.tab.n)
	e.tab.each(func(f *flow) { fs = append(fs, f) })
	return fs
}

// describe appends a description of each of fs that is live to dst. They may have
// been found a while ago.
func (e *Engine) describe(dst []FlowInfo, fs []*flow) []FlowInfo {
	for _, f := range fs {
		if f.state == flowLive {
			dst = append(dst, e.info(f))
		}
	}
	return dst
}

// Lookup describes the live flow between the endpoints of k, whatever its VLAN.
func (e *Engine) Lookup(k *packet.Key) (FlowInfo, bool) {
	found := e.tab.find(k)
	if found == nil || found.state != flowLive {
		e.tab.each(func(f *flow) {
			if f.state == flowLive && f.key.RPort == k.RPort && f.key.LPort == k.LPort && f.key.Remote == k.Remote && f.key.Local == k.Local {
				found = f
			}
		})
	}
	if found == nil || found.state != flowLive {
		return FlowInfo{}, false
	}
	return e.info(found), true
}

func (e *Engine) info(f *flow) FlowInfo {
	st := slowpath.StateEncrypted
	switch {
	case f.state == flowReset:
		st = slowpath.StateFailed
	case f.finSealed || f.finp:
		st = slowpath.StateClosing
	}
	return FlowInfo{
		Local: f.key.LocalAddr().String(), Remote: f.key.RemoteAddr().String(), VLAN: f.key.VLAN,
		State: st, Reason: f.reason, Role: f.role.String(), TEP: f.tep.String(), AEAD: f.aead.String(), Resumed: f.resumed,
		SessionID: hexID(f.id), PeerAware: f.peerAware, BytesIn: f.bytesIn, BytesOut: f.bytesOut, FramesIn: f.framesIn, FramesOut: f.framesOut,
		Retransmits: f.retransmits, RekeysIn: f.rekeysIn, RekeysOut: f.rekeysOut, Age: (e.now - f.born).Seconds(),
	}
}

// pushOuter adds a frame, with the offsets of its IP and TCP headers, to the
// outgoing vector; l4 is 0 if its checksums are right already.
func (e *Engine) pushOuter(d xdp.Desc, l3, l4 int, v6 bool) *outMeta {
	if len(e.out) == cap(e.out) {
		e.cfg.Drain()
	}
	n := len(e.out)
	e.out, e.outMeta = e.out[:n+1], e.outMeta[:n+1]
	o, m := &e.out[n], &e.outMeta[n]
	o.Addr, o.Len, o.Options = d.Addr, d.Len, d.Options
	m.l3, m.l4, m.v6, m.summed, m.sum = uint8(l3), uint8(l4), v6, false, 0
	return m
}

func (e *Engine) newInner() *InnerPacket {
	if e.cfg.InnerChunks {
		return &e.in[0]
	}
	if e.nIn == len(e.in) {
		e.cfg.Drain()
	}
	e.nIn++
	return &e.in[e.nIn-1]
}

// touch puts a flow on the list of those to flush at the end of the vector.
func (e *Engine) touch(f *flow) {
	if !f.dirty {
		f.dirty = true
		e.dirty = append(e.dirty, f)
	}
}

// SetVia names the worker that received the packets worked on from now on; -1:
// this one.
func (e *Engine) SetVia(worker int) { e.via = worker }

// Has reports whether the engine has a flow, live or lingering.
func (e *Engine) Has(k *packet.Key) bool { return e.tab.find(k) != nil }

// Install takes over a flow from the slow path. The inner stack must not see
// the end of its handshake before.
func (e *Engine) Install(est *slowpath.Established, now time.Duration) {
	e.now = now
	if old := e.tab.find(&est.Key); old != nil {
		e.forget(old, false)
	}
	f := e.pool.get()
	f.init(est, now)
	f.keyFrames = f.aead.RekeyFrames()
	if e.cfg.RekeyFrames != 0 {
		f.keyFrames = min(f.keyFrames, e.cfg.RekeyFrames)
	}
	e.tab.insert(f)
	if n := len(est.TxInit); n > 0 {
		mem, r, off, ok := e.buf.alloc(n, &f.txSlab, true)
		if !ok {
			e.abort(f, slowpath.ReasonLimit)
			return
		}
		copy(mem, est.TxInit)
		*f.recs.push(&e.recs) = rec{oLen: uint32(n), ref: r, off: off, psh: true}
		f.txBytes += n
		f.ctlBytes += n
		if f.unaO >= f.sealO {
			e.ackedBy(f, f.unaO)
		} else {
			e.arm(f, timerCtl, now+f.ctlRTO)
		}
	}
	if !f.innerUp {
		e.arm(f, timerInner, now+f.innerRTO)
	}
	if n := len(est.RxPending); n > 0 && e.consume(f, est.RxPending, source{}) < n && f.state == flowLive {
		// These bytes were acknowledged: nobody will send them again.
		e.abort(f, slowpath.ReasonLimit)
		return
	}
	e.touch(f)
	e.flush()
}

// groupSize is the number of packets that are parsed and looked up before they
// are worked on: enough for what each needs to come from memory meanwhile.
const groupSize = 16

// grouped is a packet of a group: parsed, and with the flow that it may be of.
type grouped struct {
	seg  packet.Segment
	err  error
	hash uint64
	flow *flow // a guess, which may be wrong or out of date
}

// lookUp begins the look-up of parsed packets: first all slots of the table are
// fetched, then all flows.
func (e *Engine) lookUp(g []grouped) {
	var last uint64
	for i := range g {
		if g[i].err == nil {
			g[i].hash = e.tab.hash(&g[i].seg.Key)
			if g[i].hash != last {
				last = g[i].hash
				e.tab.prefetch(last)
			}
		}
	}
	var f *flow
	last = 0
	for i := range g {
		g[i].flow = nil
		if g[i].err != nil {
			continue
		}
		if g[i].hash != last { // not one more packet of a burst
			last = g[i].hash
			if f = e.tab.guess(last); f != nil {
				f.prefetch()
			}
		}
		g[i].flow = f
	}
}

// fetchHeads has the cache fetch the headers of the next packets of v.
func (e *Engine) fetchHeads(v []xdp.Desc) {
	for i := range v[:min(len(v), groupSize)] {
		prefetch(unsafe.Pointer(unsafe.SliceData(e.umem.Bytes(v[i].Addr, int(v[i].Len)))), 2)
	}
}

// parseChunks parses the packets in the first chunks of v and looks them up.
func (e *Engine) parseChunks(g []grouped, v []xdp.Desc, dir packet.Direction) {
	for i := range g {
		g[i].err = packet.Parse(e.umem.Bytes(v[i].Addr, int(v[i].Len)), dir, &g[i].seg)
	}
	e.mark(StageParse)
	e.lookUp(g)
	e.mark(StageLookup)
}

// found ends the look-up of a packet.
func (e *Engine) found(p *grouped) *flow {
	if f := p.flow; f != nil && !f.gone && f.key == p.seg.Key {
		return f
	}
	return e.tab.findHash(&p.seg.Key, p.hash)
}

// OuterIn works on a vector of frames from the wire. It takes over their chunks.
func (e *Engine) OuterIn(v []xdp.Desc, now time.Duration) {
	e.now = now
	e.fetchHeads(v)
	for len(v) > 0 {
		g := e.group[:min(len(v), groupSize)]
		e.mark(StageTranslate)
		e.parseChunks(g, v, packet.FromOuter)
		e.fetchHeads(v[len(g):])
		for i := range g {
			d := &v[i]
			r := e.buf.hold(d.Addr)
			e.outerPacket(&g[i], e.umem.Bytes(d.Addr, int(d.Len)), r, uint32(d.Addr&uint64(e.umem.ChunkSize()-1)))
			e.buf.release(r)
		}
		v = v[len(g):]
	}
	e.flush()
}

// OuterFrame works on one frame from the wire that does not lie in a chunk,
// such as a packet of several buffers. The frame is not used after the call.
func (e *Engine) OuterFrame(frame []byte, now time.Duration) {
	e.now = now
	g := e.group[:1]
	g[0].err = packet.Parse(frame, packet.FromOuter, &g[0].seg)
	e.lookUp(g)
	e.outerPacket(&g[0], frame, ref{}, 0)
	e.flush()
}

func (e *Engine) outerPacket(p *grouped, frame []byte, r ref, off uint32) {
	s := &p.seg
	if p.err != nil {
		if p.err != packet.ErrNotTCP || !e.outerICMP(frame) {
			e.st.Malformed++
		}
		return
	}
	f := e.found(p)
	if f == nil && e.elsewhere(packet.FromOuter, &s.Key, frame) {
		return
	}
	if len(e.captures) > 0 && !e.reinjected {
		e.tap(false, false, &s.Key, nil, s.Frame)
	}
	if !s.ChecksumOK(e.cfg.Virtual) {
		e.st.BadChecksum++
		return
	}
	if f == nil {
		e.toSlow(packet.FromOuter, &s.Key, s.Flags, s.Frame)
		return
	}
	e.st.OuterIn++
	if f.dirty && s.Flags&(packet.SYN|packet.ACK) == packet.SYN {
		// The end of the flow may have come just before, in the same vector.
		e.flush()
	}
	if f.state != flowLive {
		e.outerLate(f, s)
		return
	}
	e.outerSegment(f, s, source{ref: r, off: off + uint32(s.Data), mark: markLead})
}

// outerSegment: validity first, then acknowledgement, then data (T12).
func (e *Engine) outerSegment(f *flow, s *packet.Segment, src source) {
	o := offOf(f.irs, s.Seq, f.nxtO)
	n := int64(s.Len())
	if s.Flags&packet.SYN != 0 {
		// A copy of the handshake, or a blind one (RFC 5961 section 4). A
		// lost final ACK is answered by the first form at once.
		if s.Flags&packet.ACK != 0 && s.Seq == f.irs {
			e.sendOuterAck(f, f.sentO)
		} else {
			e.challenge(f)
		}
		return
	}
	if s.Flags&packet.RST != 0 {
		switch {
		case o == int64(f.nxtO) && !f.parted():
			e.peerReset(f)
		case o > int64(f.nxtO) && o <= int64(f.rxEdge):
			e.challenge(f)
		default:
			e.st.ResetsIgnored++
		}
		return
	}
	if f.tsOK && s.HasTS && packet.TSOlder(s.TSval, f.tsRemote) && f.still < int(pawsIdle/patrolEvery) {
		e.st.PAWS++
		if n > 0 {
			e.challenge(f)
		}
		return
	}
	if o+n < int64(f.ackSentO) || o > int64(f.rxEdge) {
		e.st.BadSeq++
		if n > 0 && o+n <= int64(f.nxtO) {
			f.dsack = run{s: uint64(max(o, 0)), e: uint64(max(o+n, 1))}
		}
		// A keep-alive or window probe lives on this answer. If forged segments
		// had brought both ends out of step, each would answer the other's
		// answers: those without data get a few a second.
		switch {
		case n == 0 && s.Flags&packet.FIN == 0:
			e.challenge(f)
		case s.Flags&packet.FIN != 0 && o+n == int64(f.nxtO)-1:
			f.ackNow = f.finTaken
		default:
			f.ackNow = true
		}
		e.passProbe(f)
		e.touch(f)
		return
	}
	if s.Flags&packet.ACK == 0 {
		return
	}
	a := offOf(f.iss, s.Ack, f.unaO)
	if a > int64(f.sentO) || a < int64(f.unaO)-1<<30 {
		e.st.BadAck++
		e.challenge(f)
		return
	}
	if f.tsOK && s.HasTS {
		if o <= int64(f.nxtO) {
			f.tsRemote = s.TSval
		}
		f.tsRemoteEcr = s.TSecr
	}
	f.inner.Learn(s)
	f.unheard = false
	if n > 0 {
		// A device may have merged several segments.
		f.rcvMSS = max(f.rcvMSS, min(int(n), int(f.inMSS)))
		if s.Flags&packet.CWR != 0 {
			f.eceLatch = false
			f.rxCWR = true
		}
		if s.TOS&3 == 3 {
			src.mark |= markCE
			f.eceLatch = f.ecnOK
		} else {
			f.rxECN = s.TOS & 3
		}
		if s.Flags&packet.PSH != 0 {
			src.mark |= markPSH
		}
	}
	if f.probing {
		f.probing, f.ackMustI = false, true
	}
	f.peerECE = s.Flags&packet.ECE != 0 && f.ecnOK
	e.outerAck(f, s, uint64(o), a, n)
	e.outerData(f, o, s.Payload(), src, s.Flags&packet.FIN != 0)
	e.touch(f)
}

// outerAck takes acknowledgement, window and SACK of an outer segment.
func (e *Engine) outerAck(f *flow, s *packet.Segment, o uint64, a, n int64) {
	advanced := a > int64(f.unaO)
	if advanced {
		e.ackedBy(f, uint64(a))
	}
	if a < int64(f.unaO) {
		return
	}
	edge := uint64(a) + uint64(s.Wnd)<<f.remoteShift
	moved := edge != f.edgeO
	if advanced || int64(o) > int64(f.wl1) || o == f.wl1 && (int64(edge) > int64(f.edgeO) || s.Wnd == 0) {
		f.wl1 = o
		if moved {
			f.edgeO = edge
			f.ackDueI = true
			if f.held {
				f.holdRTO = minRTO
			}
		}
	}
	if s.NSACK > 0 {
		e.controlLost(f, s)
	}
	// True duplicates, and whatever carries SACK blocks, are shown to the
	// inner stack one by one: its loss recovery counts them.
	sack := f.mapSACK(s, e.sackOpt[:packet.MaxOptions-12*b2i(f.tsOK)])
	if n == 0 && s.Flags&packet.FIN == 0 && !advanced && !moved && f.sentO > f.unaO && f.innerUp && (sack != nil || !f.sackOK) {
		e.sendInnerAck(f, sack)
	} else if sack != nil && f.innerUp {
		e.sendInnerAck(f, sack)
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// challenge sends an ACK that tells an honest peer where we are, a few a second
// (RFC 5961).
func (e *Engine) challenge(f *flow) {
	if e.now-f.challengeAt >= time.Second {
		f.challengeAt, f.challengeN = e.now, 0
	}
	if f.challengeN < 10 {
		f.challengeN++
		e.st.Challenges++
		e.sendOuterAck(f, f.sentO)
	}
}

// peerReset: an exact reset by the peer (T15).
func (e *Engine) peerReset(f *flow) {
	e.runOpen()
	if f.state != flowLive {
		return
	}
	e.deliverRest(f)
	e.sendInnerReset(f, seqOf(f.irs, f.sntI))
	e.end(f, flowReset, ReasonPeerReset)
}

// abort ends a flow on both sides (TC 3.3, T15). Data that was authentic is
// delivered before, an end of the stream is not.
func (e *Engine) abort(f *flow, reason string) {
	if f.state != flowLive {
		return
	}
	e.runSeal()
	f.finp = false
	e.deliverRest(f)
	e.sendOuterReset(f, seqOf(f.iss, f.sentO))
	// Of an inner stack that is still in SYN-SENT only the acknowledgement
	// counts (RFC 9293).
	e.sendInnerReset(f, seqOf(f.irs, f.sntI))
	e.end(f, flowReset, reason)
}

// end releases everything a flow held but its numbers, and reports it.
func (e *Engine) end(f *flow, state uint8, reason string) {
	f.reason = reason
	e.runSeal()
	f.state, f.ended = state, e.now
	e.events = append(e.events, Event{Kind: FlowEnded, Key: f.key, Info: e.info(f)})
	for f.recs.len() > 0 {
		e.buf.release(f.recs.at(0).ref)
		f.recs.pop(&e.recs)
	}
	for f.pieces.len() > 0 {
		e.releaseLater(f.pieces.at(0).ref)
		f.pieces.pop(&e.pieces)
	}
	for i := range f.ooo {
		e.buf.release(f.ooo[i].ref)
	}
	if f.asm != nil {
		e.buf.release(f.asmRef)
	}
	e.buf.leave(&f.txSlab)
	e.buf.leave(&f.rxSlab)
	f.ooo, f.runs, f.asm, f.asmHave, f.backlog, f.release = nil, nil, nil, 0, nil, nil
	f.hdrN, f.txBytes, f.ctlBytes, f.cursor = 0, 0, 0, 0
	f.sess.Erase()
	f.sess, f.txKey, f.rxKey = nil, nil, nil
	f.timers = [numTimers]time.Duration{}
	linger := lingerShort
	switch {
	case state == flowReset:
		linger = lingerReset
	case f.closedFirst && e.lingering < manyLinger:
		linger = lingerLong
	}
	e.lingering++
	// The inner stack, too, may miss its last ACK: what it sent again then would
	// leave as plaintext if nothing were known of the flow.
	e.arm(f, timerLinger, max(e.now+max(linger, 4*f.rtt), f.resendAt+3*(f.resendAt-f.stallAt)))
}

// forget removes a flow from the table.
func (e *Engine) forget(f *flow, destroy bool) {
	if f.state == flowLive {
		e.end(f, flowReset, ReasonReplaced)
	}
	f.gone = true
	e.lingering--
	e.timers.remove(f)
	e.tab.remove(f)
	e.pool.retire(f)
	e.events = append(e.events, Event{Kind: FlowGone, Key: f.key, Destroy: destroy})
}

func offersENO(s *packet.Segment) (found bool) {
	_ = packet.WalkOptions(s.Options(), func(o []byte) bool {
		found = found || o[0] == packet.OptENO
		return !found
	})
	return found
}

// outerLate answers a segment for a flow that has ended.
func (e *Engine) outerLate(f *flow, s *packet.Segment) {
	if s.Flags&(packet.SYN|packet.ACK) == packet.SYN {
		if f.state == flowReset && e.now-f.ended < resetQuiet && !offersENO(s) {
			return
		}
		// The socket may have missed its reset: what it would send now
		// concerns a connection that is being opened, or is plain.
		e.forget(f, f.state == flowReset)
		e.toSlow(packet.FromOuter, &s.Key, s.Flags, s.Frame)
		return
	}
	if s.Flags&packet.RST != 0 {
		return
	}
	if f.state == flowReset {
		if s.Flags&packet.ACK != 0 {
			e.sendOuterReset(f, s.Ack)
		}
		return
	}
	if s.Len() > 0 || s.Flags&packet.FIN != 0 {
		e.challenge(f)
	}
}

// InnerIn works on one packet from the local stack: a virtio-net header, then
// the frame, which may be a super-segment. buf is scratch: its bytes are
// overwritten, and are not used after Flush.
func (e *Engine) InnerIn(buf []byte, now time.Duration) {
	one := [1][]byte{buf}
	e.InnerVec(one[:], now)
}

// InnerVec is InnerIn for a vector of packets.
func (e *Engine) InnerVec(bufs [][]byte, now time.Duration) {
	e.now = now
	for len(bufs) > 0 {
		g := e.group[:min(len(bufs), groupSize)]
		for i := range g {
			if len(bufs[i]) < xdp.VnetHdrLen {
				g[i].err = packet.ErrTruncated
				continue
			}
			g[i].err = packet.Parse(bufs[i][xdp.VnetHdrLen:], packet.FromInner, &g[i].seg)
		}
		e.mark(StageParse)
		e.lookUp(g)
		e.mark(StageLookup)
		for i := range g {
			if g[i].err != nil {
				e.st.Malformed++
				continue
			}
			e.innerPacket(&g[i], bufs[i])
		}
		e.mark(StageTranslate)
		bufs = bufs[len(g):]
	}
}

func (e *Engine) innerPacket(p *grouped, buf []byte) {
	v := xdp.ParseVnetHdr(buf)
	frame := buf[xdp.VnetHdrLen:]
	gs := 0
	if v.GSOType&^xdp.VnetGSOECN != 0 {
		gs = int(v.GSOSize)
	}
	e.innerSegment(p, buf, frame, source{}, gs)
}

// innerSegment works on a parsed segment from the local stack, which came as pkt;
// src is where its frame lies, gs the size at which it is to be cut.
func (e *Engine) innerSegment(p *grouped, pkt, frame []byte, src source, gs int) {
	s := &p.seg
	f := e.found(p)
	if f == nil && e.elsewhere(packet.FromInner, &s.Key, pkt) {
		return
	}
	if len(e.captures) > 0 && !e.reinjected {
		e.tap(true, true, &s.Key, &outMeta{l3: uint8(s.L3), l4: uint8(s.L4), v6: s.V6}, s.Frame)
	}
	if f == nil {
		e.cutToSlow(s, gs)
		return
	}
	e.st.InnerIn++
	if f.state != flowLive {
		e.innerLate(f, s)
		return
	}
	if s.Flags&packet.SYN != 0 {
		e.innerSYN(f, s)
		return
	}
	if s.Flags&packet.RST != 0 {
		e.runSeal()
		e.sendOuterReset(f, seqOf(f.iss, f.sentO))
		e.end(f, flowReset, ReasonLocalReset)
		return
	}
	if s.Flags&packet.ACK == 0 {
		return
	}
	if !f.innerUp {
		f.innerUp = true
		f.innerRTO = minRTO
		f.disarm(timerInner)
	}
	f.outer.Learn(s)
	if s.HasTS && packet.SeqDiff(s.TSval, f.tsLocal) > 0 {
		f.tsLocal = s.TSval
	}
	if n := s.Len(); n > 0 {
		f.txECN = s.TOS & 3
	}
	e.innerAcked(f, s, s.Len() == 0 && s.Flags&packet.FIN == 0)
	src.off += uint32(s.Data - 1)
	e.innerData(f, s.Seq, frame[s.Data-1:len(s.Frame)], src, gs, s.Flags, s.Urg)
	e.touch(f)
}

// innerSYN: a copy of the inner handshake, which the release answers (T18), or
// a new connection on the same ports.
func (e *Engine) innerSYN(f *flow, s *packet.Segment) {
	if s.Seq == f.iss && len(f.release) > 0 {
		e.SendInner(f.release, e.now)
		return
	}
	if s.Flags&packet.ACK != 0 {
		return
	}
	e.flush() // as for a SYN from the wire
	e.forget(f, false)
	e.toSlow(packet.FromInner, &s.Key, s.Flags, s.Frame)
}

// innerLate answers the local stack for a flow that has ended.
func (e *Engine) innerLate(f *flow, s *packet.Segment) {
	if s.Flags&packet.SYN != 0 {
		e.forget(f, false)
		e.toSlow(packet.FromInner, &s.Key, s.Flags, s.Frame)
		return
	}
	if s.Flags&packet.RST != 0 {
		return
	}
	switch {
	case f.state == flowReset && s.Flags&packet.ACK != 0:
		e.sendInnerReset(f, s.Ack)
	case f.state != flowReset && (s.Len() > 0 || s.Flags&packet.FIN != 0):
		e.sendInnerAck(f, nil)
	default:
		return
	}
	// Should this one get lost, too, the next retransmission comes after at most
	// twice the time since the last one.
	e.arm(f, timerLinger, max(f.timers[timerLinger], e.now+lingerShort, e.now+3*(e.now-f.ended)))
}

// Flush completes a vector of InnerIn calls.
func (e *Engine) Flush(now time.Duration) {
	e.now = now
	e.flush()
}

// flush runs the queued cryptography and then, flow by flow, what the vector
// of packets has made due.
func (e *Engine) flush() {
	e.mark(StageTranslate)
	e.runSeal()
	e.runOpen()
	for i := 0; i < len(e.dirty); i++ {
		f := e.dirty[i]
		f.dirty = false
		if f.state == flowLive {
			e.flushFlow(f)
		}
		e.dirty[i] = nil
	}
	e.dirty = e.dirty[:0]
	e.pool.recycle()
	if e.now >= e.trimAt {
		short := e.buf.short()
		e.recs.trim(short)
		e.pieces.trim(short)
		e.trimAt = e.now + trimInterval
	}
	if e.now >= e.patrolAt {
		e.patrol()
	}
	e.mark(StageEmit)
}

// patrol looks at the next part of the flows.
func (e *Engine) patrol() {
	e.patrolAt = e.now + patrolEvery*patrolSlots/time.Duration(max(e.tab.size(), patrolSlots))
	for range patrolSlots {
		if f := e.tab.at(e.patrolled); f != nil && f.state == flowLive {
			e.lookAfter(f)
		}
		e.patrolled++
	}
}

// lookAfter asks the inner stack for a sign of life when it should have something
// to say of a flow in which nothing has happened since the last time: if its socket
// is gone it answers with a reset, and the flow does not stay for ever.
func (e *Engine) lookAfter(f *flow) {
	if seen := f.nxtO + f.innerAck + f.sealI; seen != f.seen {
		f.seen, f.still = seen, 0
		return
	}
	f.still++
	if f.innerUp && (f.finSealed || f.ackI < f.sealI) {
		e.probeInner(f)
	}
}

func (e *Engine) flushFlow(f *flow) {
	if f.rxGen == f.rxGenQ && f.rxOldest != f.rxGen {
		f.sess.AdvanceRecv(f.rxGen)
		f.rxOldest = f.rxGen
	}
	e.control(f)
	if f.state != flowLive {
		return
	}
	e.pushNew(f)
	e.outerFin(f)
	if f.state != flowLive {
		return
	}
	e.deliver(f)
	e.ackOuter(f)
	if f.ackMustI && f.innerUp {
		e.sendInnerAck(f, nil)
	}
	if f.ackDueI && f.innerUp {
		// An ACK that tells nothing new would look like a duplicate (T2).
		w := e.innerWindow(f) << f.remoteShift
		if f.ackI != f.ackShownI || w > f.wndShownI || w<<1 < f.wndShownI {
			e.sendInnerAck(f, nil)
		}
		f.ackDueI = false
	}
	if f.finp && f.finSealed && f.unaO == f.sealO && f.innerAck == f.dlvI+1 {
		if f.finTaken {
			e.end(f, flowLinger, ReasonClosed)
		} else if f.timers[timerFin] == 0 {
			// Both ends are authentic; only the bare outer FIN is missing,
			// and with a dead peer it will not come.
			e.arm(f, timerFin, e.now+lingerLong)
		}
	}
}

// ackOuter decides whether the peer gets an ACK now. In steady state the inner
// stack's own ACKs set the pace; out of order, inside a frame, and when the
// inner window is closed, the daemon follows TCP's rule of every second
// segment (T1), and so it does when little of what came is data, of which the inner
// stack would delay the ACK, or have none to send. For a while after a gap every segment is
// acknowledged, as Linux does it: the peer's window may be a single segment then,
// and the inner stack, which saw no gap, would delay the ACK of it.
func (e *Engine) ackOuter(f *flow) {
	un := f.nxtO - f.ackSentO
	target := e.rxTarget(f)
	mss := uint64(f.rcvMSS)
	opened := target >= f.rxEdge+2*mss || target > f.rxEdge && f.rxEdge < f.nxtO+mss
	partial := uint64(f.hdrN + f.asmHave)
	now := f.ackNow || f.innerAcks && (un > 0 || opened)
	now = now || min(un, partial) >= 2*mss
	now = now || un >= 2*mss && (f.sntI < f.dlvI || !f.innerUp || f.meanIn < smallFrame || 2*(f.sntI-f.innerAck) < un)
	now = now || opened && partial > 0
	now = now || un > 0 && f.quickAcks > 0
	f.innerAcks = false
	switch {
	case now:
		if un > 0 && f.quickAcks > 0 {
			f.quickAcks--
		}
		e.sendOuterAck(f, f.sentO)
	case un > 0 && f.timers[timerAck] == 0:
		e.arm(f, timerAck, e.now+delayedAck)
	}
}

// fire runs one timer of a flow.
func (e *Engine) fire(f *flow, which int) {
	switch which {
	case timerLinger:
		e.forget(f, f.state == flowReset)
	case timerAck:
		if f.nxtO != f.ackSentO {
			e.sendOuterAck(f, f.sentO)
		}
	case timerFin:
		if f.finp {
			e.end(f, flowLinger, ReasonClosed)
		} else if f.peerFin && !f.finTaken && f.nxtO == f.peerFinO {
			e.abort(f, ReasonTruncated)
		}
	case timerInner:
		e.innerFired(f)
	case timerHold:
		e.holdFired(f)
		e.touch(f)
	case timerRekey:
		// While the peer owes an answer, or can give none after its end of stream,
		// the bit has to ride on data (TC 3.8).
		f.rekeyNext = f.rekeyNext || !e.rekey(f)
	case timerCtl:
		from, to, ok := f.controlOutstanding()
		if !ok {
			return
		}
		// How long a probe of the inner stack may go unanswered is for the
		// inner stack to decide.
		tries := maxCtlTries
		if f.unaO < f.initO {
			tries = maxInitTries
		}
		if f.ctlTries >= tries && !f.verifying {
			e.abort(f, ReasonPeerSilent)
			return
		}
		f.ctlTries++
		e.runSeal()
		// The path may swallow large segments, and nobody else finds out with
		// these bytes. Once that may be so, each loss that began with a large
		// one again would cost the same timeouts again.
		f.ctlSmall = f.ctlSmall || f.ctlRTO > 2*max(minRTO, 3*f.rtt)
		size := f.outMSS
		if f.ctlSmall {
			size = min(size, ctlSize)
		}
		var h packet.Header
		e.xmit(f, &h, f.recByOuter(from), from, to, size, false, true)
		f.ctlRTO = min(2*f.ctlRTO, maxCtlRTO)
		e.arm(f, timerCtl, e.now+f.ctlRTO)
	}
}

// SetMTU cuts what live flows send from now on to an IP MTU of the outer
// interface, in bytes. It does not make their segments larger: the peer was told
// of the segment size when the flow began.
func (e *Engine) SetMTU(mtu int) {
	e.tab.each(func(f *flow) {
		f.outMSS = max(min(f.outMSS, mtu-f.ipLen()-packet.TCPLen), minOutMSS)
	})
}

// Pressed reports whether memory or chunks are so short that no flow should be
// begun: what is left is for those that there are.
func (e *Engine) Pressed() bool {
	b := e.buf
	return b.tight() || b.crowded() || e.umem.Available() == 0
}

// AbortAll ends every live flow with the given reason, and forgets those that have
// ended. The inner stack may not have heard yet of the end of one that ended just
// now, and would send its last bytes again: its socket must not be left either.
func (e *Engine) AbortAll(reason string, now time.Duration) {
	e.now = now
	for _, f := range e.all() {
		e.abort(f, reason)
		e.forget(f, f.state == flowReset || e.now-f.ended < lingerShort)
	}
	e.flush()
}

// Reinject works on a frame of a live flow that had gone to the slow path
// before the flow was installed. The frame is not used after the call.
func (e *Engine) Reinject(dir packet.Direction, frame []byte, now time.Duration) {
	e.reinjected = true
	if dir == packet.FromOuter {
		e.OuterFrame(frame, now)
	} else if e.cfg.InnerChunks {
		e.InnerFrame(append([]byte(nil), frame...), now)
	} else {
		e.InnerIn(append(make([]byte, xdp.VnetHdrLen), frame...), now)
		e.flush()
	}
	e.reinjected = false
}

// elsewhere reports whether a packet of an unknown flow went to another worker.
func (e *Engine) elsewhere(dir packet.Direction, k *packet.Key, pkt []byte) bool {
	return e.cfg.Elsewhere != nil && !e.reinjected && e.cfg.Elsewhere(dir, k, pkt)
}

// toSlow gives the slow path a frame that concerns a flow which is not ours, with
// the TCP flags of a segment.
func (e *Engine) toSlow(dir packet.Direction, k *packet.Key, flags uint8, frame []byte) {
	if e.reinjected {
		e.st.Unknown++
		return
	}
	e.st.ToSlow++
	e.events = append(e.events, Event{
		Kind: SlowFrame, Key: *k, Dir: dir, Frame: append([]byte(nil), frame...), Flags: flags, Via: e.via,
	})
}

// cutToSlow does the same with an inner packet, cut to segments.
func (e *Engine) cutToSlow(s *packet.Segment, gs int) {
	p := s.Payload()
	if gs <= 0 || len(p) <= gs || e.reinjected {
		e.toSlow(packet.FromInner, &s.Key, s.Flags, s.Frame)
		return
	}
	for off := 0; off < len(p); off += gs {
		m := min(gs, len(p)-off)
		f := packet.Rewrite(nil, s, s.Options(), p[off:off+m])
		binary.BigEndian.PutUint32(f[s.L4+4:], s.Seq+uint32(off))
		fl := s.Flags
		if off+m < len(p) {
			fl &^= packet.FIN | packet.PSH
		}
		if off > 0 {
			fl &^= packet.CWR
		}
		f[s.L4+13] = fl
		e.st.ToSlow++
		e.events = append(e.events, Event{Kind: SlowFrame, Key: s.Key, Dir: packet.FromInner, Frame: f, Flags: fl, Via: e.via})
	}
}

// SendOuter transmits a frame that the slow path made. Its TCP checksum is
// filled in later.
func (e *Engine) SendOuter(frame []byte, now time.Duration) {
	e.now = now
	addr, ok := e.umem.Alloc()
	if !ok {
		e.st.NoChunk++
		return
	}
	addr += xdp.Headroom
	var x packet.L3Info
	if len(frame) > e.umem.ChunkSize()-xdp.Headroom || packet.ParseL3(frame, &x) != nil || x.Proto != 6 {
		e.umem.Free(addr)
		e.st.Malformed++
		return
	}
	n := copy(e.umem.Bytes(addr, len(frame)), frame[:x.End])
	e.pushOuter(xdp.Desc{Addr: addr, Len: uint32(n)}, x.L3, x.L4, x.V6)
}

// SendInner injects a frame into the local stack. The frame must have come
// from the local slow path, or have passed ChecksumOK.
func (e *Engine) SendInner(frame []byte, now time.Duration) {
	e.now = now
	var x packet.L3Info
	if packet.ParseL3(frame, &x) != nil {
		e.st.Malformed++
		return
	}
	if e.cfg.InnerChunks {
		e.sendInnerChunk(frame, &x)
		return
	}
	p := e.newInner()
	p.raw = make([]byte, xdp.VnetHdrLen+x.End)
	copy(p.raw[xdp.VnetHdrLen:], frame[:x.End])
	if x.Proto == 6 {
		packet.PartialChecksum(p.raw[xdp.VnetHdrLen:], x.L3, x.L4, x.End-x.L4, x.V6)
		v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(x.L4), CsumOffset: 16}
		v.Put(p.raw)
	}
}

func hexID(id [33]byte) string {
	const digits = "0123456789abcdef"
	b := make([]byte, 66)
	for i, c := range id {
		b[2*i], b[2*i+1] = digits[c>>4], digits[c&15]
	}
	return string(b)
}
