package fastpath

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// The simulator: model stacks, engine, hostile network, engine, model stacks,
// all in virtual time and from one seed. A monitor on the wire opens every
// frame with keys of its own and holds each segment against what was sent
// before.

var (
	simSeed  = flag.Uint64("sim.seed", 0, "run the simulator with this seed alone")
	simSeeds = flag.Int("sim.seeds", 0, "run the simulator with that many seeds")
	simFirst = flag.Uint64("sim.first", 1, "the first of the seeds")
	simTrace = flag.Bool("sim.trace", false, "log every packet")
)

// simSeedList returns the seeds to run: one by flag or by TCPCRYPT_SIM_SEED, or
// as many as the flag, TCPCRYPT_SIM_SEEDS or the caller says.
func simSeedList(n int) []uint64 {
	if s, err := strconv.ParseUint(os.Getenv("TCPCRYPT_SIM_SEED"), 0, 64); err == nil && *simSeed == 0 {
		return []uint64{s}
	}
	if *simSeed != 0 {
		return []uint64{*simSeed}
	}
	if k, err := strconv.Atoi(os.Getenv("TCPCRYPT_SIM_SEEDS")); err == nil {
		n = k
	}
	if *simSeeds != 0 {
		n = *simSeeds
	}
	seeds := make([]uint64, n)
	for i := range seeds {
		seeds[i] = *simFirst + uint64(i)
	}
	return seeds
}

// netConfig is the network in one direction. Probabilities are per packet and
// apply until the scenario's quiet time.
type netConfig struct {
	delay, jitter          time.Duration
	loss                   float64
	burstIn, burstOut      float64 // of entering and leaving a state that loses everything
	dup, reorder, corrupt  float64
	forge                  float64 // flips a payload bit and mends the checksum
	split, merge           float64
	ce                     float64
	mtu                    int // of the path, 0: no limit
	tapLoss, tapDup        float64
	tapReadLoss, tapRdDupe float64
}

// flowConfig is one connection.
type flowConfig struct {
	aead              crypto.AEAD
	roleA             int // the node that has role A
	active            int // the node that opened
	resumed           bool
	v6                bool
	vlan              uint16
	mss               int // of both ends' MSS options
	sack, ts, ws, ecn bool
	model             [2]modelConfig
	app               [2]appConfig
	initAcked         int // 0: nothing of role B's Init2, 1: half, 2: all
	lateInstall       bool
	iss               [2]uint32
	lateTime          time.Duration
}

type scenario struct {
	seed         uint64
	net          [2]netConfig // by sending node
	quiet        time.Duration
	flows        []flowConfig
	chunks       [2]int
	chunkSize    int
	memory       [2]int
	flowBudget   int
	rekeyFrames  uint64
	rekeyBytes   uint64
	rekeyEvery   time.Duration
	tcpKeepalive bool
	pollDelay    time.Duration // most time that packets gather to a vector
	virtual      bool          // checksum offload between virtual devices
	mayAbort     bool          // a reset is a legal outcome
	source       rand.Source   // of all chance, instead of the seed
	limit        time.Duration // everything must have ended by then
}

// rand returns one of the scenario's streams of chance.
func (sc *scenario) rand(stream uint64) *rand.Rand {
	if sc.source != nil {
		return rand.New(sc.source)
	}
	return rand.New(rand.NewPCG(sc.seed, stream))
}

type simEvent struct {
	at   time.Duration
	ord  uint64
	node int
	buf  []byte
}

type eventHeap []simEvent

func (h eventHeap) less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].ord < h[j].ord
}

func (h *eventHeap) push(e simEvent) {
	*h = append(*h, e)
	v := *h
	i := len(v) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !v.less(i, p) {
			break
		}
		v[i], v[p] = v[p], v[i]
		i = p
	}
}

func (h *eventHeap) pop() simEvent {
	v := *h
	top := v[0]
	last := len(v) - 1
	v[0] = v[last]
	v[last] = simEvent{}
	v = v[:last]
	i := 0
	for {
		c := 2*i + 1
		if c >= last {
			break
		}
		if c+1 < last && v.less(c+1, c) {
			c++
		}
		if !v.less(c, i) {
			break
		}
		v[i], v[c] = v[c], v[i]
		i = c
	}
	*h = v
	return top
}

// simNode is one host: an engine with its packet memory, and the models of its
// kernel's connections.
type simNode struct {
	s      *sim
	id     int
	e      *Engine
	u      *xdp.Umem
	flows  map[packet.Key]*simFlow
	outer  [][]byte
	inner  [][]byte
	spare  [][]byte
	pollAt time.Duration // 0: not due
	vec    []xdp.Desc
	burst  bool
	ended  map[string]int
	asm    []byte
}

// simFlow is one connection with its two ends and what the wire saw.
type simFlow struct {
	cfg  *flowConfig
	m    [2]*model
	key  [2]packet.Key
	est  [2]*slowpath.Established
	wire [2]*wire // by sending node
	up   [2]bool
	gone [2]bool
	name string
}

type sim struct {
	sc      *scenario
	rng     *rand.Rand
	now     time.Duration
	ord     uint64
	events  eventHeap
	nodes   [2]*simNode
	flows   []*simFlow
	err     string
	segs    int // outer segments
	bytes   uint64
	steps   int
	small   [][]byte
	big     [][]byte
	trace   bool
	reasons map[string]int

	drop        func(onWire bool) bool // loses the packet at hand
	dropSegment func(from int, g *packet.Segment) bool
}

const bigBuf = 70000

func (s *sim) getBuf(n int) []byte {
	list, size := &s.small, 2048
	if n > size {
		list, size = &s.big, max(bigBuf, n)
	}
	if k := len(*list); k > 0 {
		b := (*list)[k-1]
		*list = (*list)[:k-1]
		return b[:n]
	}
	return make([]byte, n, size)
}

func (s *sim) putBuf(b []byte) {
	switch cap(b) {
	case 2048:
		s.small = append(s.small, b)
	case bigBuf:
		s.big = append(s.big, b)
	}
}

// fail records the first violation; the run stops there.
func (s *sim) fail(format string, args ...any) {
	if s.err == "" {
		s.err = fmt.Sprintf("at %v: ", s.now) + fmt.Sprintf(format, args...)
	}
}

func (s *sim) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

func (s *sim) logf(format string, args ...any) {
	if s.trace {
		fmt.Printf("%12v %s\n", s.now, fmt.Sprintf(format, args...))
	}
}

func addr16(v6 bool, host, flow int) (b [16]byte) {
	if v6 {
		b = [16]byte{0: 0xfd, 15: byte(host + 1), 14: byte(flow)}
	} else {
		b = [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 7, 14: byte(flow), 15: byte(host + 1)}
	}
	return b
}

// makeFrame builds a frame with zero payload for templates and scripted peers.
func makeFrame(src, dst [16]byte, v6 bool, vlan uint16, sp, dp uint16, tos uint8) []byte {
	f := make([]byte, 0, packet.MaxHeaders)
	f = append(f, 2, 0, 0, 0, 0, dst[15], 2, 0, 0, 0, 0, src[15])
	if vlan != 0 {
		f = append(f, 0x81, 0)
		f = binary.BigEndian.AppendUint16(f, vlan)
	}
	if v6 {
		f = append(f, 0x86, 0xdd, 0x60|tos>>4, tos<<4, 0x12, 0x34, 0, packet.TCPLen, 6, 61)
		f = append(f, src[:]...)
		f = append(f, dst[:]...)
	} else {
		f = append(f, 0x08, 0, 0x45, tos, 0, packet.IPv4Len+packet.TCPLen, 0x12, 0x34, 0x40, 0, 61, 6, 0, 0)
		f = append(f, src[12:]...)
		f = append(f, dst[12:]...)
		packet.PutIPv4Checksum(f[len(f)-packet.IPv4Len:])
	}
	f = binary.BigEndian.AppendUint16(f, sp)
	f = binary.BigEndian.AppendUint16(f, dp)
	f = append(f, 0, 0, 0, 0, 0, 0, 0, 0, 5<<4, packet.ACK, 0, 0, 0, 0, 0, 0)
	return f
}

func makeTemplate(src, dst [16]byte, v6 bool, vlan uint16, sp, dp uint16, tos uint8) (t packet.Template) {
	var s packet.Segment
	if err := packet.Parse(makeFrame(src, dst, v6, vlan, sp, dp, tos), packet.FromInner, &s); err != nil {
		panic(err)
	}
	t.Learn(&s)
	return t
}

// sessionPair makes the sessions of both roles over made-up Init messages.
func sessionPair(rng *rand.Rand, aead crypto.AEAD, n int) (init [2][]byte, sess func(role crypto.Role) *crypto.Session) {
	fill := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	init[0], init[1] = fill(n), fill(n+3)
	nonce, es := fill(32), fill(32)
	return init, func(role crypto.Role) *crypto.Session {
		return crypto.NewSession(role, aead, byte(crypto.TEPX25519), []byte("transcript"), init[0], init[1], nonce, es)
	}
}

func newSim(sc *scenario) *sim {
	s := &sim{sc: sc, rng: sc.rand(1), now: time.Second, trace: *simTrace, reasons: map[string]int{}}
	for i := range s.nodes {
		u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: sc.chunks[i], ChunkSize: sc.chunkSize})
		if err != nil {
			panic(err)
		}
		n := &simNode{s: s, id: i, u: u, flows: map[packet.Key]*simFlow{}, ended: map[string]int{}}
		n.e = NewEngine(EngineConfig{
			Umem: u, Virtual: sc.virtual, Memory: sc.memory[i], FlowBudget: sc.flowBudget, RekeyFrames: sc.rekeyFrames,
			RekeyBytes: sc.rekeyBytes, RekeyEvery: sc.rekeyEvery, TCPKeepalive: sc.tcpKeepalive, Drain: n.drain,
		})
		s.nodes[i] = n
	}
	for i := range sc.flows {
		s.addFlow(i, &sc.flows[i])
	}
	return s
}

// close gives the packet memory back.
func (s *sim) close() {
	for _, n := range s.nodes {
		n.u.Close()
	}
}

func (s *sim) addFlow(i int, c *flowConfig) {
	f := &simFlow{cfg: c, name: fmt.Sprintf("flow %d", i)}
	init, sess := sessionPair(s.rng, c.aead, 75)
	if c.resumed {
		init = [2][]byte{}
	}
	for k := range 2 {
		local, remote := addr16(c.v6, k, i), addr16(c.v6, 1-k, i)
		port := [2]uint16{uint16(40000 + i), 443}
		f.key[k] = packet.Key{Local: local, Remote: remote, LPort: port[k], RPort: port[1-k], VLAN: c.vlan}
		m := newModel(fmt.Sprintf("%s node %d", f.name, k), c.model[k], c.app[k], s.sc.rand(uint64(100+2*i+k)))
		m.iss, m.irs = c.iss[k], c.iss[1-k]
		m.phase = s.rng.Uint64N(poolLen)
		m.tmpl = makeTemplate(local, remote, c.v6, c.vlan, port[k], port[1-k], c.model[k].dscp<<2)
		m.fail = s.fail
		m.quiet = s.sc.quiet
		m.alloc = s.getBuf
		n := s.nodes[k]
		m.out = func(b []byte) { n.fromModel(b) }
		f.m[k] = m
		role := crypto.RoleB
		if c.roleA == k {
			role = crypto.RoleA
		}
		f.est[k] = &slowpath.Established{
			Key: f.key[k], Session: sess(role), Role: role, TEP: crypto.TEPX25519, Active: c.active == k, Resumed: c.resumed,
			ISS: c.iss[k], IRS: c.iss[1-k], PeerMSS: c.mss, InnerMSS: c.mss,
			WScaleOK: c.ws, SACKOK: c.sack, TSOK: c.ts, ECNOK: c.ecn,
			LocalWScale: c.model[k].shift, RemoteWScale: c.model[1-k].shift,
			TxInit: init[role], RxOffset: len(init[role.Peer()]),
			OuterTmpl: m.tmpl,
			InnerTmpl: makeTemplate(remote, local, c.v6, c.vlan, port[1-k], port[k], c.model[1-k].dscp<<2),
			RTT:       time.Duration(s.rng.IntN(2)) * 20 * time.Millisecond,
		}
		f.wire[k] = newWire(s, f, k, sess(role.Peer()), init[role])
		n.flows[f.key[k]] = f
	}
	for k := range 2 {
		f.m[k].peer = f.m[1-k]
		f.m[k].checkAck = f.wire[k].checkAck
		est, peer := f.est[k], f.est[1-k]
		est.TxAcked = peer.RxOffset
		if est.Role == crypto.RoleB {
			est.TxAcked = peer.RxOffset * c.initAcked / 2
		}
		est.TSLocal = f.m[k].tsBase
		est.TSRemote = f.m[1-k].tsBase
		f.m[k].tsRecent = f.m[1-k].tsBase
		est.Release = release(f, k)
		est.InnerWnd = int(f.m[k].synWnd())
		f.m[k].rcvEdge = uint64(est.InnerWnd)
		est.RxEdge = est.RxOffset + int(min(16384, f.m[k].cfg.rcvBuf))
	}
	for k := range 2 {
		est, peer := f.est[k], f.est[1-k]
		est.PeerWnd = peer.RxEdge - est.TxAcked
		f.wire[k].start(est, peer)
		f.m[k].max = 0
	}
	s.flows = append(s.flows, f)
	for k := range 2 {
		at := s.now
		if c.lateInstall && k == c.active {
			at += c.lateTime
		}
		s.events.push(simEvent{at: at, ord: s.nextOrd(), node: 2 + 2*i + k})
	}
}

// release makes the segment that ends the handshake of node k's stack.
func release(f *simFlow, k int) []byte {
	c := f.cfg
	local, remote := f.key[k].Local, f.key[k].Remote
	b := makeFrame(remote, local, c.v6, c.vlan, f.key[k].RPort, f.key[k].LPort, 0)
	t := b[len(b)-packet.TCPLen:]
	seq := c.iss[1-k]
	t[13] = packet.SYN | packet.ACK
	if c.active != k {
		seq++
		t[13] = packet.ACK
	}
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], c.iss[k]+1)
	return b
}

func (s *sim) nextOrd() uint64 { s.ord++; return s.ord }

// install hands a flow to its engine, as the slow path does.
func (s *sim) install(f *simFlow, k int) {
	n := s.nodes[k]
	est := f.est[k]
	w := f.wire[1-k]
	if d, ok := w.delivered.next(0); ok && d.s == 0 {
		// What the slow path collected behind the Init message.
		end := min(d.e, uint64(est.RxEdge), uint64(len(w.buf)))
		if end > uint64(est.RxOffset) {
			est.RxPending = append([]byte(nil), w.buf[est.RxOffset:end]...)
		}
	}
	f.up[k] = true
	s.logf("install %s on node %d, pending %d", f.name, k, len(est.RxPending))
	n.e.Install(est, s.now)
	n.drain()
	f.m[k].open(s.now, min(65535, uint64(est.PeerWnd)))
}

// fromModel queues a packet of a model for the engine.
func (n *simNode) fromModel(b []byte) {
	s := n.s
	if s.trace {
		s.logf("node %d inner -> %s", n.id, segText(b[xdp.VnetHdrLen:]))
	}
	c := &s.sc.net[n.id]
	quiet := s.now >= s.sc.quiet
	// A reset is said once: whoever loses it waits for a keep-alive.
	var g packet.Segment
	if packet.Parse(b[xdp.VnetHdrLen:], packet.FromInner, &g) == nil && g.Flags&packet.RST != 0 {
		quiet = true
	}
	if !quiet && s.chance(c.tapReadLoss) || s.drop != nil && s.drop(false) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	n.inner = append(n.inner, b)
	if !quiet && s.chance(c.tapRdDupe) {
		d := s.getBuf(len(b))
		copy(d, b)
		n.inner = append(n.inner, d)
	}
	n.wake()
}

func (n *simNode) wake() {
	if n.pollAt == 0 {
		n.pollAt = n.s.now
		if d := n.s.sc.pollDelay; d > 0 {
			n.pollAt += time.Duration(n.s.rng.Int64N(int64(d)))
		}
	}
}

// poll is the worker's loop: both queues, then what they made due.
func (n *simNode) poll() {
	s := n.s
	n.pollAt = 0
	q := n.outer
	n.outer = nil
	for i := 0; i < len(q); i++ {
		p := q[i]
		if i+1 < len(q) && s.chance(s.sc.net[1-n.id].merge) {
			p = s.mergeRun(q, &i)
		}
		if len(p) > s.sc.chunkSize-xdp.Headroom {
			n.outerVec()
			n.e.OuterFrame(p, s.now)
			n.drain()
			s.putBuf(p)
			continue
		}
		addr, ok := n.u.Alloc()
		if !ok {
			// The fill ring ran empty, as it may; packets are lost.
			s.putBuf(p)
			continue
		}
		addr += xdp.Headroom
		copy(n.u.Bytes(addr, len(p)), p)
		n.vec = append(n.vec, xdp.Desc{Addr: addr, Len: uint32(len(p))})
		s.putBuf(p)
		if len(n.vec) == VectorSize {
			n.outerVec()
		}
	}
	n.outerVec()
	n.spare, n.inner = n.inner, n.spare[:0]
	for _, b := range n.spare {
		n.e.InnerIn(b, s.now)
	}
	n.e.Flush(s.now)
	n.drain()
	for _, b := range n.spare {
		s.putBuf(b)
	}
	n.checkEngine()
}

func (n *simNode) outerVec() {
	if len(n.vec) > 0 {
		n.e.OuterIn(n.vec, n.s.now)
		n.vec = n.vec[:0]
		n.drain()
	}
}

// drain empties the engine's outputs.
func (n *simNode) drain() {
	s := n.s
	if s.sc.virtual {
		n.e.FinishOut(func(*xdp.Desc, uint16, uint16) {})
	} else {
		n.e.FinishOut(nil)
	}
	for _, d := range n.e.Out() {
		b := s.getBuf(int(d.Len))
		copy(b, n.u.Bytes(d.Addr, int(d.Len)))
		n.u.Free(d.Addr)
		s.sent(n.id, b)
	}
	n.e.ClearOut()
	in := n.e.In()
	for i := range in {
		b := append(n.asm[:0], in[i].Header()...)
		for _, d := range in[i].Data() {
			b = append(b, d...)
		}
		n.asm = b
		n.toModel(b)
	}
	n.e.ClearIn()
	for _, ev := range n.e.Events() {
		n.event(&ev)
	}
}

func (n *simNode) event(ev *Event) {
	s := n.s
	switch ev.Kind {
	case FlowEnded:
		s.logf("node %d ended: %s", n.id, ev.Info.Reason)
		n.ended[ev.Info.Reason]++
		s.reasons[ev.Info.Reason]++
	case FlowGone:
		f := n.flows[ev.Key]
		f.gone[n.id] = true
		if ev.Destroy {
			f.m[n.id].reset = true
		} else if m := f.m[n.id]; m.eof && m.peer.eof {
			// Its last ACK got lost for longer than the flow lingered.
			m.lateRST = !m.done()
			m.reset = m.reset || m.lateRST
		} else if !m.done() {
			s.fail("node %d: flow is gone, its socket is not done: %v", n.id, f.m[n.id])
		}
	case SlowFrame:
		// A kernel without the socket answers with a reset.
		var g packet.Segment
		if ev.Dir == packet.FromOuter && packet.Parse(ev.Frame, packet.FromOuter, &g) == nil && g.Flags&packet.RST == 0 {
			f := n.flows[g.Key]
			if f == nil || !f.up[n.id] || f.m[n.id].rcv == 0 && !f.gone[n.id] {
				return
			}
			b := s.getBuf(packet.MaxHeaders)
			h := packet.Header{Seq: g.Ack, Flags: packet.RST}
			b = b[:f.m[n.id].tmpl.Compose(b, &h, 0)]
			packet.FullChecksum(b, g.L3, len(b)-packet.TCPLen, g.V6)
			s.travel(n.id, b)
		}
	}
}

func (n *simNode) toModel(b []byte) {
	s := n.s
	if s.trace {
		s.logf("node %d inner <- %s", n.id, segText(b[xdp.VnetHdrLen:]))
	}
	frame := b[xdp.VnetHdrLen:]
	var g packet.Segment
	if err := packet.Parse(frame, packet.FromOuter, &g); err == packet.ErrNotTCP {
		n.icmpToModel(frame)
		return
	} else if err != nil {
		s.fail("node %d: bad packet to the inner side: %v", n.id, err)
		return
	}
	f := n.flows[g.Key]
	if f == nil {
		s.fail("node %d: packet for an unknown socket %v", n.id, g.Key)
		return
	}
	m := f.m[n.id]
	if fl := n.e.tab.find(&g.Key); fl != nil {
		m.consumed = fl.sealI
	}
	c := &s.sc.net[n.id]
	quiet := s.now >= s.sc.quiet
	if !quiet && s.chance(c.tapLoss) || s.drop != nil && s.drop(false) {
		s.logf("lost")
		return
	}
	m.input(b, s.now)
	if !quiet && s.chance(c.tapDup) && g.Flags&packet.RST == 0 {
		m.input(b, s.now)
	}
}

// icmpToModel checks a translated ICMP error and lets the model act on it.
func (n *simNode) icmpToModel(frame []byte) {
	s := n.s
	var x packet.L3Info
	if err := packet.ParseL3(frame, &x); err != nil || !packet.ICMPChecksumOK(frame[:x.End], x.L3, x.L4, x.V6) {
		s.fail("node %d: bad ICMP message to the inner side: %v", n.id, err)
		return
	}
	m := frame[x.L4:]
	emb := m[8:]
	k := packet.Key{VLAN: x.VLAN}
	ihl, mtu := packet.IPv4Len, int(binary.BigEndian.Uint16(m[6:]))
	if x.V6 {
		ihl, mtu = packet.IPv6Len, int(binary.BigEndian.Uint32(m[4:]))
		copy(k.Local[:], emb[8:24])
		copy(k.Remote[:], emb[24:40])
	} else {
		k.Local = [16]byte{10: 0xff, 11: 0xff, 12: emb[12], 13: emb[13], 14: emb[14], 15: emb[15]}
		k.Remote = [16]byte{10: 0xff, 11: 0xff, 12: emb[16], 13: emb[17], 14: emb[18], 15: emb[19]}
	}
	k.LPort, k.RPort = binary.BigEndian.Uint16(emb[ihl:]), binary.BigEndian.Uint16(emb[ihl+2:])
	f := n.flows[k]
	if f == nil {
		s.fail("node %d: ICMP message for an unknown socket", n.id)
		return
	}
	t := f.m[n.id]
	if o := offOf(t.iss, binary.BigEndian.Uint32(emb[ihl+4:]), t.una); o < int64(t.una) && !t.cfg.lossy || o > int64(t.max) {
		s.fail("node %d: ICMP message about %d, in flight are [%d,%d)", n.id, o, t.una, t.max)
	}
	mss := mtu - ihl - packet.TCPLen
	if t.cfg.ts {
		mss -= 12
	}
	t.cfg.mss = max(88, min(t.cfg.mss, mss))
}

// checkEngine looks at what must hold between any two calls.
func (n *simNode) checkEngine() {
	e := n.e
	switch {
	case e.buf.used > e.buf.budget:
		n.s.fail("node %d: %d bytes of slabs, the budget is %d", n.id, e.buf.used, e.buf.budget)
	case e.buf.held < 0 || e.buf.held > n.u.Chunks():
		n.s.fail("node %d: %d chunks held", n.id, e.buf.held)
	case n.u.Available()+e.buf.held != n.u.Chunks():
		n.s.fail("node %d: %d chunks free and %d held of %d", n.id, n.u.Available(), e.buf.held, n.u.Chunks())
	case len(e.seal) != 0 || len(e.open) != 0 || len(e.dirty) != 0:
		n.s.fail("node %d: work left after flush", n.id)
	}
	if n.s.steps&15 == 0 {
		for key, f := range n.flows {
			if fl := e.tab.find(&key); fl != nil && fl.state == flowLive {
				if err := checkFlow(fl); err != "" {
					n.s.fail("node %d: %s: %s", n.id, f.name, err)
				}
				// Custody is bounded, whatever the inner stack does (T13).
				if c, most := fl.dlvI+1-fl.innerAck, uint64(e.cfg.FlowBudget+crypto.MaxFrame); c > most {
					n.s.fail("node %d: %s: %d bytes in custody, the budget is %d", n.id, f.name, c, most)
				}
			}
		}
	}
}

// checkFlow holds a flow's fields against one another.
func checkFlow(f *flow) string {
	o, i, tx := f.unaO, f.ackI, 0
	for k := range f.recs.len() {
		r := f.recs.at(k)
		if k == 0 {
			o, i = r.o, r.i
			if o > f.unaO || i > f.ackI {
				return fmt.Sprintf("first record at %d/%d, una %d/%d", o, i, f.unaO, f.ackI)
			}
		}
		if r.o != o || r.i != i {
			return fmt.Sprintf("record %d at %d/%d, want %d/%d", k, r.o, r.i, o, i)
		}
		o, i = o+uint64(r.oLen), i+uint64(r.iLen)
		tx += int(r.oLen) - b2i(r.fin)
	}
	if o != f.sealO || i != f.sealI || tx != f.txBytes {
		return fmt.Sprintf("records end at %d/%d of %d bytes, sealed are %d/%d of %d", o, i, tx, f.sealO, f.sealI, f.txBytes)
	}
	if f.unaO > f.sentO || f.sentO > f.sealO || f.ackI > f.sealI {
		return fmt.Sprintf("una %d sent %d sealed %d", f.unaO, f.sentO, f.sealO)
	}
	var set spans
	n := 0
	at := f.nxtO
	for k := range f.ooo {
		s := &f.ooo[k]
		if s.o < at || s.n == 0 {
			return fmt.Sprintf("out-of-order segment %d at %d, want %d or more", k, s.o, at)
		}
		at = s.o + uint64(s.n)
		n += int(s.n)
		set.add(s.o, at)
	}
	if n != f.oooBytes || len(set) != len(f.runs) {
		return fmt.Sprintf("%d bytes out of order in %d runs, want %d in %d", n, len(set), f.oooBytes, len(f.runs))
	}
	for k, r := range f.runs {
		if set[k] != (span{r.s, r.e}) {
			return fmt.Sprintf("run [%d,%d), want %v", r.s, r.e, set[k])
		}
	}
	if f.pieces.len() > 0 {
		at := f.pieces.at(0).at
		if at > f.innerAck {
			return fmt.Sprintf("custody begins at %d, acknowledged are %d", at, f.innerAck)
		}
		for k := range f.pieces.len() {
			p := f.pieces.at(k)
			if p.at != at {
				return fmt.Sprintf("piece %d at %d, want %d", k, p.at, at)
			}
			at += uint64(p.n)
		}
		if at != f.dlvI {
			return fmt.Sprintf("custody ends at %d, want %d", at, f.dlvI)
		}
	} else if f.innerAck < f.dlvI {
		return fmt.Sprintf("no custody, acknowledged %d of %d", f.innerAck, f.dlvI)
	}
	if f.innerAck > f.sntI || f.sntI > f.dlvI+1 || f.ackSentO > f.nxtO || f.nxtO > f.rxEdge+1 {
		return fmt.Sprintf("inner %d %d %d, outer %d %d %d", f.innerAck, f.sntI, f.dlvI, f.ackSentO, f.nxtO, f.rxEdge)
	}
	return ""
}

// sent is what leaves a node: the monitor looks at it, then it travels.
func (s *sim) sent(from int, b []byte) {
	s.segs++
	s.bytes += uint64(len(b))
	if s.trace {
		s.logf("node %d outer -> %s", from, segText(b))
	}
	var g packet.Segment
	if err := packet.Parse(b, packet.FromInner, &g); err != nil {
		s.fail("node %d: bad packet to the wire: %v", from, err)
		return
	}
	f := s.nodes[from].flows[g.Key]
	if f == nil {
		s.fail("node %d: packet of an unknown flow to the wire", from)
		return
	}
	if len(g.Frame) != len(b) {
		s.fail("node %d: %d bytes behind the packet", from, len(b)-len(g.Frame))
	}
	f.wire[from].observe(&g)
	if s.dropSegment != nil && s.dropSegment(from, &g) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	s.travel(from, b)
}

// travel takes a packet through the network.
func (s *sim) travel(from int, b []byte) {
	c := &s.sc.net[from]
	if s.drop != nil && s.drop(true) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	if s.now >= s.sc.quiet {
		s.schedule(from, b, c.delay)
		return
	}
	n := s.nodes[from]
	if n.burst {
		n.burst = !s.chance(c.burstOut)
	} else {
		n.burst = s.chance(c.burstIn)
	}
	if n.burst || s.chance(c.loss) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	var g packet.Segment
	packet.Parse(b, packet.FromInner, &g)
	if c.mtu != 0 && len(b)-g.L3 > c.mtu {
		s.tooBig(from, &g, c.mtu)
		s.putBuf(b)
		return
	}
	if g.TOS&3 == 2 && s.chance(c.ce) {
		s.markCE(&g)
	}
	if s.chance(c.corrupt) {
		b[g.L3+s.rng.IntN(len(b)-g.L3)] ^= 1 << s.rng.IntN(8)
	} else if g.Len() > 0 && s.chance(c.forge) {
		b[g.Data+s.rng.IntN(g.Len())] ^= 1 << s.rng.IntN(8)
		packet.FullChecksum(b, g.L3, g.L4, g.V6)
	} else if g.Len() > 1 && s.chance(c.split) {
		p := g.Payload()
		for off := 0; off < len(p); {
			m := 1 + s.rng.IntN(len(p)-off)
			if s.rng.IntN(4) == 0 {
				m = min(m, 1+s.rng.IntN(20))
			}
			s.journey(from, s.slice(&g, off, m))
			off += m
		}
		s.putBuf(b)
		return
	}
	s.journey(from, b)
}

// slice makes a segment of m payload bytes of g from off on.
func (s *sim) slice(g *packet.Segment, off, m int) []byte {
	p := g.Payload()
	b := packet.Rewrite(s.getBuf(len(g.Frame))[:0], g, g.Options(), p[off:off+m])
	binary.BigEndian.PutUint32(b[g.L4+4:], g.Seq+uint32(off))
	if off+m < len(p) {
		b[g.L4+13] &^= packet.FIN | packet.PSH
	}
	packet.FullChecksum(b, g.L3, g.L4, g.V6)
	return b
}

func (s *sim) markCE(g *packet.Segment) {
	if g.V6 {
		g.Frame[g.L3+1] |= 0x30
	} else {
		g.Frame[g.L3+1] |= 3
		packet.PutIPv4Checksum(g.Frame[g.L3:g.L4])
	}
}

func (s *sim) journey(from int, b []byte) {
	c := &s.sc.net[from]
	d := c.delay
	if c.jitter > 0 && s.chance(c.reorder) {
		d += time.Duration(s.rng.Int64N(int64(c.jitter)))
	}
	if s.chance(c.dup) {
		x := s.getBuf(len(b))
		copy(x, b)
		s.schedule(from, x, d+time.Duration(s.rng.Int64N(int64(c.jitter+1))))
	}
	s.schedule(from, b, d)
}

func (s *sim) schedule(from int, b []byte, d time.Duration) {
	s.events.push(simEvent{at: s.now + d, ord: s.nextOrd(), node: 1 - from, buf: b})
}

// tooBig answers a packet that does not fit the path.
func (s *sim) tooBig(to int, g *packet.Segment, mtu int) {
	emb := g.Frame[g.L3:min(len(g.Frame), g.L4+packet.TCPLen)]
	b := append(s.getBuf(0), g.Frame[:g.L3]...)
	if g.V6 {
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(emb)))
		b = append(b, 58, 64)
		b = append(b, g.Dst()...)
		b = append(b, g.Src()...)
		b = append(b, 2, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(mtu))
	} else {
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(packet.IPv4Len+8+len(emb)))
		b = append(b, 0, 0, 0, 0, 64, 1, 0, 0)
		b = append(b, g.Dst()...)
		b = append(b, g.Src()...)
		packet.PutIPv4Checksum(b[g.L3:])
		b = append(b, 3, 4, 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(mtu))
	}
	l4 := len(b) - 8
	b = append(b, emb...)
	packet.ICMPChecksum(b, g.L3, l4, g.V6)
	s.events.push(simEvent{at: s.now + s.sc.net[to].delay, ord: s.nextOrd(), node: to, buf: b})
}

// mergeRun joins consecutive segments of a queue as GRO does. i is left at the
// last one taken.
func (s *sim) mergeRun(q [][]byte, i *int) []byte {
	var a, b packet.Segment
	p := q[*i]
	if packet.Parse(p, packet.FromOuter, &a) != nil || !a.ChecksumOK(s.sc.virtual) || a.Len() == 0 || a.Flags&^packet.PSH != packet.ACK {
		return p
	}
	seq := a.Seq + uint32(a.Len())
	data := append(s.getBuf(bigBuf)[:0], a.Payload()...)
	n := 0
	for *i+1 < len(q) {
		if packet.Parse(q[*i+1], packet.FromOuter, &b) != nil || !b.ChecksumOK(s.sc.virtual) || b.Len() == 0 || b.Flags&^(packet.PSH|packet.FIN) != packet.ACK ||
			b.Key != a.Key || b.Seq != seq || b.TOS != a.TOS || len(b.Options()) != len(a.Options()) || b.Ack != a.Ack || b.Wnd != a.Wnd ||
			b.TSval != a.TSval || b.TSecr != a.TSecr || b.NSACK > 0 || len(data)+b.Len() > 60000 {
			break
		}
		data = append(data, b.Payload()...)
		seq += uint32(b.Len())
		p[a.L4+13] |= b.Flags
		*i++
		n++
	}
	if n == 0 {
		s.putBuf(data)
		return p
	}
	out := packet.Rewrite(s.getBuf(bigBuf)[:0], &a, a.Options(), data)
	packet.FullChecksum(out, a.L3, a.L4, a.V6)
	s.putBuf(data)
	s.putBuf(p)
	return out
}

// deliver puts a packet into a node's receive queue.
func (s *sim) deliver(node int, b []byte) {
	n := s.nodes[node]
	var g packet.Segment
	if packet.Parse(b, packet.FromOuter, &g) == nil {
		if f := n.flows[g.Key]; f != nil && g.ChecksumOK(s.sc.virtual) {
			f.wire[1-node].arrived(&g)
			if !f.up[node] {
				s.putBuf(b)
				return
			}
		}
	}
	n.outer = append(n.outer, b)
	n.wake()
}

// step runs the next event. It returns false when there is none.
func (s *sim) step() bool {
	const never = time.Duration(1<<63 - 1)
	at, what, idx := never, 0, 0
	if len(s.events) > 0 {
		at = s.events[0].at
	}
	for i, n := range s.nodes {
		if n.pollAt != 0 && n.pollAt < at {
			at, what, idx = n.pollAt, 1, i
		}
		if d, ok := n.e.Deadline(); ok && d < at {
			at, what, idx = d, 2, i
		}
	}
	for i, f := range s.flows {
		for k := range f.m {
			if !f.m[k].started {
				continue
			}
			if d := f.m[k].deadline(); d < at {
				at, what, idx = d, 3, 2*i+k
			}
		}
	}
	if at == never {
		return false
	}
	s.now = max(s.now, at)
	s.steps++
	switch what {
	case 0:
		e := s.events.pop()
		if e.node >= 2 {
			s.install(s.flows[(e.node-2)/2], e.node&1)
		} else {
			s.deliver(e.node, e.buf)
		}
	case 1:
		s.nodes[idx].poll()
	case 2:
		n := s.nodes[idx]
		n.e.Tick(s.now)
		n.drain()
		n.checkEngine()
		if d, ok := n.e.Deadline(); ok && d <= s.now {
			s.fail("node %d: deadline %v is not in the future after Tick", idx, d)
		}
	case 3:
		s.flows[idx/2].m[idx&1].tick(s.now)
	}
	return true
}

// run plays the scenario to its end and returns the first violation.
func (s *sim) run() string {
	const maxSteps = 20_000_000
	for s.err == "" {
		if !s.step() {
			break
		}
		if s.now > s.sc.limit || s.steps > maxSteps {
			s.fail("no end after %d steps", s.steps)
		}
		if s.now > s.sc.quiet && s.steps&1023 == 0 && s.ended() {
			break
		}
	}
	if s.err == "" {
		s.finish()
	}
	if s.trace && s.err != "" {
		s.dump()
	}
	return s.err
}

// dump prints the state of both ends for whoever reads a trace.
func (s *sim) dump() {
	for _, n := range s.nodes {
		fmt.Printf("node %d: %d of %d chunks free, %d held, %d bytes of slabs, %+v\n", n.id, n.u.Available(), n.u.Chunks(), n.e.buf.held, n.e.buf.used, n.e.st)
	}
	for _, f := range s.flows {
		for k, m := range f.m {
			fmt.Println(m)
			if fl := s.nodes[k].e.tab.find(&f.key[k]); fl != nil {
				fmt.Printf("  engine %d: state %d sealI %d sealO %d sentO %d unaO %d ackI %d edgeO %d held %v finSealed %v recs %d backlog %d | nxtO %d rxEdge %d ackSentO %d asm %d/%d hdrN %d ooo %d finp %v peerFin %v@%d taken %v dlvI %d sntI %d innerAck %d innerEdge %d pieces %d timers %v\n",
					k, fl.state, fl.sealI, fl.sealO, fl.sentO, fl.unaO, fl.ackI, fl.edgeO, fl.held, fl.finSealed, fl.recs.len(), len(fl.backlog),
					fl.nxtO, fl.rxEdge, fl.ackSentO, fl.asmHave, len(fl.asm), fl.hdrN, len(fl.ooo), fl.finp, fl.peerFin, fl.peerFinO, fl.finTaken,
					fl.dlvI, fl.sntI, fl.innerAck, fl.innerEdge, fl.pieces.len(), fl.timers)
			}
		}
	}
}

func (s *sim) ended() bool {
	for _, f := range s.flows {
		if !f.gone[0] || !f.gone[1] {
			return false
		}
	}
	return len(s.events) == 0
}

// finish checks what must be true when all is over.
func (s *sim) finish() {
	for _, f := range s.flows {
		for k, m := range f.m {
			p := f.m[1-k]
			switch {
			case !m.done():
				s.fail("%s did not end: %v\n%v", f.name, m, p)
			case m.reset && !s.sc.mayAbort && !m.lateRST:
				s.fail("%s: reset: %v; reasons %v", m.name, m, s.reasons)
			case !m.reset && m.rcv != p.app.total+1:
				s.fail("%s: received %d of %d", m.name, m.rcv, p.app.total+1)
			case !f.gone[k]:
				s.fail("%s: flow of node %d is still there", f.name, k)
			}
		}
	}
	late := false
	for _, f := range s.flows {
		late = late || f.m[0].lateRST || f.m[1].lateRST
	}
	for r := range s.reasons {
		if r != ReasonClosed && !s.sc.mayAbort && !(late && r == ReasonPeerReset) {
			s.fail("a flow ended by %q", r)
		}
	}
	for i, n := range s.nodes {
		e := n.e
		switch {
		case n.u.Available() != n.u.Chunks():
			s.fail("node %d: %d chunks leaked", i, n.u.Chunks()-n.u.Available())
		case e.buf.used != 0 || e.buf.held != 0:
			s.fail("node %d: %d bytes of slabs and %d chunks held in the end", i, e.buf.used, e.buf.held)
		case e.tab.n != 0 || len(e.timers.h) != 0:
			s.fail("node %d: %d flows and %d timers left", i, e.tab.n, len(e.timers.h))
		}
	}
}

func segText(b []byte) string {
	var g packet.Segment
	if err := packet.Parse(b, packet.FromInner, &g); err != nil {
		return err.Error()
	}
	var fl strings.Builder
	for i, c := range "FSRPAUEC" {
		if g.Flags>>i&1 != 0 {
			fl.WriteRune(c)
		}
	}
	return fmt.Sprintf("%d>%d %s seq %d len %d ack %d wnd %d urg %d ts %d/%d sack %v tos %#x", g.Key.LPort, g.Key.RPort, fl.String(), g.Seq, g.Len(), g.Ack, g.Wnd, g.Urg, g.TSval, g.TSecr, g.SACK[:g.NSACK], g.TOS)
}

// wireFrame is one frame as the monitor saw it.
type wireFrame struct {
	o, i       uint64
	oLen, iLen uint32
	hdr        uint8
}

// wire watches one direction of one flow.
type wire struct {
	s       *sim
	f       *simFlow
	from    int
	iss     uint32
	mss     int
	shift   uint8
	sess    *crypto.Session // of the receiver
	init    []byte
	buf     []byte // the stream as it was first sent
	have    spans
	high    uint64 // end of what was sent, the FIN included
	gap     bool
	parsed  uint64
	inner   uint64
	gen     uint32
	rekeys  int
	finp    bool
	fin     bool
	finO    uint64
	frames  []wireFrame
	ledger  map[nonce]uint64
	scratch []byte

	delivered spans  // what the receiving engine was given
	edge      uint64 // right edge that the sender was told
	ackSent   uint64 // by this sender, about the other direction
	edgeSent  uint64
	tsSent    uint32
	tsSeen    bool
	rst       bool
}

// nonce identifies an AEAD invocation of a direction.
type nonce struct {
	gen    uint32
	offset uint64
}

func newWire(s *sim, f *simFlow, from int, sess *crypto.Session, init []byte) *wire {
	return &wire{s: s, f: f, from: from, sess: sess, init: init, ledger: map[nonce]uint64{}}
}

func (w *wire) start(est, peer *slowpath.Established) {
	w.iss, w.mss = est.ISS, est.PeerMSS
	if est.WScaleOK {
		w.shift = est.LocalWScale
	}
	n := uint64(len(w.init))
	w.buf = append(w.buf, w.init...)
	w.have.add(0, n)
	w.high, w.parsed = n, n
	w.delivered.add(0, n)
	w.edge = uint64(peer.RxEdge)
	w.ackSent = uint64(est.RxOffset)
	if est.Role == crypto.RoleA {
		w.ackSent = uint64(peer.TxAcked)
	}
	w.edgeSent = uint64(est.RxEdge)
}

func (w *wire) fail(format string, args ...any) {
	w.s.fail("wire of %s from node %d: %s", w.f.name, w.from, fmt.Sprintf(format, args...))
}

// observe checks a segment that leaves the engine.
func (w *wire) observe(g *packet.Segment) {
	rev := w.f.wire[1-w.from]
	if !g.ChecksumOK(w.s.sc.virtual) {
		w.fail("bad checksum")
	}
	if g.TOS>>2 != w.f.m[w.from].cfg.dscp {
		w.fail("DSCP %d, want %d", g.TOS>>2, w.f.m[w.from].cfg.dscp)
	}
	if g.Flags&packet.RST != 0 {
		w.rst = true
		if g.Len() > 0 {
			w.fail("reset with data")
		}
		return
	}
	if g.Flags&packet.SYN != 0 || g.Flags&packet.ACK == 0 || g.Flags&packet.URG != 0 {
		w.fail("flags %#x", g.Flags)
	}
	if g.HasTS != w.f.cfg.ts {
		w.fail("timestamp option %v", g.HasTS)
	}
	if g.HasTS {
		if w.tsSeen && packet.SeqDiff(g.TSval, w.tsSent) < 0 {
			w.fail("TSval went back from %d to %d", w.tsSent, g.TSval)
		}
		w.tsSeen, w.tsSent = true, g.TSval
		if m := w.f.m[w.from]; m.tsSent != 0 && packet.SeqDiff(g.TSval, m.tsSent) > 0 {
			w.fail("TSval %d is newer than the inner stack's %d", g.TSval, m.tsSent)
		}
	}
	w.observeAck(g, rev)
	o := offOf(w.iss, g.Seq, w.high)
	n := g.Len()
	if n > 0 && n+len(g.Options()) > w.mss {
		w.fail("%d bytes and %d of options exceed the MSS of %d", n, len(g.Options()), w.mss)
	}
	if o < 0 && n > 0 || o > int64(w.high) && !w.gap && n > 0 && w.s.nodes[w.from].e.st.NoChunk == 0 {
		w.fail("segment at %d, sent were %d", o, w.high)
		return
	}
	fin := g.Flags&packet.FIN != 0
	if n > 0 {
		w.data(uint64(o), g.Payload())
	}
	if fin {
		at := uint64(o) + uint64(n)
		if w.fin && w.finO != at {
			w.fail("FIN at %d and at %d", w.finO, at)
		}
		w.fin, w.finO = true, at
		w.high = max(w.high, at+1)
	}
	if w.fin && w.high > w.finO+1 {
		w.fail("data behind the FIN")
	}
	w.parse()
	if w.fin && w.parsed == w.finO && !w.finp {
		w.fail("FIN at %d without FINp", w.finO)
	}
}

func (w *wire) observeAck(g *packet.Segment, rev *wire) {
	a := offOf(rev.iss, g.Ack, w.ackSent)
	if a < int64(w.ackSent) {
		w.fail("acknowledgement went back from %d to %d", w.ackSent, a)
		return
	}
	if d, ok := rev.delivered.next(0); a > 0 && (!ok || d.s != 0 || uint64(a) > d.e) {
		w.fail("acknowledges %d, received are %v", a, rev.delivered)
	}
	w.ackSent = uint64(a)
	edge := uint64(a) + uint64(g.Wnd)<<w.shift
	if edge < w.edgeSent {
		w.fail("window edge went back from %d to %d", w.edgeSent, edge)
	}
	w.edgeSent = edge
	for k, b := range g.SACK[:g.NSACK] {
		l, r := offOf(rev.iss, b[0], w.ackSent), offOf(rev.iss, b[1], w.ackSent)
		switch {
		case l < 0 || l >= r || !rev.delivered.covers(uint64(l), uint64(r)):
			w.fail("SACK block [%d,%d), received are %v", l, r, rev.delivered)
		case l <= a && k > 0:
			w.fail("SACK block [%d,%d) with acknowledgement %d", l, r, a)
		case !w.f.cfg.sack:
			w.fail("SACK was not negotiated")
		}
	}
}

// data holds bytes against what the same numbers carried before.
func (w *wire) data(o uint64, p []byte) {
	if bytes.Contains(p, []byte(canary)) {
		w.fail("plaintext at %d", o)
	}
	end := o + uint64(len(p))
	if end > w.edge {
		w.fail("data to %d, the peer's window ends at %d", end, w.edge)
	}
	if end > uint64(len(w.buf)) {
		w.buf = append(w.buf, make([]byte, end-uint64(len(w.buf)))...)
	}
	if w.have.covers(o, end) {
		if !bytes.Equal(w.buf[o:end], p) {
			w.fail("other bytes for [%d,%d)", o, end)
		}
		return
	}
	for at := o; at < end; {
		r, ok := w.have.next(at)
		if ok && r.s <= at {
			e := min(r.e, end)
			if !bytes.Equal(w.buf[at:e], p[at-o:e-o]) {
				w.fail("other bytes for [%d,%d)", at, e)
			}
			at = e
			continue
		}
		e := end
		if ok {
			e = min(e, r.s)
		}
		copy(w.buf[at:e], p[at-o:])
		at = e
	}
	w.have.add(o, end)
	w.high = max(w.high, end)
}

// parse opens the frames that are complete and compares them with what the
// application wrote.
func (w *wire) parse() {
	m := w.f.m[w.from]
	for {
		r, ok := w.have.next(0)
		if !ok || r.s != 0 || r.e < w.parsed+crypto.FrameHeader {
			return
		}
		b := w.buf[w.parsed:r.e]
		n, err := crypto.FrameLen(b)
		if err != nil {
			w.fail("frame at %d: %v", w.parsed, err)
			return
		}
		if n > len(b) {
			return
		}
		if w.finp {
			w.fail("frame at %d behind FINp", w.parsed)
		}
		if b[0]&^crypto.ControlRekey != 0 {
			w.fail("control byte %#x", b[0])
		}
		if b[0]&crypto.ControlRekey != 0 {
			w.gen++
			w.rekeys++
		}
		w.scratch = append(w.scratch[:0], b[:n]...)
		id := nonce{w.gen, w.parsed}
		if _, twice := w.ledger[id]; twice {
			w.fail("nonce %+v used twice", id)
		}
		w.ledger[id] = uint64(n)
		plain, ok := w.sess.RecvKey(w.gen).Open(w.scratch, w.parsed)
		if !ok {
			w.fail("frame at %d of %d bytes does not open, generation %d", w.parsed, n, w.gen)
			return
		}
		fl, urg, data, err := crypto.ParsePlain(plain)
		if err != nil || fl&^(crypto.FlagFIN|crypto.FlagURG) != 0 {
			w.fail("frame at %d: flags %#x, %v", w.parsed, fl, err)
		}
		hdr := crypto.FrameHeader + 1
		if fl&crypto.FlagURG != 0 {
			hdr += 2
			if !m.urgAll[w.inner+uint64(urg)+1] {
				w.fail("frame at %d: urgent %d at %d was not urgent", w.parsed, urg, w.inner)
			}
		}
		if w.inner+uint64(len(data)) > m.written || !bytes.Equal(data, content(m.phase, w.inner, len(data))) {
			w.fail("frame at %d: plaintext [%d,%d) is not what was written", w.parsed, w.inner, w.inner+uint64(len(data)))
		}
		w.frames = append(w.frames, wireFrame{w.parsed, w.inner, uint32(n), uint32(len(data)), uint8(hdr)})
		w.parsed += uint64(n)
		w.inner += uint64(len(data))
		if fl&crypto.FlagFIN != 0 {
			w.finp = true
			if w.inner != m.app.total || !m.closing() {
				w.fail("FINp at %d of %d, closing %v", w.inner, m.app.total, m.closing())
			}
		}
	}
}

// image returns the outer bytes that carry the inner byte i, or the FIN.
func (w *wire) image(i uint64) (s, e uint64, ok bool) {
	if i >= w.f.m[w.from].app.total {
		return w.finO, w.finO + 1, w.fin
	}
	lo, hi := 0, len(w.frames)
	for lo < hi {
		mid := (lo + hi) / 2
		if f := &w.frames[mid]; f.i+uint64(f.iLen) > i {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == len(w.frames) {
		// A frame of which only a part was sent yet, for want of window.
		if w.parsed >= uint64(len(w.buf)) {
			return 0, 0, false
		}
		s = w.parsed + crypto.FrameHeader + 1 + (i - w.inner)
		return s, s + 1, true
	}
	f := &w.frames[lo]
	s = f.o + uint64(f.hdr) + (i - f.i)
	if i == f.i {
		s = f.o
		for lo > 0 && w.frames[lo-1].iLen == 0 {
			lo--
			s = w.frames[lo].o
		}
	}
	e = f.o + uint64(f.hdr) + (i - f.i) + 1
	if i+1 == f.i+uint64(f.iLen) {
		e = f.o + uint64(f.oLen)
	}
	return s, e, true
}

// checkAck holds an inner acknowledgement of the bytes [from,to) against what
// the other engine was given: their whole image must be there.
func (w *wire) checkAck(from, to uint64, sack bool) {
	if sack && (len(w.have) != 1 || w.have[0].s != 0) {
		// Bytes that never got a chunk to travel in hide where frames begin.
		return
	}
	s, e, ok := uint64(0), uint64(0), true
	if sack {
		s, _, ok = w.image(from)
	}
	if ok {
		_, e, ok = w.image(to - 1)
	}
	if !ok || !w.delivered.covers(s, e) {
		w.fail("inner bytes [%d,%d) (SACK %v) are acknowledged: outer [%d,%d) %v, received are %v", from, to, sack, s, e, ok, w.delivered)
	}
}

// arrived notes what the receiving engine is given, and the window that its
// sender is told by it.
func (w *wire) arrived(g *packet.Segment) {
	if g.Flags&packet.RST != 0 {
		return
	}
	rev := w.f.wire[1-w.from]
	o := offOf(w.iss, g.Seq, w.high)
	n := uint64(g.Len())
	if g.Flags&packet.FIN != 0 {
		n++
	}
	if o >= 0 && n > 0 {
		w.delivered.add(uint64(o), uint64(o)+n)
	}
	if g.Flags&packet.ACK != 0 {
		a := offOf(rev.iss, g.Ack, rev.high)
		rev.edge = max(rev.edge, uint64(a)+uint64(g.Wnd)<<w.shift)
	}
}

// plainFlow is an unremarkable connection, the base of scenarios.
func plainFlow() flowConfig {
	c := flowConfig{aead: crypto.AES128GCM, mss: 1460, sack: true, ts: true, ws: true, initAcked: 2}
	for k := range c.model {
		c.model[k] = modelConfig{
			gso: 64000, rcvBuf: 1 << 20, sndBuf: 1 << 20, sack: true, ts: true, shift: 7, peerShift: 7,
			delack: 40 * time.Millisecond, minRTO: 200 * time.Millisecond,
		}
		c.app[k] = appConfig{total: 1 << 20, write: 1 << 16}
		c.iss[k] = 0xffff0000 + uint32(k)*77777
	}
	c.fix()
	return c
}

// fix makes the parameters agree that two ends have in common.
func (c *flowConfig) fix() {
	for k := range c.model {
		m := &c.model[k]
		m.sack, m.ts, m.ecn = c.sack, c.ts, c.ecn
		m.mss = c.mss - overhead
		m.rcvMSS = c.mss
		if c.ts {
			m.mss -= 12
			m.rcvMSS -= 12
		}
		if !c.ws {
			m.shift = 0
		}
		m.gso = max(m.mss, m.gso/m.mss*m.mss)
	}
	for k := range c.model {
		c.model[k].peerShift = c.model[1-k].shift
	}
}

func plainScenario(seed uint64) *scenario {
	return &scenario{
		seed: seed, flows: []flowConfig{plainFlow()}, chunks: [2]int{4096, 4096}, chunkSize: 2048,
		net: [2]netConfig{{delay: 5 * time.Millisecond}, {delay: 5 * time.Millisecond}}, limit: 10 * time.Minute,
	}
}

func runScenario(t *testing.T, sc *scenario) *sim {
	t.Helper()
	s := newSim(sc)
	defer s.close()
	if err := s.run(); err != "" {
		t.Fatalf("seed %d: %s\nrerun: go test -run '%s' -sim.seed=%d -sim.trace", sc.seed, err, t.Name(), sc.seed)
	}
	return s
}

func TestSimPlain(t *testing.T) {
	start := time.Now()
	s := runScenario(t, plainScenario(1))
	t.Logf("%d segments, %d bytes, %d steps in %v of virtual time, %v", s.segs, s.bytes, s.steps, s.now, time.Since(start))
}
