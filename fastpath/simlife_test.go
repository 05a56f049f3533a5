package fastpath

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// Whole lives of connections: models open them, the slow path of each node that
// has one negotiates, agrees on keys or resumes, and installs flows. What is not
// diverted passes by the engine, as the BPF programs let it.

// newMachine makes the slow path of a node.
func (s *sim) newMachine(node int) *slowpath.Machine {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], s.sc.seed)
	seed[8] = byte(node)
	c := slowpath.Config{
		TEPs: []crypto.TEP{crypto.TEPX25519}, AEADs: []crypto.AEAD{s.sc.flows[0].aead}, ResumeNonce: 8,
		Policy: func(k *packet.Key, _ packet.Direction) slowpath.Policy {
			f := s.nodes[node].flows[*k]
			return slowpath.Policy{PassiveRole: f != nil && f.cfg.passiveRole && node == 1}
		},
	}
	if s.sc.resume {
		c.Cache = slowpath.NewCache(0, 0)
	}
	return slowpath.New(c, rand.NewChaCha8(seed))
}

// addLife adds a connection that is yet to be opened. All are between the same
// two hosts, so that sessions can be resumed.
func (s *sim) addLife(i int, c *flowConfig) {
	f := &simFlow{cfg: c, name: fmt.Sprintf("flow %d", i)}
	for k := range 2 {
		local, remote := addr16(c.v6, k, 0), addr16(c.v6, 1-k, 0)
		port := [2]uint16{uint16(40000 + i), uint16(40000 + i)}
		port[1-c.active] = 443
		f.key[k] = packet.Key{Local: local, Remote: remote, LPort: port[k], RPort: port[1-k], VLAN: c.vlan}
		m := newModel(fmt.Sprintf("%s node %d", f.name, k), c.model[k], c.app[k], s.sc.rand(uint64(100+2*i+k)))
		m.iss, m.plain, m.shielded = c.iss[k], true, s.sc.daemon[k]
		m.bareTS = s.sc.net[1-k].noTS > 0
		m.phase = s.rng.Uint64N(poolLen)
		m.tmpl = makeTemplate(local, remote, c.v6, c.vlan, port[k], port[1-k], c.model[k].dscp<<2)
		m.fail, m.quiet, m.alloc = s.fail, s.sc.quiet, s.getBuf
		n := s.nodes[k]
		m.out = func(b []byte) { n.fromModel(b) }
		f.m[k] = m
		w := newWire(s, f, k, nil, nil)
		w.iss = c.iss[k]
		if c.ws && c.strip&stripWS == 0 {
			w.shift = c.model[k].shift
		}
		f.wire[k] = w
		n.flows[f.key[k]] = f
	}
	for k := range 2 {
		f.m[k].peer = f.m[1-k]
		if !c.crossing && k != c.active {
			f.m[k].listen()
			continue
		}
		s.events.push(simEvent{at: s.now + c.startAt, ord: s.nextOrd(), node: 2 + 2*i + k})
	}
	s.flows = append(s.flows, f)
}

func (s *sim) begin(f *simFlow, k int) {
	if m := f.m[k]; !m.started {
		m.connect(s.now)
	}
}

// takesInner and takesOuter are what the BPF programs do: known flows, and SYNs
// that may be negotiated, go to the daemon.
func (n *simNode) takesInner(g *packet.Segment) bool {
	return n.m != nil && (n.divert[g.Key] || g.Flags&(packet.SYN|packet.ACK) == packet.SYN)
}

func (n *simNode) takesOuter(g *packet.Segment) bool {
	return n.m != nil && (n.divert[g.Key] || g.Flags&(packet.SYN|packet.ACK) == packet.SYN && hasOption(g.Options(), packet.OptENO))
}

func hasOption(o []byte, kind byte) (found bool) {
	packet.WalkOptions(o, func(b []byte) bool {
		found = found || b[0] == kind
		return true
	})
	return found
}

// plainOut is the kernel's own way to the wire.
func (n *simNode) plainOut(b []byte, g *packet.Segment) {
	s := n.s
	if f := n.flows[g.Key]; f != nil && f.up[n.id] && !f.gone[n.id] {
		s.fail("node %d: %s passes by the engine to the wire", n.id, f.name)
	}
	step := max(1, g.Len())
	if v := xdp.ParseVnetHdr(b); v.GSOType != 0 {
		step = int(v.GSOSize)
	}
	for off := 0; off < max(1, g.Len()); off += step {
		x := s.slice(g, off, min(step, g.Len()-off))
		if off > 0 {
			x[g.L4+13] &^= packet.CWR
			packet.FullChecksum(x, g.L3, g.L4, g.V6)
		}
		s.sent(n.id, x)
	}
	s.putBuf(b)
}

// plainIn is the kernel's own way from the wire.
func (n *simNode) plainIn(b []byte, g *packet.Segment) {
	s := n.s
	f := n.flows[g.Key]
	m := f.m[n.id]
	if f.gone[n.id] {
		// The socket is closed, and this is of the wire's numbers.
		n.refuse(b, g)
		return
	}
	if f.up[n.id] {
		s.fail("node %d: a segment of %s reaches the local stack past the engine", n.id, f.name)
	}
	if s.trace {
		s.logf("node %d plain <- %s", n.id, segText(b))
	}
	x := append(s.getBuf(xdp.VnetHdrLen + len(b))[:xdp.VnetHdrLen], b...)
	packet.PartialChecksum(x[xdp.VnetHdrLen:], g.L3, g.L4, len(g.Frame)-g.L4, g.V6)
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(g.L4), CsumOffset: 16}
	if m.cfg.rcvMSS > 0 && g.Len() > m.cfg.rcvMSS {
		v.GSOType, v.GSOSize = xdp.VnetGSOTCPv4, uint16(m.cfg.rcvMSS)
		if g.V6 {
			v.GSOType = xdp.VnetGSOTCPv6
		}
		if g.Flags&packet.CWR != 0 {
			v.GSOType |= xdp.VnetGSOECN
		}
	}
	v.Put(x)
	s.putBuf(b)
	m.input(x, s.now)
	s.putBuf(x)
}

// refuse answers for a kernel that has no socket for a segment.
func (n *simNode) refuse(b []byte, g *packet.Segment) {
	s := n.s
	if f := n.flows[g.Key]; g.Flags&packet.RST == 0 {
		x := s.getBuf(packet.MaxHeaders)
		h := packet.Header{Seq: g.Ack, Flags: packet.RST}
		if g.Flags&packet.ACK == 0 {
			h = packet.Header{Ack: g.Seq + 1, Flags: packet.RST | packet.ACK}
		}
		x = x[:f.m[n.id].tmpl.Compose(x, &h, 0)]
		packet.FullChecksum(x, g.L3, len(x)-packet.TCPLen, g.V6)
		s.travel(n.id, x)
	}
	s.putBuf(b)
}

// carryOut does what the slow path says, as slowSide does on a host.
func (n *simNode) carryOut(acts []slowpath.Action) {
	s := n.s
	for i := range acts {
		a := &acts[i]
		switch a.Kind {
		case slowpath.SendOuter:
			n.e.SendOuter(a.Frame, s.now)
		case slowpath.SendInner:
			n.e.SendInner(a.Frame, s.now)
		case slowpath.Divert:
			n.divert[a.Key] = true
		case slowpath.Undivert:
			delete(n.divert, a.Key)
		case slowpath.Install:
			n.install(a.Est)
		case slowpath.Reinject:
			n.e.Reinject(a.Dir, a.Frame, s.now)
		case slowpath.Agree:
			s.fail("node %d: a job that nobody asked for", n.id)
		case slowpath.Report:
			s.logf("node %d: %s %s %s", n.id, a.Key, a.Info.State, a.Info.Reason)
			if a.Info.State == slowpath.StateFailed {
				n.flows[a.Key].failed = a.Info.Reason
			}
		}
	}
}

// install takes a flow over from the slow path; the monitor gets keys of its own.
func (n *simNode) install(est *slowpath.Established) {
	s, k := n.s, n.id
	f := n.flows[est.Key]
	if f.up[k] {
		s.fail("node %d: %s is installed twice", k, f.name)
		return
	}
	if peer := f.est[1-k]; peer != nil && (peer.Session.ID() != est.Session.ID() || peer.Session.AEAD() != est.Session.AEAD() ||
		peer.Session.Role() == est.Session.Role() || peer.Resumed != est.Resumed) {
		s.fail("node %d: %s is not the session that the other side has", k, f.name)
	}
	if of := s.ids[est.Session.ID()]; of != nil && of != f {
		s.fail("node %d: %s has the session of %s", k, f.name, of.name)
	}
	s.ids[est.Session.ID()] = f
	n.outputs() // of the slow path, before the monitor takes them for the engine's
	keys := *est.Session
	f.est[k], f.up[k] = est, true
	m, w := f.m[k], f.wire[k]
	m.plain, m.checkAck = false, w.checkAck
	w.key, w.init = keys.SendKey, est.TxInit
	w.open(est)
	n.e.Install(est, s.now)
}

// open begins to watch a direction whose sender became encrypted.
func (w *wire) open(est *slowpath.Established) {
	w.mss = est.PeerMSS
	n := uint64(len(w.init))
	w.buf = append(w.buf, w.init...)
	w.have.add(0, n)
	w.high, w.parsed = n, n
	w.edge = max(w.edge, uint64(est.TxAcked+est.PeerWnd))
}

// stripSYN takes options out of a SYN or SYN-ACK, as middleboxes do.
func (s *sim) stripSYN(g *packet.Segment) {
	f := s.nodes[0].flows[g.Key]
	if f == nil {
		f = s.nodes[1].flows[g.Key]
	}
	if f == nil || f.cfg.strip == 0 {
		return
	}
	ack := g.Flags&packet.ACK != 0
	packet.WalkOptions(g.Options(), func(o []byte) bool {
		var bit uint8
		switch {
		case o[0] == packet.OptENO && ack:
			bit = stripENOAck
		case o[0] == packet.OptENO:
			bit = stripENO
		case ack:
		case o[0] == packet.OptSACKOK:
			bit = stripSACK
		case o[0] == packet.OptTimestamp:
			bit = stripTS
		case o[0] == packet.OptWScale:
			bit = stripWS
		}
		if f.cfg.strip&bit != 0 {
			for i := range o {
				o[i] = packet.OptNOP
			}
		}
		return true
	})
	packet.FullChecksum(g.Frame, g.L3, g.L4, g.V6)
	packet.Parse(g.Frame, packet.FromInner, g)
}

// over reports whether node k has nothing more to do for the connection.
func (f *simFlow) over(k int) bool {
	if f.up[k] {
		return f.gone[k]
	}
	m := f.m[k]
	return m.started && m.done() || m.opening == listening && f.m[1-k].reset
}

// finishLives checks what became of connections that the slow path opened.
func (s *sim) finishLives() {
	for _, f := range s.flows {
		reset := f.m[0].reset || f.m[1].reset
		c := f.cfg
		switch {
		case f.up[0] != f.up[1] && !reset:
			s.fail("%s is encrypted on one side only", f.name)
		case f.failed != "" && s.sc.quiet == 0 && !s.short() && s.nodes[0].e.st.NoChunk+s.nodes[1].e.st.NoChunk == 0:
			s.fail("%s failed, though nothing was lost: %s", f.name, f.failed)
		case s.sc.quiet == 0 && s.sc.daemon == [2]bool{true, true} && c.strip&(stripENO|stripENOAck) == 0 && !c.crossing && !f.up[0]:
			s.fail("%s is not encrypted, and nothing hindered it", f.name)
		}
	}
	for _, n := range s.nodes {
		if n.m != nil && (n.m.Len() != 0 || len(n.divert) != 0) {
			s.fail("node %d: %d half-open flows and %d diversions left", n.id, n.m.Len(), len(n.divert))
		}
	}
}

// randomLives makes the scenario one of whole lives.
func randomLives(rng *rand.Rand, sc *scenario) {
	one := func(n int) bool { return rng.IntN(n) == 0 }
	sc.lives, sc.daemon, sc.resume = true, [2]bool{true, true}, !one(3)
	if one(6) {
		sc.daemon[rng.IntN(2)] = false
	}
	at := time.Duration(0)
	for i := range sc.flows {
		c := &sc.flows[i]
		c.warp = [2]warp{}
		c.aead = sc.flows[0].aead
		c.startAt = at
		at += time.Duration(rng.Int64N(int64(2 * time.Second)))
		if one(5) {
			c.strip = 1 << rng.IntN(5)
		}
		// A SYN without ENO passes by the daemon, and must not find that one
		// of this side is still on its way there: no network is that quick.
		near := min(sc.net[0].delay, sc.net[1].delay) < 10*time.Millisecond || sc.pollDelay > time.Millisecond
		if c.crossing = one(10) && !(near && (sc.daemon != [2]bool{true, true} || c.strip&stripENO != 0)); c.crossing {
			c.passiveRole = one(2)
		}
		for k := range c.model {
			if sc.quiet > 0 && c.model[k].keepalive == 0 {
				// Its peer may have failed in the handshake, and lost its reset.
				c.model[k].keepalive = 3 * time.Second
			}
		}
	}
}
