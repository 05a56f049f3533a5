package fastpath

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// The simulator: model stacks, engine, hostile network, engine, model stacks,
// all in virtual time and from one seed. A monitor on the wire opens every
// frame with keys of its own and holds each segment against what was sent
// before.

type simEvent struct {
	at   time.Duration
	ord  uint64
	node int
	buf  []byte
	// forged segments are an attacker's.
	forged bool
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

// simFlow is one connection with its two ends and what the wire saw.
type simFlow struct {
	cfg  *flowConfig
	m    [2]*model
	key  [2]packet.Key
	est  [2]*slowpath.Established
	wire [2]*wire // by sending node
	up   [2]bool
	fin  [2][]byte // came before the flow was handed over
	// Engines count that much more than models do, of what node k sends.
	warpI [2]uint64
	gone  [2]bool
	name  string
	// failed is why the slow path of either node gave the connection up.
	failed string
}

type sim struct {
	sc      *scenario
	pool    *umemPool
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
	ids     map[[33]byte]*simFlow // by session ID

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

// warpTo makes node k's flow count as if much more had been sent before: from
// here on offsets lie beyond 2^31 or 2^32. The numbers in segments stay.
func (f *simFlow) warpTo(fl *flow, k int) {
	tx, rx := f.cfg.warp[k], f.cfg.warp[1-k]
	f.warpI[k], f.wire[k].warp = tx.i, tx.o
	fl.iss -= uint32(tx.o)
	fl.irs -= uint32(rx.o)
	for _, o := range []*uint64{&fl.sealO, &fl.sentO, &fl.unaO, &fl.edgeO, &fl.initO} {
		*o += tx.o
	}
	for _, o := range []*uint64{&fl.nxtO, &fl.rxEdge, &fl.ackSentO, &fl.frameO, &fl.wl1} {
		*o += rx.o
	}
	for _, i := range []*uint64{&fl.sealI, &fl.ackI, &fl.ackShownI} {
		*i += tx.i
	}
	for _, i := range []*uint64{&fl.dlvI, &fl.sntI, &fl.sntMaxI, &fl.innerAck, &fl.innerEdge} {
		*i += rx.i
	}
	for j := range fl.recs.len() {
		r := fl.recs.at(j)
		r.o += tx.o
		r.i += tx.i
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

// newSim sets a scenario up. Its packet memory is taken from the pool, which may
// be nil.
func newSim(sc *scenario, pool *umemPool) *sim {
	s := &sim{sc: sc, pool: pool, rng: sc.rand(1), now: time.Second, trace: *simTrace, reasons: map[string]int{}, ids: map[[33]byte]*simFlow{}}
	for i := range s.nodes {
		u := pool.get(sc.chunks[i], sc.chunkSize)
		n := &simNode{s: s, id: i, u: u, weather: sc.rand(uint64(10 + i)), flows: map[packet.Key]*simFlow{}, ended: map[string]int{}}
		n.e = NewEngine(EngineConfig{
			Umem: u, Virtual: sc.virtual, Memory: sc.memory[i], FlowBudget: sc.flowBudget, RekeyFrames: sc.rekeyFrames,
			RekeyBytes: sc.rekeyBytes, RekeyEvery: sc.rekeyEvery, TCPKeepalive: sc.tcpKeepalive, Drain: n.outputs,
			InnerChunks: sc.gateway[i], InnerVirtual: true,
		})
		n.divert = map[packet.Key]bool{}
		if sc.lives && sc.daemon[i] {
			n.m = s.newMachine(i)
		}
		s.nodes[i] = n
	}
	for i := range sc.flows {
		if sc.lives {
			s.addLife(i, &sc.flows[i])
		} else {
			s.addFlow(i, &sc.flows[i])
		}
	}
	return s
}

// close gives the packet memory back.
func (s *sim) close() {
	for _, n := range s.nodes {
		s.pool.put(n.u)
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
		f.wire[k] = newWire(s, f, k, sess(role.Peer()).RecvKey, init[role])
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
	if f.cfg.warp != [2]warp{} {
		f.warpTo(n.e.tab.find(&est.Key), k)
	}
	if f.fin[k] != nil {
		n.e.Reinject(packet.FromOuter, f.fin[k], s.now)
	}
	f.m[k].open(s.now, min(65535, uint64(est.PeerWnd)))
	n.drain()
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
		if n.m != nil {
			if d, ok := n.m.Deadline(); ok && d < at {
				at, what, idx = d, 4, i
			}
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
			if f := s.flows[(e.node-2)/2]; s.sc.lives {
				s.begin(f, e.node&1)
			} else {
				s.install(f, e.node&1)
			}
		} else {
			s.deliver(e.node, e.buf, e.forged)
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
	case 4:
		n := s.nodes[idx]
		n.carryOut(n.m.Tick(s.now))
		n.drain()
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

// clean reports whether every connection ended well on both sides.
func (s *sim) clean() bool {
	return len(s.reasons) == 0 || len(s.reasons) == 1 && s.reasons[ReasonClosed] == s.encrypted()
}

// short reports whether a connection was ended for want of memory, in a scenario
// that has little.
func (s *sim) short() bool {
	return s.reasons[slowpath.ReasonLimit] > 0 && (s.sc.memory[0] != 0 || s.sc.memory[1] != 0)
}

// encrypted returns how many ends of connections became encrypted.
func (s *sim) encrypted() (n int) {
	for _, f := range s.flows {
		n += b2i(f.up[0]) + b2i(f.up[1])
	}
	return n
}

// frames returns how many frames of the node the wire has seen.
func (n *simNode) frames() (k uint64) {
	for _, f := range n.s.flows {
		k += uint64(len(f.wire[n.id].frames))
	}
	return k
}

func (s *sim) ended() bool {
	for _, f := range s.flows {
		for k := range 2 {
			if !f.over(k) {
				return false
			}
		}
	}
	for _, n := range s.nodes {
		if n.m != nil && (n.m.Len() > 0 || len(n.divert) > 0) {
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
			case m.opening == listening && (p.reset || p.opening == listening):
			case m.reset && s.short():
			case m.reset && f.failed != "" && s.sc.quiet > 0:
				// As a handshake under loss may.
			case m.reset && !s.sc.mayAbort && !m.lateRST:
				s.fail("%s: reset: %v; reasons %v", m.name, m, s.reasons)
			case !m.reset && m.rcv != p.app.total+1:
				s.fail("%s: received %d of %d", m.name, m.rcv, p.app.total+1)
			case f.up[k] && !f.gone[k]:
				s.fail("%s: flow of node %d is still there", f.name, k)
			}
		}
	}
	if s.sc.lives {
		s.finishLives()
	}
	late := false
	for _, f := range s.flows {
		late = late || f.m[0].lateRST || f.m[1].lateRST || f.failed != "" && s.sc.quiet > 0
	}
	for r := range s.reasons {
		if r != ReasonClosed && !s.sc.mayAbort && !s.short() && !(late && r == ReasonPeerReset) {
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
		case s.clean() && n.frames() != e.st.Sealed:
			s.fail("node %d: %d frames on the wire, %d were sealed", i, n.frames(), e.st.Sealed)
		case e.tab.n != 0 || len(e.timers.h) != 0:
			s.fail("node %d: %d flows and %d timers left", i, e.tab.n, len(e.timers.h))
		}
	}
}

func runScenario(t *testing.T, sc *scenario) *sim {
	t.Helper()
	s := newSim(sc, nil)
	defer s.close()
	if err := s.run(); err != "" {
		t.Fatalf("seed %d: %s\nreplay: go test ./fastpath -run '^%s$' -sim.trace", sc.seed, err, t.Name())
	}
	return s
}

func TestSimPlain(t *testing.T) {
	start := time.Now()
	s := runScenario(t, plainScenario(1))
	t.Logf("%d segments, %d bytes, %d steps in %v of virtual time, %v", s.segs, s.bytes, s.steps, s.now, time.Since(start))
}
