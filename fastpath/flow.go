package fastpath

import (
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// Life of a flow in the fast path.
const (
	flowLive   = iota
	flowLinger // both directions ended well: keys are gone, numbers are kept (T20)
	flowReset  // aborted: whoever still speaks is answered with a reset
	flowFree   // memory of the pool
)

// smallestSegment keeps an absurd MSS or window from cutting inner segments to
// nothing, in bytes of data.
const smallestSegment = 88

// overhead is what a frame adds to the data it carries (invariant 7).
const overhead = crypto.Overhead

// flow is one established connection. It belongs to one worker and has no
// lock. Offsets are 64 bit and count bytes of a stream from 0, the first byte
// after the SYN: I for the inner (plaintext) stream, O for the outer one.
//
// Inner to outer is a translator (tx fields), outer to inner a receiver with
// custody (rx fields); see T1.
type flow struct {
	// What nearly every packet needs stands first, in the order of its use, and
	// what few need last: a packet of a flow that others have driven out of
	// the cache costs what is fetched of it, see prefetch.

	key   packet.Key
	state uint8
	gone  bool // removed from the table
	dirty bool // on the engine's list of flows to flush

	tsOK, sackOK, wsOK, ecnOK bool
	localShift, remoteShift   uint8
	eceLatch                  bool // CE was seen and CWR not yet (T16)
	txCWR, rxCWR              bool
	peerECE                   bool
	txECN, rxECN              uint8 // ECT codepoint of the sender's data
	ackDueI                   bool  // an inner ACK is owed if it tells something new
	ackMustI                  bool  // an inner ACK is owed in any case
	probing                   bool  // and will be, once the peer has answered a probe
	unheard                   bool  // no segment without SYN came from the peer: ours carry ENO (RFC 8547 section 4.6)

	iss, irs              uint32 // initial sequence numbers, local and remote
	tsLocal               uint32 // newest TSval of the inner stack
	tsRemote, tsRemoteEcr uint32 // newest TSval and TSecr of the peer

	// --- receiving: outer to inner ---
	nxtO      uint64 // next in-order outer byte, the FIN counts as one
	rxEdge    uint64 // right edge advertised to the peer; never retreats (T13)
	ackSentO  uint64 // newest acknowledgement sent to the peer
	frameO    uint64 // start of the frame that is being assembled
	opening   uint64 // outer bytes of frames queued for opening
	rcvMSS    int    // largest segment received
	meanIn    int    // data bytes of a recent mean frame received
	hdrN      int    // bytes of hdr seen, while less than three
	asmHave   int
	asm       []byte // frame being assembled, nil when none is
	oooBytes  int
	rxSlab    uint32
	rxGen     uint32      // generation of the newest frame opened
	rxGenQ    uint32      // generation of the newest frame queued for opening
	rxOldest  uint32      // generations before were erased
	rxKey     *crypto.Key // of rxGenQ
	hdr       [crypto.FrameHeader]byte
	asmMark   uint8
	finp      bool // FINp was opened: the plaintext ends at dlvI
	peerFin   bool // an outer FIN was seen at peerFinO
	finTaken  bool // and acknowledged
	ackNow    bool
	quickAcks uint8 // so many segments are acknowledged at once
	innerAcks bool  // the inner stack acknowledged something in this vector
	innerUp   bool  // the inner stack may be sent data

	dlvI      uint64 // end of the plaintext in custody
	urgentI   uint64 // end of urgent data that a frame without data announced, 0 for none
	sntI      uint64 // plaintext below was given to the inner stack; the FIN counts as one
	sntMaxI   uint64
	innerAck  uint64 // acknowledged by the inner stack
	innerEdge uint64 // right edge of the inner stack's window
	innerDups int32
	innerWnd  uint32 // largest window that the inner stack showed
	pieces    ring[piece]
	cursor    int   // piece that sntI lies in
	inMSS     int32 // most payload bytes of an inner segment
	inSeg     int32 // payload bytes of an inner segment, see sizeInner
	innerRTO  time.Duration
	wndShownI uint64
	wndMaxI   uint64 // largest window that the inner stack was shown
	ackShownI uint64

	// --- sending: inner to outer ---
	sealI, sealO uint64 // next inner byte to seal, and the outer byte it gets (T4)
	sentO        uint64 // outer bytes below were transmitted, the FIN counts as one
	unaO         uint64 // outer bytes below are acknowledged by the peer
	ackI         uint64 // unaO mapped inward, rounded down (T3): acknowledged to the inner stack
	edgeO        uint64 // right edge of the peer's window
	wl1          uint64 // outer offset of the segment that last updated edgeO
	recs         ring[rec]
	txSlab       uint32
	txGen        uint32
	txBytes      int // retained bytes
	ctlBytes     int // those of them that carry no inner byte
	meanData     int // data bytes of a recent mean frame
	outMSS       int // most option and payload bytes of an outer segment
	txKey        *crypto.Key
	txKeyFrames  uint64 // frames sealed under txKey
	keyFrames    uint64 // and the most there may be (T11)
	txKeyBytes   uint64 // plaintext bytes sealed under txKey
	finSealed    bool
	closedFirst  bool // before the peer's FIN was acknowledged: the last ACK may be ours
	held         bool // sealed bytes wait for the peer's window (T6)
	rekeyNext    bool // the next frame initiates rekeying
	verifying    bool // the inner stack waits for an authentic sign of life (TC 3.9)
	ctlSmall     bool // control bytes are sent again in small segments

	outer, inner packet.Template
	timers       [numTimers]time.Duration
	heapIx       int
	heapAt       time.Duration

	bytesIn, bytesOut, framesIn, framesOut uint64

	// What is looked at in nearly every packet, if only to find nothing.
	initO    uint64 // end of the Init message that this side sent
	pmtu     int
	holdRTO  time.Duration
	ctlRTO   time.Duration
	ctlTries int // how often control bytes were sent again since ctlRTO began anew
	rtt      time.Duration
	backlog  []backlogged // inner data above sealI (T7)
	ooo      []oooSeg     // sorted, disjoint, above nxtO
	runs     []run        // the same, as runs for SACK
	dsack    run
	stamp    uint32

	// --- what few packets need ---
	asmRef   ref
	asmOff   uint32
	peerFinO uint64
	sess     *crypto.Session
	release  []byte

	ctlAgainAt  time.Duration // not before, SACK blocks have control bytes sent again
	challengeAt time.Duration // start of the current second of challenge ACKs
	challengeN  int

	// The inner stack sends the same bytes again less and less often: when it last
	// sent something again, and when it began to while unaO was stallO.
	resendAt, stallAt time.Duration
	stallO            uint64

	seen  uint64 // what was received and sent when Engine.lookAfter last saw news
	still int    // how often it saw none since

	born      time.Duration
	ended     time.Duration // when it left the live state
	id        [33]byte
	tep       crypto.TEP
	aead      crypto.AEAD
	role      crypto.Role
	active    bool
	resumed   bool
	peerAware bool // a bit of the peer's ENO option
	reason    string

	retransmits, rekeysIn, rekeysOut uint64
}

// rec is one sealed frame, or control bytes, or a FIN, in order and gapless:
// the map between the inner and the outer stream (T3), and the bytes to resend.
type rec struct {
	o, i       uint64
	oLen, iLen uint32 // a FIN counts as one byte in both
	ref        ref
	off        uint32
	hdr        uint8 // bytes before the first data byte; 0 for control bytes
	fin, psh   bool
}

// piece is plaintext in custody: opened, not yet acknowledged by the inner stack.
type piece struct {
	at   uint64
	ref  ref
	off  uint32
	n    uint32
	urg  uint16 // urgent pointer relative to the piece, 0 for none
	mark uint8
}

// set stores every field. A literal would be made on the stack in small pieces and
// copied in larger ones, which have to wait for the small ones to get to the cache;
// so it is with other structures that packets fill in.
func (p *piece) set(at uint64, r ref, off uint32, n, urg int, mark uint8) {
	p.at, p.ref.kind, p.ref.idx, p.off, p.n, p.urg, p.mark = at, r.kind, r.idx, off, uint32(n), uint16(urg), mark
}

// Marks of received bytes.
const (
	markCE   = 1 << iota // congestion experienced on a segment of the frame
	markPSH              // the segment that completed the frame had PSH
	markLead             // of what the chunk holds nothing before it is in use
)

// oooSeg is an outer segment's payload above a gap.
type oooSeg struct {
	o    uint64
	n    uint32
	ref  ref
	off  uint32
	mark uint8
}

type run struct {
	s, e  uint64
	stamp uint32
}

// backlogged is inner data that came before the bytes it follows.
type backlogged struct {
	i    uint64
	buf  []byte // one byte of headroom, then the data
	gs   int
	flag uint8
	urg  uint16
}

// seqOf returns the sequence number of offset off in a stream with the given
// initial sequence number.
func seqOf(isn uint32, off uint64) uint32 { return isn + 1 + uint32(off) }

// offOf extends a sequence number to the offset nearest to near (T11). The
// result is negative for numbers before the stream's first byte.
func offOf(isn, seq uint32, near uint64) int64 {
	return int64(near) + int64(int32(seq-seqOf(isn, near)))
}

// parted reports whether the outer connection is over, both ways and
// authentically. What is left of the flow is custody that the inner stack has
// not taken: the peer may have forgotten us.
func (f *flow) parted() bool { return f.finTaken && f.finSealed && f.unaO == f.sealO }

// init makes f the flow that the slow path has established.
func (f *flow) init(est *slowpath.Established, now time.Duration) {
	*f = flow{
		key: est.Key, iss: est.ISS, irs: est.IRS, born: now, heapIx: -1,
		sess: est.Session, role: est.Role, tep: est.TEP, aead: est.Session.AEAD(), id: est.Session.ID(),
		active: est.Active, resumed: est.Resumed, unheard: est.Unheard, peerAware: est.PeerAppAware, release: est.Release, rtt: est.RTT,
		tsOK: est.TSOK, sackOK: est.SACKOK, wsOK: est.WScaleOK, ecnOK: est.ECNOK,
		tsLocal: est.TSLocal, tsRemote: est.TSRemote, tsRemoteEcr: est.TSLocal,
		outer: est.OuterTmpl, inner: est.InnerTmpl,
		outMSS: est.PeerMSS, inMSS: int32(est.InnerMSS), meanData: 1400, meanIn: 1400, rcvMSS: 536,
		holdRTO: minRTO, ctlRTO: minRTO, innerRTO: minRTO,
	}
	if est.WScaleOK {
		f.localShift, f.remoteShift = est.LocalWScale, est.RemoteWScale
	}
	if f.tsOK {
		f.inMSS -= 12
	}
	f.inMSS = max(f.inMSS, smallestSegment)
	f.ctlRTO = max(minRTO, 3*est.RTT)
	f.sealO = uint64(len(est.TxInit))
	f.initO = f.sealO
	f.unaO, f.sentO = uint64(est.TxAcked), f.sealO
	f.edgeO = f.unaO + uint64(est.PeerWnd)
	f.txKey = f.sess.SendKey(0)
	f.rxKey = f.sess.RecvKey(0)
	f.nxtO = uint64(est.RxOffset)
	f.ackSentO = f.nxtO
	f.rxEdge = max(uint64(est.RxEdge), f.nxtO)
	f.innerEdge = uint64(est.InnerWnd)
	f.sizeInner(uint32(est.InnerWnd))
	f.innerUp = !est.Active || est.Crossed
	f.wndMaxI = f.releasedWindow()
}

// sizeInner follows a window that the inner stack shows. Segments are no longer
// than half of the largest one, as those of any sender to a small receive buffer
// (RFC 9293 section 3.8.6.2.1): Linux opens its window by as much as the largest
// segment that it saw, and with larger ones than the peer's it would stop at
// windows for which the peer waits.
func (f *flow) sizeInner(wnd uint32) {
	if f.innerWnd > 0 && wnd <= f.innerWnd {
		return
	}
	f.innerWnd = wnd
	f.inSeg = min(f.inMSS, max(int32(wnd/2), smallestSegment))
}

// releasedWindow returns the window in bytes that the inner stack found in the
// end of its handshake.
func (f *flow) releasedWindow() uint64 {
	var s packet.Segment
	switch {
	case packet.Parse(f.release, packet.FromOuter, &s) != nil:
		return 0
	case s.Flags&packet.SYN != 0: // never scaled
		return uint64(s.Wnd)
	}
	return uint64(s.Wnd) << f.remoteShift
}
