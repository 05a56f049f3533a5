package fastpath

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// A model of the local TCP stack: small, in virtual time, and suspicious. It
// writes and reads packets with virtio-net headers as the TAP carries them and
// calls fail when what it is given is not what a TCP may do.

type probeKind uint8

const (
	probeEmpty   probeKind = iota // Linux: no data, the number before una
	probeGarbage                  // a byte of garbage there
	probeData                     // RFC 9293: a byte beyond the window
	numProbes
)

type recutKind uint8

const (
	recutSame recutKind = iota
	recutHalf
	recutCollapse
	recutRandom
	numRecuts
)

type modelConfig struct {
	mss    int // payload bytes of a full segment
	ourMSS int // as announced in a SYN
	rcvMSS int // payload bytes of a full segment towards the model
	gso    int // most payload bytes of a super-segment
	rcvBuf uint64
	// shrinkAfter its handshake, 0 for never, the model takes back what window is
	// beyond a buffer of shrinkTo bytes, as Linux does with tcp_shrink_window.
	shrinkAfter time.Duration
	shrinkTo    uint64

	sndBuf uint64
	sack   bool
	ts     bool
	ws     bool
	ecn    bool
	urg    bool
	// shifts of the windows that the model announces and is announced
	shift, peerShift uint8
	sws              bool // silly window avoidance when sending
	keepSACK         bool // the scoreboard survives a timeout
	probe            probeKind
	recut            recutKind
	delack           time.Duration
	keepalive        time.Duration // 0: off
	lossy            bool          // packets between model and engine may be lost or doubled
	minRTO           time.Duration
	dscp             uint8
	givesUp          bool // resets when nothing is answered: an attacker may have cut the connection
	tlp              bool // tail loss probes (RFC 8985 section 7)
	mtuProbe         bool // smaller segments after timeouts, now and then a larger one (RFC 4821)
}

// appConfig is the application above a model.
type appConfig struct {
	total     uint64 // bytes it writes before it closes
	write     int    // most bytes of one write
	writeGap  time.Duration
	read      uint64 // most bytes of one read, 0 reads all at once
	readGap   time.Duration
	closeWait bool   // closes only after the peer's end-of-file
	abortAt   uint64 // resets once that many bytes were acknowledged, 0 never
}

type model struct {
	cfg  modelConfig
	app  appConfig
	rng  *rand.Rand
	name string
	peer *model
	tmpl packet.Template

	phase    uint64
	iss, irs uint32
	out      func(buf []byte)
	alloc    func(n int) []byte
	fail     func(format string, args ...any)
	checkAck func(from, to uint64, sack bool) // the peer side must hold these bytes
	now      time.Duration
	quiet    time.Duration // nothing gets lost from here on
	tsBase   uint32
	seg      packet.Segment

	started  bool
	opening  uint8
	plain    bool // no engine is between this model and the network
	shielded bool // but a slow path was, which takes ENO out
	bareTS   bool // segments that were passed on may lack their timestamps
	reset    bool
	movedAt  time.Duration // when anything went on, until all was over
	stall    time.Duration // longest pause of that
	settled  bool
	lateRST  bool // a reset came when both applications had all, and cost nothing

	written    uint64
	nextWrite  time.Duration
	urgMarks   map[uint64]bool // offsets behind the last urgent byte, not yet acknowledged
	urgAll     map[uint64]bool
	una, nxt   uint64
	max        uint64 // highest offset sent
	edge       uint64
	consumed   uint64 // bytes that the engine was certainly given
	wl1        uint64
	sacked     spans
	cwnd       uint64
	ssthresh   uint64
	dups       int
	inRec      bool
	recover    uint64
	rtxNext    uint64
	srtt       time.Duration
	rttvar     time.Duration
	backoff    uint
	rtoAt      time.Duration
	synAt      time.Duration
	rackAt     time.Duration
	synTries   uint
	ptoAt      time.Duration // of the tail loss probe
	probed     bool          // the tail was
	fullMSS    int           // as long as mtuProbe has made mss smaller
	growAt     time.Duration // when a segment of fullMSS is tried
	grownTo    uint64        // its end
	persistAt  time.Duration
	kaAt       time.Duration
	unanswered int
	askedAt    time.Duration // the first of them
	cwrDue     bool
	eceSeen    int

	rcv       uint64
	rcvEdge   uint64
	shrinkAt  time.Duration
	oldEdge   uint64 // before it was taken back: what is in front of it is acceptable still
	shrunk    bool
	ooo       spans
	readPos   uint64
	nextRead  time.Duration
	pending   uint64
	delackAt  time.Duration
	finAt     uint64
	finKnown  bool
	eof       bool
	tsRecent  uint32
	tsSent    uint32
	eceLatch  bool
	urgSeen   int
	dupData   int
	segsIn    int
	segsOut   int
	rtx       int
	challenge int
}

func newModel(name string, cfg modelConfig, app appConfig, rng *rand.Rand) *model {
	return &model{
		name: name, cfg: cfg, app: app, rng: rng, cwnd: uint64(10 * cfg.mss), ssthresh: 1 << 40,
		tsBase: rng.Uint32(), urgMarks: map[uint64]bool{}, urgAll: map[uint64]bool{},
	}
}

// open starts the model as it stands after its handshake: the window it
// announced in its SYN, and the one that it was shown.
func (m *model) open(now time.Duration, sndWnd uint64) { m.begin(now, sndWnd, true) }

// begin is open, with or without an ACK that answers the end of the handshake.
func (m *model) begin(now time.Duration, sndWnd uint64, answer bool) {
	m.now = now
	m.started = true
	m.edge = sndWnd
	m.nextWrite = now
	m.movedAt = now
	if m.cfg.keepalive > 0 {
		m.kaAt = now + m.cfg.keepalive
	}
	if m.cfg.shrinkAfter > 0 {
		m.shrinkAt = now + m.cfg.shrinkAfter
	}
	if answer {
		m.sendAck()
	}
	m.tick(now)
}

// moved notes that the connection went on: bytes were written, acknowledged,
// received or read.
func (m *model) moved() {
	if p := m.peer; p != nil && !m.settled {
		// Whatever one end does counts for both: a slow reader's sender waits.
		m.stall = max(m.stall, m.now-max(m.movedAt, p.movedAt))
		m.movedAt = m.now
		m.settled = m.done()
	}
}

func (m *model) synWnd() uint64 { return min(m.cfg.rcvBuf, 65535) }

func (m *model) closing() bool {
	return m.written == m.app.total && (!m.app.closeWait || m.eof)
}

// end is the offset behind what may be sent, the FIN included.
func (m *model) end() uint64 {
	if m.closing() {
		return m.written + 1
	}
	return m.written
}

func (m *model) finAcked() bool { return m.closing() && m.una == m.app.total+1 }

func (m *model) done() bool { return m.reset || m.finAcked() && m.eof }

func (m *model) rto() time.Duration {
	r := m.cfg.minRTO
	if m.srtt > 0 {
		r = max(r, m.srtt+4*m.rttvar)
	} else {
		r = max(r, time.Second)
	}
	return min(r<<min(m.backoff, 10), 4*time.Second)
}

func (m *model) ts() uint32 {
	m.tsSent = m.tsBase + uint32(m.now/time.Millisecond)
	return m.tsSent
}

// window computes what the model announces now.
func (m *model) window() uint16 {
	free := uint64(0)
	if used := m.rcv - m.readPos; used < m.cfg.rcvBuf {
		free = m.cfg.rcvBuf - used
	}
	edge := m.rcv + free
	if edge < m.rcvEdge+min(uint64(m.cfg.rcvMSS), m.cfg.rcvBuf/2) {
		edge = m.rcvEdge
	}
	edge = max(edge, m.rcvEdge, m.rcv)
	w := min((edge-m.rcv+1<<m.cfg.shift-1)>>m.cfg.shift, 65535)
	m.rcvEdge = max(m.rcvEdge, m.rcv+w<<m.cfg.shift)
	return uint16(w)
}

// takeBack shrinks the window. What is under way beyond it is as good as lost.
func (m *model) takeBack() {
	m.shrunk, m.cfg.lossy = true, true
	m.cfg.rcvBuf, m.oldEdge = m.cfg.shrinkTo, m.rcvEdge
	m.rcvEdge = max(m.rcv, min(m.rcvEdge, m.readPos+m.cfg.rcvBuf))
	m.sendAck()
}

// transmit sends one packet at offset o. The payload is the stream's, or
// garbage for a probe.
func (m *model) transmit(o uint64, n int, flags uint8, garbage bool) {
	opt := 0
	var opts [packet.MaxOptions]byte
	if m.cfg.ts {
		putTS(opts[:], m.ts(), m.tsRecent)
		opt = 12
	}
	if m.cfg.sack && len(m.ooo) > 0 {
		k := 4
		for i := len(m.ooo) - 1; i >= 0 && opt+k+8 <= packet.MaxOptions; i-- {
			binary.BigEndian.PutUint32(opts[opt+k:], seqOf(m.irs, m.ooo[i].s))
			binary.BigEndian.PutUint32(opts[opt+k+4:], seqOf(m.irs, m.ooo[i].e))
			k += 8
		}
		opts[opt], opts[opt+1], opts[opt+2], opts[opt+3] = packet.OptNOP, packet.OptNOP, packet.OptSACK, uint8(k-2)
		opt += k
	}
	h := packet.Header{Seq: seqOf(m.iss, o), Ack: seqOf(m.irs, m.rcv), Flags: flags | packet.ACK, Wnd: m.window(), Opts: opts[:opt]}
	data := n
	if flags&packet.FIN != 0 {
		data = n - 1
	}
	ecn := uint8(0)
	if m.cfg.ecn {
		if m.eceLatch {
			h.Flags |= packet.ECE
		}
		if data > 0 && o >= m.max {
			ecn = 2
			if m.cwrDue {
				h.Flags |= packet.CWR
				m.cwrDue = false
			}
		}
	}
	if data > 0 && !garbage {
		for p := range m.urgMarks {
			if d := p - o; p > o && d <= 65535 && d <= uint64(data) {
				h.Flags |= packet.URG
				h.Urg = max(h.Urg, uint16(d))
			}
		}
	}
	m.tmpl.SetECN(ecn)
	buf, hl := m.compose(&h, data)
	frame := buf[xdp.VnetHdrLen:]
	if garbage {
		for i := range data {
			frame[hl+i] = byte(m.rng.Uint32())
		}
	} else {
		copy(frame[hl:], content(m.phase, o, data))
	}
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(m.tmpl.L4()), CsumOffset: 16}
	if data > m.cfg.mss {
		v.GSOType, v.GSOSize, v.HdrLen = xdp.VnetGSOTCPv4, uint16(m.cfg.mss), uint16(hl)
		if m.tmpl.V6() {
			v.GSOType = xdp.VnetGSOTCPv6
		}
		if h.Flags&packet.CWR != 0 {
			v.GSOType |= xdp.VnetGSOECN
		}
	}
	v.Put(buf)
	m.pending, m.delackAt = 0, 0
	m.segsOut++
	if !garbage && n > 0 {
		if o < m.max {
			m.rtx++
		}
		m.max = max(m.max, o+uint64(n))
	}
	m.out(buf)
}

// compose makes a packet with so many payload bytes, which the caller fills in as
// he does the virtio-net header. hl is the length of the other headers.
func (m *model) compose(h *packet.Header, data int) (buf []byte, hl int) {
	buf = m.alloc(xdp.VnetHdrLen + packet.MaxHeaders + data)
	hl = m.tmpl.Compose(buf[xdp.VnetHdrLen:], h, data)
	buf = buf[:xdp.VnetHdrLen+hl+data]
	l3, l4 := m.tmpl.L3(), m.tmpl.L4()
	packet.PartialChecksum(buf[xdp.VnetHdrLen:], l3, l4, len(buf)-xdp.VnetHdrLen-l4, m.tmpl.V6())
	return buf, hl
}

func (m *model) sendAck() { m.transmit(max(m.nxt, m.max), 0, 0, false) }

// segment sends stream bytes from o, at most n of them and the FIN if it
// follows, and returns the offset behind.
func (m *model) segment(o uint64, n int) uint64 {
	flags := uint8(0)
	if d := m.written - min(o, m.written); uint64(n) >= d {
		n = int(d)
		flags = packet.PSH
		if m.closing() {
			n++
			flags |= packet.FIN
		}
	}
	m.transmit(o, n, flags, false)
	return o + uint64(n)
}

// send transmits what windows allow.
func (m *model) send() {
	if m.reset || !m.started || m.opening != opened {
		return
	}
	mss := uint64(m.cfg.mss)
	for m.nxt < m.end() {
		if r, ok := m.sacked.next(m.nxt); ok && r.s <= m.nxt && m.nxt < m.max {
			m.nxt = r.e
			continue
		}
		inflight := m.nxt - m.una - m.sacked.below(m.nxt)
		n := m.end() - m.nxt
		if m.nxt < m.max {
			n = m.recutLen(min(n, m.max-m.nxt))
			if r, ok := m.sacked.next(m.nxt); ok {
				n = min(n, r.s-m.nxt)
			}
		}
		if m.grow() {
			continue
		}
		n = min(n, uint64(m.cfg.gso))
		if inflight > 0 {
			if inflight >= m.cwnd || m.cwnd-inflight < min(n, mss) {
				break
			}
			n = min(n, m.cwnd-inflight)
		} else {
			n = min(n, max(m.cwnd, mss))
		}
		wnd := uint64(0)
		if m.edge > m.nxt {
			wnd = m.edge - m.nxt
		}
		if n > wnd {
			if wnd == 0 || m.cfg.sws && wnd < mss {
				break
			}
			n = wnd
			if m.cfg.sws {
				n -= n % mss
			}
		}
		if m.nxt == m.app.total && m.closing() {
			n = 0
		}
		m.nxt = m.segment(m.nxt, int(n))
	}
	m.nxt = max(m.nxt, m.una)
	m.ptoAt = 0
	if m.max > m.una {
		m.persistAt = 0
		if m.rtoAt == 0 {
			m.rtoAt = m.now + m.rto()
		}
		if m.cfg.tlp && m.cfg.sack && !m.probed && !m.inRec && m.backoff == 0 && m.srtt > 0 {
			if at := m.now + max(2*m.srtt, 10*time.Millisecond); at < m.rtoAt {
				m.ptoAt = at
			}
		}
	} else {
		m.rtoAt = 0
		if m.nxt < m.end() {
			if m.persistAt == 0 {
				m.persistAt = m.now + m.rto()
			}
		} else {
			m.persistAt = 0
		}
	}
}

// grow sends one segment of the size that had to be given up, when it is time
// to try that again. It reports whether it did.
func (m *model) grow() bool {
	n := uint64(m.fullMSS)
	if m.growAt == 0 || m.now < m.growAt || m.nxt < m.max || m.nxt != m.una || m.written-min(m.nxt, m.written) < n || m.edge < m.nxt+n {
		return false
	}
	small := m.cfg.mss
	m.cfg.mss = m.fullMSS
	m.nxt = m.segment(m.nxt, int(n))
	m.cfg.mss = small
	m.growAt, m.grownTo = 0, m.nxt
	return true
}

// shrink makes segments smaller: larger ones may not fit the path.
func (m *model) shrink() {
	const least = 200
	if m.grownTo != 0 {
		m.grownTo, m.growAt = 0, m.now+20*time.Second
		return
	}
	if m.backoff >= 2 && m.cfg.mss > least {
		m.fullMSS = max(m.fullMSS, m.cfg.mss)
		m.cfg.mss = max(least, m.cfg.mss/2)
		m.growAt = m.now + 5*time.Second
	}
}

// probeTail sends the last bytes again, or the next, when their
// acknowledgement is late.
func (m *model) probeTail() {
	m.ptoAt, m.probed = 0, true
	if m.max <= m.una {
		return
	}
	mss := uint64(m.cfg.mss)
	if m.nxt == m.max && m.nxt < m.written && m.edge >= m.nxt+mss {
		m.nxt = m.segment(m.nxt, int(min(mss, m.written-m.nxt)))
	} else {
		o := max(m.una, m.max-min(m.max, mss))
		n := m.max - o
		if o >= m.written {
			n = 0
		}
		m.segment(o, int(n))
	}
	m.rtoAt = m.now + m.rto()
}

// recutLen chooses how many of n outstanding bytes are sent again together.
func (m *model) recutLen(n uint64) uint64 {
	l := uint64(m.cfg.mss)
	switch m.cfg.recut {
	case recutHalf:
		l = max(1, l/2)
	case recutCollapse:
		l *= 3
	case recutRandom:
		l = 1 + m.rng.Uint64N(2*l)
	}
	return min(n, l)
}

// resendHead sends the first outstanding bytes again whatever the window.
func (m *model) resendHead() {
	n := m.recutLen(m.max - m.una)
	if r, ok := m.sacked.next(m.una); ok && r.s > m.una {
		n = min(n, r.s-m.una)
	}
	if m.una == m.app.total {
		n = 0
	}
	m.segment(m.una, int(n))
}

func (m *model) deadline() time.Duration {
	d := time.Duration(1<<63 - 1)
	if m.reset {
		return d
	}
	for _, t := range [...]time.Duration{m.synAt, m.rtoAt, m.ptoAt, m.rackAt, m.persistAt, m.kaAt, m.delackAt, m.nextWrite, m.nextRead, m.shrinkAt} {
		if t != 0 {
			d = min(d, t)
		}
	}
	return d
}

func (m *model) tick(now time.Duration) {
	m.now = now
	if m.reset || !m.started {
		return
	}
	if m.opening != opened {
		if m.synAt != 0 && now >= m.synAt {
			m.sendSYN()
		}
		return
	}
	if m.nextWrite != 0 && now >= m.nextWrite {
		m.nextWrite = 0
		m.write()
	}
	if m.nextRead != 0 && now >= m.nextRead {
		m.nextRead = 0
		m.readSome()
	}
	if m.delackAt != 0 && now >= m.delackAt {
		m.delackAt = 0
		m.sendAck()
	}
	if m.shrinkAt != 0 && now >= m.shrinkAt {
		m.shrinkAt = 0
		m.takeBack()
	}
	if m.rackAt != 0 && now >= m.rackAt {
		m.reorderingOver()
	}
	if m.ptoAt != 0 && now >= m.ptoAt {
		m.probeTail()
	}
	if m.rtoAt != 0 && now >= m.rtoAt {
		m.timeout()
	}
	if m.persistAt != 0 && now >= m.persistAt {
		m.persist()
	}
	if m.kaAt != 0 && now >= m.kaAt {
		m.kaAt = now + m.cfg.keepalive
		if m.done() {
			m.kaAt = 0
		} else if m.una == m.max && m.nxt >= m.end() {
			m.asked("keep-alive")
			if m.reset {
				return
			}
			if m.rng.IntN(2) == 0 {
				m.transmit(m.una-1, 0, 0, false)
			} else {
				m.transmit(m.una-1, 1, 0, true)
			}
		}
	}
}

// asked counts probes that want an answer, from when none should get lost.
func (m *model) asked(what string) {
	if m.now < m.quiet {
		return
	}
	if m.unanswered == 0 {
		m.askedAt = m.now
	}
	m.unanswered++
	// A keep-alive is answered by authentic data, which may wait for a
	// retransmission.
	if m.unanswered > 12 && m.now-m.askedAt > 15*time.Second {
		if m.cfg.givesUp {
			m.abort()
			return
		}
		// What fits the window that a peer has taken back waits for its reader, and
		// that nothing came of it is no news inside the other host.
		if m.peer == nil || !m.peer.shrunk {
			m.fail("%s: %d probes without an answer, the last a %s", m.name, m.unanswered, what)
		}
	}
}

func (m *model) timeout() {
	m.rtoAt, m.ptoAt, m.rackAt = 0, 0, 0
	if m.max <= m.una {
		return
	}
	m.ssthresh = max((m.max-m.una)/2, 2*uint64(m.cfg.mss))
	m.cwnd = uint64(m.cfg.mss)
	m.inRec, m.dups = false, 0
	if !m.cfg.keepSACK {
		m.sacked = m.sacked[:0]
	}
	m.backoff++
	if m.cfg.mtuProbe {
		m.shrink()
	}
	// A window of large units creeps over what its owner has room for (T13): the
	// peer's answers tell nothing new then, while its application still has to read.
	if m.cfg.peerShift < 14 || m.peer.nextRead == 0 {
		m.asked("retransmission")
	}
	if m.reset {
		return
	}
	m.resendHead()
	// Go back: what follows is sent again as acknowledgements allow.
	m.nxt = min(m.una+m.recutLen(m.max-m.una), m.max)
	m.rtoAt = m.now + m.rto()
}

func (m *model) persist() {
	m.persistAt = 0
	if m.nxt >= m.end() || m.max > m.una {
		return
	}
	m.backoff++
	m.asked("window probe")
	if m.reset {
		return
	}
	if wnd := int64(m.edge - m.nxt); wnd > 0 {
		m.nxt = m.segment(m.nxt, int(min(wnd, int64(m.cfg.mss))))
		m.nxt = max(m.nxt, m.una)
		m.rtoAt = m.now + m.rto()
		return
	}
	switch m.cfg.probe {
	case probeEmpty:
		m.transmit(m.una-1, 0, 0, false)
	case probeGarbage:
		m.transmit(m.una-1, 1, 0, true)
	case probeData:
		m.nxt = m.segment(m.nxt, 1)
		m.rtoAt = m.now + m.rto()
		return
	}
	m.persistAt = m.now + m.rto()
}

func (m *model) write() {
	for m.written < m.app.total && m.nextWrite == 0 {
		if m.written-m.una >= m.cfg.sndBuf {
			return // goes on when bytes are acknowledged
		}
		n := min(m.app.total-m.written, uint64(1+m.rng.IntN(m.app.write)), m.cfg.sndBuf-(m.written-m.una))
		m.written += n
		m.moved()
		if m.cfg.urg && m.rng.IntN(50) == 0 {
			mark := m.written - m.rng.Uint64N(n)
			m.urgMarks[mark], m.urgAll[mark] = true, true
		}
		if m.app.writeGap > 0 {
			m.nextWrite = m.now + 1 + time.Duration(m.rng.Int64N(int64(m.app.writeGap)))
		}
		m.send()
	}
	m.send()
}

func (m *model) readSome() {
	if m.readPos == m.rcv {
		return
	}
	got := m.rcv
	if m.eof {
		got-- // the FIN
	}
	n := got - min(m.readPos, got)
	if m.app.read > 0 {
		n = min(n, 1+m.rng.Uint64N(m.app.read))
		if m.readPos+n < got {
			m.nextRead = m.now + 1 + time.Duration(m.rng.Int64N(int64(m.app.readGap)))
		}
	}
	m.readPos += n
	m.moved()
	// A window update when it is worth one.
	used := m.rcv - m.readPos
	if !m.eof && used < m.cfg.rcvBuf {
		edge := m.rcv + m.cfg.rcvBuf - used
		if edge >= m.rcvEdge+min(uint64(2*m.cfg.rcvMSS), m.cfg.rcvBuf/2) {
			m.sendAck()
		}
	}
}

// abort resets the connection from this side.
func (m *model) abort() {
	m.transmit(m.nxt, 0, packet.RST, false)
	m.reset = true
}

// input takes one packet from the engine: virtio-net header and frame.
func (m *model) input(buf []byte, now time.Duration) {
	m.now = now
	if !m.started {
		return
	}
	m.segsIn++
	v := xdp.ParseVnetHdr(buf)
	s := &m.seg
	if err := packet.Parse(buf[xdp.VnetHdrLen:], packet.FromOuter, s); err != nil {
		m.fail("%s: packet from the engine: %v", m.name, err)
		return
	}
	if m.reset {
		// There is no socket any more: a reset where the packet wants it.
		switch {
		case s.Flags&packet.RST != 0:
		case s.Flags&packet.ACK == 0:
			m.refuseSYN(s)
		default:
			m.transmit(uint64(offOf(m.iss, s.Ack, m.una)), 0, packet.RST, false)
		}
		return
	}
	m.checkVnet(v, s)
	m.unanswered = 0
	if m.kaAt != 0 {
		// Only silence makes a stack ask. Probes in step with the peer's timeouts
		// would carry every ACK there is, and those of probes do not count.
		m.kaAt = now + m.cfg.keepalive
	}
	if m.opening != opened && m.inputOpening(s) {
		return
	}
	o := offOf(m.irs, s.Seq, m.rcv)
	n := int64(s.Len())
	if m.plain && s.Flags&packet.SYN == 0 && !m.acceptable(s, o, n) {
		return
	}
	if s.Flags&packet.RST != 0 {
		m.inputReset(s, o)
		return
	}
	if s.Flags&packet.SYN != 0 {
		m.sendAck()
		return
	}
	if s.Flags&packet.ACK == 0 {
		m.fail("%s: segment without ACK", m.name)
		return
	}
	if m.cfg.ts != s.HasTS && !m.plain && !m.bareTS {
		m.fail("%s: timestamp option %v, want %v", m.name, s.HasTS, m.cfg.ts)
		return
	}
	if s.HasTS && m.cfg.ts {
		if packet.SeqDiff(s.TSval, m.tsRecent) < 0 {
			if m.shielded && o == 0 && n == 0 {
				// The released ACK again, for a copy of the SYN-ACK that had
				// been sent before (T18).
				m.sendAck()
				return
			}
			m.fail("%s: TSval went back from %d to %d", m.name, m.tsRecent, s.TSval)
		}
		if m.peer != nil && packet.SeqDiff(s.TSval, m.peer.tsSent) > 0 && m.peer.tsSent != 0 {
			m.fail("%s: TSval %d, the peer has sent %d at most", m.name, s.TSval, m.peer.tsSent)
		}
		if packet.SeqDiff(s.TSecr, m.tsSent) > 0 {
			m.fail("%s: TSecr %d is ahead of what was sent, %d", m.name, s.TSecr, m.tsSent)
		}
		if o <= int64(m.rcv) {
			m.tsRecent = s.TSval
		}
	}
	if o+n < int64(m.rcv) && n > 0 || o < int64(m.rcv) {
		m.dupData++
	}
	m.inputAck(s, o, n)
	if m.reset {
		return
	}
	m.inputData(s, o, n)
	m.send()
	if m.app.abortAt != 0 && m.una >= m.app.abortAt {
		m.abort()
	}
}

func (m *model) checkVnet(v xdp.VnetHdr, s *packet.Segment) {
	gso := v.GSOType &^ xdp.VnetGSOECN
	if v == (xdp.VnetHdr{}) { // of a gateway
		if !s.ChecksumOK(false) {
			m.fail("%s: bad checksum", m.name)
		}
		return
	}
	most := m.cfg.rcvMSS
	if m.opening != opened {
		// What options segments will have is not agreed on yet.
		most = m.cfg.ourMSS
	}
	switch {
	case v.Flags&xdp.VnetNeedsCsum == 0 || int(v.CsumStart) != s.L4 || v.CsumOffset != 16:
		m.fail("%s: virtio-net header without checksum request: %+v", m.name, v)
	case !s.ChecksumOK(true):
		m.fail("%s: bad pseudo-header sum", m.name)
	case s.Len() > most && !m.plain && (int(v.GSOSize) > most || v.GSOSize == 0 || gso == 0):
		m.fail("%s: %d bytes without segmentation: %+v", m.name, s.Len(), v)
	case gso != 0 && (gso == xdp.VnetGSOTCPv6) != s.V6:
		m.fail("%s: wrong GSO type: %+v", m.name, v)
	case s.Len() > m.cfg.rcvMSS && s.Flags&(packet.SYN|packet.RST|packet.URG) != 0:
		m.fail("%s: super-segment with flags %#x", m.name, s.Flags)
	case gso != 0 && s.Flags&packet.CWR != 0 && v.GSOType&xdp.VnetGSOECN == 0:
		m.fail("%s: super-segment with CWR but not marked so", m.name)
	}
}

func (m *model) inputReset(s *packet.Segment, o int64) {
	switch {
	case o == int64(m.rcv):
		m.lateRST = m.eof && m.peer.eof
		m.reset = true
	case o == -1 && m.rcv == 0:
		// Meant for a stack that is in SYN-SENT still.
	case !m.cfg.lossy && !m.plain:
		m.fail("%s: reset at %d, rcv_nxt is %d", m.name, o, m.rcv)
	case o > int64(m.rcv) && o <= int64(m.rcvEdge):
		m.challenge++
		m.sendAck()
	}
}

func (m *model) inputAck(s *packet.Segment, o, n int64) {
	a := offOf(m.iss, s.Ack, m.una)
	if a > int64(m.max) {
		m.fail("%s: acknowledges %d, sent %d", m.name, a, m.max)
		return
	}
	if a < int64(m.una) {
		if !m.cfg.lossy && !m.plain {
			m.fail("%s: acknowledgement went back from %d to %d", m.name, m.una, a)
		}
		return
	}
	if m.checkAck != nil && a > 0 {
		m.checkAck(0, uint64(a), false)
	}
	ack := uint64(a)
	wnd := uint64(s.Wnd) << m.cfg.peerShift
	edge := ack + wnd
	// The window may be taken back to zero, and may shrink over bytes that
	// were not sent; nothing else is legal for a translator in one process.
	if wnd != 0 && edge < m.edge && edge+1<<m.cfg.peerShift <= m.consumed && !m.cfg.lossy && !m.plain && s.Wnd != 65535 {
		m.fail("%s: window edge retreats from %d to %d below %d, which was sent", m.name, m.edge, edge, m.consumed)
	}
	moved := false
	if ack > m.una || o > int64(m.wl1) || o == int64(m.wl1) && (edge > m.edge || wnd == 0) {
		m.wl1 = uint64(max(o, 0))
		moved = edge != m.edge
		m.edge = edge
	}
	if m.cfg.ecn && s.Flags&packet.ECE != 0 && !m.inRec {
		m.eceSeen++
		if !m.cwrDue {
			m.cwrDue = true
			m.ssthresh = max(m.cwnd/2, 2*uint64(m.cfg.mss))
			m.cwnd = m.ssthresh
		}
	}
	if s.Flags&packet.CWR != 0 {
		m.eceLatch = false
	}
	if s.TOS&3 == 3 {
		m.eceLatch = m.cfg.ecn
	}
	news := m.inputSACK(s)
	mss := uint64(m.cfg.mss)
	if ack > m.una {
		if s.HasTS {
			m.measure(time.Duration(int32(m.tsBase+uint32(m.now/time.Millisecond)-s.TSecr)) * time.Millisecond)
		}
		got := ack - m.una
		m.una = ack
		m.moved()
		m.nxt = max(m.nxt, ack)
		m.sacked.dropBelow(ack)
		m.backoff = 0
		m.rtoAt = 0
		m.dups = 0
		m.probed = false
		if m.grownTo != 0 && m.una >= m.grownTo {
			m.cfg.mss, m.fullMSS, m.grownTo = m.fullMSS, 0, 0
		}
		switch {
		case m.inRec && ack >= m.recover:
			m.inRec = false
			m.cwnd = m.ssthresh
		case m.inRec:
			if !m.cfg.sack && m.una < m.max {
				m.resendHead()
			}
		case m.cwnd < m.ssthresh:
			m.cwnd += min(got, 4*mss)
		default:
			m.cwnd += mss * mss / m.cwnd
		}
		m.cwnd = min(m.cwnd, 16<<20)
		for p := range m.urgMarks {
			if p <= m.una {
				delete(m.urgMarks, p)
			}
		}
		if m.written < m.app.total && m.nextWrite == 0 {
			m.nextWrite = m.now
		}
	} else if m.max > m.una && (n == 0 && s.Flags&packet.FIN == 0 && !moved || news) {
		m.dups++
		if m.inRec && !m.cfg.sack {
			m.cwnd += mss
		}
	}
	if !m.inRec && m.max > m.una && (m.dups == 3 || m.sacked.below(m.max) > 3*mss) {
		m.recoverLoss()
	}
	if m.inRec && m.cfg.sack {
		m.fillHoles()
	}
	if m.max == m.una {
		m.rtoAt = 0
	}
	if moved {
		m.persistAt = 0
	}
	if m.cfg.sack && !m.inRec && m.sacked.below(m.max) > 0 {
		if m.rackAt == 0 {
			m.rackAt = m.now + max(m.srtt/4, time.Millisecond)
		}
	} else {
		m.rackAt = 0
	}
}

// recoverLoss begins fast recovery.
func (m *model) recoverLoss() {
	mss := uint64(m.cfg.mss)
	m.inRec = true
	m.recover = m.max
	m.ssthresh = max((m.max-m.una)/2, 2*mss)
	m.cwnd = m.ssthresh
	if !m.cfg.sack {
		m.cwnd += 3 * mss
	}
	m.rtxNext = m.una
	if len(m.sacked) == 0 {
		m.resendHead()
		m.rtxNext = m.una + mss
	}
}

// reorderingOver takes what is still missing below a SACK block for lost, a
// quarter of the round trip after the block came (RFC 8985 section 6.2).
func (m *model) reorderingOver() {
	m.rackAt = 0
	if !m.inRec && m.max > m.una && m.sacked.below(m.max) > 0 {
		m.recoverLoss()
		m.fillHoles()
	}
}

func (m *model) inputSACK(s *packet.Segment) (news bool) {
	if m.plain && (!m.cfg.sack || offOf(m.iss, s.Ack, m.una) < int64(m.una)) {
		return false
	}
	if s.NSACK > 0 && !m.cfg.sack {
		m.fail("%s: SACK was not negotiated", m.name)
	}
	una := max(int64(m.una), offOf(m.iss, s.Ack, m.una))
	for _, b := range s.SACK[:s.NSACK] {
		l, r := offOf(m.iss, b[0], m.una), offOf(m.iss, b[1], m.una)
		if m.plain && (l >= r || r > int64(m.max) || l <= una) {
			continue
		}
		if l >= r || r > int64(m.max) || l <= una {
			m.fail("%s: SACK block [%d,%d) with una %d and %d sent", m.name, l, r, una, m.max)
			continue
		}
		if m.checkAck != nil {
			m.checkAck(uint64(l), uint64(r), true)
		}
		if !m.sacked.covers(uint64(l), uint64(r)) {
			news = true
			m.sacked.add(uint64(l), uint64(r))
		}
	}
	return news
}

// fillHoles retransmits up to two pieces that the scoreboard says are missing.
func (m *model) fillHoles() {
	if len(m.sacked) == 0 {
		return
	}
	high := m.sacked[len(m.sacked)-1].s
	m.rtxNext = max(m.rtxNext, m.una)
	for k := 0; k < 2 && m.rtxNext < high; k++ {
		r, _ := m.sacked.next(m.rtxNext)
		if r.s <= m.rtxNext {
			m.rtxNext = r.e
			continue
		}
		n := m.recutLen(r.s - m.rtxNext)
		if m.rtxNext == m.app.total {
			n = 0
		}
		m.rtxNext = m.segment(m.rtxNext, int(n))
	}
}

func (m *model) measure(rtt time.Duration) {
	rtt = max(rtt, time.Millisecond)
	if m.srtt == 0 {
		m.srtt, m.rttvar = rtt, rtt/2
		return
	}
	d := m.srtt - rtt
	if d < 0 {
		d = -d
	}
	m.rttvar += (d - m.rttvar) / 4
	m.srtt += (rtt - m.srtt) / 8
}

func (m *model) inputData(s *packet.Segment, o, n int64) {
	fin := s.Flags&packet.FIN != 0
	if n == 0 && !fin {
		if o < int64(m.rcv) {
			m.sendAck() // a probe
		}
		return
	}
	data := s.Payload()
	if skip := int64(m.rcv) - o; m.plain && skip > 0 {
		// Had before, or a probe's garbage.
		if skip >= n && !(fin && skip == n) {
			m.sendAck()
			return
		}
		data, o, n = data[skip:], o+skip, n-skip
	}
	if m.peer != nil {
		m.checkContent(s, data, o, fin)
	}
	end := o + n
	if (m.plain || m.shrunk) && end > int64(m.rcvEdge) {
		end, fin = int64(m.rcvEdge), false
		n = end - o
		if n <= 0 {
			m.sendAck()
			return
		}
	}
	if end > int64(m.rcvEdge) && !m.eof {
		m.fail("%s: data to %d, the window ends at %d", m.name, end, m.rcvEdge)
	}
	if fin {
		m.finAt, m.finKnown = uint64(end), true
	}
	if end < int64(m.rcv) || end == int64(m.rcv) && !fin {
		m.sendAck()
		return
	}
	if o > int64(m.rcv) {
		if !m.cfg.lossy && !m.plain {
			m.fail("%s: data at %d, rcv_nxt is %d: a gap", m.name, o, m.rcv)
		}
		m.ooo.add(uint64(o), uint64(end))
		m.sendAck()
		return
	}
	now := len(m.ooo) > 0
	m.rcv = max(m.rcv, uint64(end))
	if r, ok := m.ooo.next(m.rcv); ok && r.s <= m.rcv {
		m.rcv = r.e
	}
	m.ooo.dropBelow(m.rcv)
	m.pending += uint64(n)
	if m.finKnown && m.rcv == m.finAt && !m.eof {
		m.eof = true
		m.rcv++
		now = true
	}
	m.moved()
	if m.app.read == 0 {
		m.readSome()
	} else if m.nextRead == 0 {
		m.nextRead = m.now + 1 + time.Duration(m.rng.Int64N(int64(m.app.readGap)))
	}
	if m.eof && m.app.closeWait && m.nextWrite == 0 {
		m.nextWrite = m.now
	}
	if now || m.pending >= uint64(2*m.cfg.rcvMSS) || m.cfg.delack == 0 {
		m.sendAck()
	} else if m.pending > 0 && m.delackAt == 0 {
		m.delackAt = m.now + m.cfg.delack
	}
}

// checkContent compares with what the other application wrote.
func (m *model) checkContent(s *packet.Segment, data []byte, o int64, fin bool) {
	p := m.peer
	n := int64(len(data))
	if o < 0 || uint64(o+n) > p.written {
		m.fail("%s: data [%d,%d), the other side wrote %d", m.name, o, o+n, p.written)
		return
	}
	if string(content(p.phase, uint64(o), int(n))) != string(data) {
		want, got := content(p.phase, uint64(o), int(n)), data
		k := 0
		for want[k] == got[k] {
			k++
		}
		m.fail("%s: wrong byte at %d of segment [%d,%d)", m.name, o+int64(k), o, o+n)
		return
	}
	if fin && !(p.closing() && uint64(o+n) == p.app.total) {
		m.fail("%s: end-of-file at %d, the other side wrote %d of %d, closed %v", m.name, o+n, p.written, p.app.total, p.closing())
	}
	if s.Flags&packet.URG != 0 {
		m.urgSeen++
		if at := uint64(offOf(m.irs, s.Seq, m.rcv)) + uint64(s.Urg); !p.urgAll[at] {
			m.fail("%s: urgent pointer to %d, which was not urgent", m.name, at)
		}
	}
}

func (m *model) String() string {
	return fmt.Sprintf("%s: una %d nxt %d max %d written %d/%d edge %d sacked %v cwnd %d rec %v backoff %d | rcv %d edge %d ooo %v read %d eof %v reset %v | rto %v persist %v write %v read %v delack %v",
		m.name, m.una, m.nxt, m.max, m.written, m.app.total, m.edge, m.sacked, m.cwnd, m.inRec, m.backoff,
		m.rcv, m.rcvEdge, m.ooo, m.readPos, m.eof, m.reset, m.rtoAt, m.persistAt, m.nextWrite, m.nextRead, m.delackAt)
}
