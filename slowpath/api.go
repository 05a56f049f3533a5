// Package slowpath negotiates TCP-ENO (RFC 8547) and agrees on tcpcrypt keys
// (RFC 8548 section 3.3) for connections that are being opened. It is sans-I/O:
// a Machine takes segments, time and randomness, and returns Actions.
//
// A connection is here from its SYN until it is either encrypted, and handed
// to the fast path once by an Install action, or plain TCP, and the kernel's
// own again.
package slowpath

import (
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// ActionKind says what an Action asks for.
type ActionKind uint8

const (
	// SendOuter transmits Frame on the wire.
	SendOuter ActionKind = iota
	// SendInner injects Frame into the local stack.
	SendInner
	// Divert inserts Key into the diversion map, so that later segments of
	// the flow come to the daemon from both sides (T17).
	Divert
	// Undivert removes Key from the diversion map, and from the guard's before
	// that: the flow is the kernel's.
	Undivert
	// Guard lists Key in the guard: a SYN-ACK leaves that lets the peer turn
	// encryption on at once, and what it sends must not reach the inner stack,
	// which completes its handshake by itself if this process dies (T22).
	Guard
	// Unguard removes Key from the guard: the connection will be plain, however
	// its answer comes. It stays diverted until that is seen.
	Unguard
	// Install hands Est to the fast path. It comes before the SendInner that
	// lets the inner stack see the end of its handshake, and the guard entry
	// of the flow, if Guard did not make it, must be in place before that one
	// too (T22).
	Install
	// Reinject gives Frame, which arrived here after Install, to the fast path.
	Reinject
	// Report announces that the flow Key has reached Info.State.
	Report
	// Agree hands out Job, to be run anywhere and given to Machine.Agreed.
	Agree
)

// Action is one thing that the caller has to do. Actions are carried out in
// the order in which they were returned.
type Action struct {
	Kind  ActionKind
	Dir   packet.Direction // Reinject: where Frame came from
	Key   packet.Key
	Frame []byte // owned by the receiver of the action; checksums: see Machine
	Est   *Established
	Info  Info // Report
	Job   *Job // Agree
}

// State is the state of a flow as `tcpcrypt flows` names it.
type State string

// The states of design section 9.
const (
	StateOffered     State = "offered"
	StateNegotiating State = "negotiating"
	StateEncrypted   State = "encrypted"
	StatePlain       State = "plain"
	StateClosing     State = "closing"
	StateFailed      State = "failed"
)

// Info describes a flow for people.
type Info struct {
	Key    packet.Key
	State  State
	Reason string // why it is plain or failed, one of the Reason constants
	Role   crypto.Role
	TEP    crypto.TEP // 0 when not negotiated
	Since  time.Duration
}

// Reasons of plain and failed flows.
const (
	ReasonPeerNoENO       = "peer-no-eno"       // the SYN-ACK carried no ENO option
	ReasonDuplicateENO    = "duplicate-eno"     // two ENO options in one SYN (ENO 4.1)
	ReasonIllFormed       = "eno-ill-formed"    // ENO 4.4
	ReasonVacuous         = "eno-vacuous"       // ENO 4.6
	ReasonNoCommonTEP     = "no-common-tep"     // ENO 4.5
	ReasonRoleConflict    = "role-conflict"     // same b bits (ENO 4.3)
	ReasonNoENOInAck      = "no-eno-in-ack"     // first ACK without ENO (ENO 4.6)
	ReasonNoRoom          = "no-option-room"    // the 40 option bytes are full
	ReasonOptionConflict  = "option-conflict"   // TFO, MPTCP, MD5 or AO in the SYN
	ReasonSYNData         = "syn-data"          // data in the SYN
	ReasonPolicy          = "policy"            // port not selected or excluded
	ReasonRemembered      = "peer-remembered"   // ENO failed with this peer a while ago
	ReasonSYNRetries      = "syn-retries"       // third copy of the SYN goes without ENO (T19)
	ReasonSimultaneous    = "simultaneous-open" // both SYNs crossed
	ReasonLimit           = "half-open-limit"   // no room for another half-open flow
	ReasonFlows           = "flow-limit"        // no room for another flow
	ReasonMemory          = "memory-limit"      // nearly all memory for packets is in use
	ReasonRefused         = "refused"           // RST during the handshake
	ReasonTimeout         = "exchange-timeout"  // deadline of the key exchange (T19)
	ReasonBadMagic        = "bad-magic"
	ReasonBadInit         = "bad-init"             // impossible message_len
	ReasonBadKey          = "bad-key"              // key validation failed (TC 5)
	ReasonNoCommonCipher  = "no-common-cipher"     // B supports none of A's AEADs
	ReasonCipherUnoffered = "cipher-not-offered"   // B chose what A did not offer
	ReasonRequired        = "encryption-required"  // plain refused by --require
	ReasonUnsupported     = "unsupported-datalink" // frames the translator cannot carry
	ReasonNoAnswer        = "no-answer"            // one side fell silent in the TCP handshake
	ReasonUnreachable     = "unreachable"          // the same, after an ICMP error
	ReasonTruncated       = "truncated"            // FIN before the end of the Init message
	ReasonNoRandom        = "no-randomness"        // the source of keys and nonces failed
	ReasonOverload        = "overload"             // nobody found the time to compute the key agreement
	ReasonNotAppAware     = "not-app-aware"        // mandatory application-aware mode, and the peer is not (ENO 4.2)
)

// Config is the policy of a Machine. It is read only after New.
type Config struct {
	TEPs  []crypto.TEP  // in order of preference, as A and as B
	AEADs []crypto.AEAD // in order of preference, as A and as B

	// Policy returns what to do with a flow whose SYN came from dir; nil
	// encrypts every flow where the peer can.
	Policy func(k *packet.Key, dir packet.Direction) Policy
	// Cache keeps session secrets; nil: no session is resumed.
	Cache *Cache
	// ResumeNonce is the length in bytes of the nonces in resumption
	// suboptions, 0 to 8. Less than 8 is for hosts that can rule out that
	// their memory is ever restored or cloned (RFC 8548 section 3.5).
	ResumeNonce int
	// Orphan reports whether the socket of an encrypted connection that has ended
	// may still be there: what it sends is plaintext of that, and must not leave.
	// nil: any may be.
	Orphan func(packet.Key) bool
	// Room returns why no flow can be begun, or "" if one can; nil: there is
	// always room.
	Room func() (reason string)
	// Offload reports whether the key agreement of a TEP is not computed inside
	// Input but handed out as a Job; nil: none is.
	Offload     func(crypto.TEP) bool
	MTU         int // IP MTU of the outer interface, bytes
	MaxHalfOpen int // most flows negotiated at a time, default 16384; SYNs from the wire may make a quarter
	// Deadline of a key exchange whose peer says nothing more, default 3 s (T19).
	// While segments of it come it gets more time.
	Deadline    time.Duration
	RememberFor time.Duration // how long a failing peer is not offered ENO, default 60 s
	// RememberPlainFor is how long a peer that answered without a usable ENO
	// option is not offered ENO; 0: every connection tries again.
	RememberPlainFor time.Duration
	TombstoneFor     time.Duration // how long stragglers of a decided flow are passed on, default 5 s
	// Limiter bounds costly key agreements of all Machines that share it; nil:
	// the Machine has one of its own.
	Limiter *Limiter
	// Forgotten, if not nil, is called when the Machine no longer remembers
	// what became of a flow, which may be beginning anew: see Machine.Knows.
	Forgotten func(k packet.Key)
}

// Verdict is what a Policy wants of a flow.
type Verdict uint8

// The verdicts.
const (
	Encrypt Verdict = iota // where the peer can
	Require                // or not at all: a flow that would be plain is refused
	Plain                  // never
)

// AppAware is what is known of the application's use of the session ID (RFC
// 8547 section 4.2).
type AppAware uint8

// The application-aware modes.
const (
	AppAwareOff       AppAware = iota // a = 0
	AppAwareOn                        // a = 1
	AppAwareMandatory                 // a = 1, and encryption only if the peer's is 1, too
)

// Policy is what to do with one flow.
type Policy struct {
	Verdict Verdict
	// NoResume ignores resumption requests and makes none, NoCache keeps no
	// session secret (RFC 8548 section 3.5).
	NoResume, NoCache bool
	// PassiveRole sets b = 1 on active opens, which one of two hosts needs
	// that open a connection simultaneously (RFC 8547 section 4.3).
	PassiveRole bool
	AppAware    AppAware
}

// global returns the bits of the global suboption of an active opener.
func (p *Policy) global() (g byte) {
	if p.PassiveRole {
		g |= enoB
	}
	return g | p.aware()
}

// aware returns the a bit.
func (p *Policy) aware() byte {
	if p.AppAware != AppAwareOff {
		return enoA
	}
	return 0
}

// Established is everything the fast path needs to take over a flow. All
// offsets count bytes of a stream from 0, the first byte after the SYN.
type Established struct {
	Key     packet.Key
	Session *crypto.Session // keys of both directions; owned by the fast path from here on
	Role    crypto.Role     // ENO role, A or B
	TEP     crypto.TEP
	Active  bool // the local stack opened the connection
	// Crossed: so did the peer's. The local stack is in SYN-RECEIVED: it takes
	// data, and does not answer the end of its handshake.
	Crossed bool
	// PeerAppAware is the a bit that the peer sent (RFC 8547 section 4.2).
	PeerAppAware bool
	Resumed      bool // the keys go by the role of the original session, see crypto.Session.Role
	// Unheard: no segment without SYN came from the peer, so every segment to
	// it has to carry a non-SYN-form ENO option until one does (RFC 8547
	// section 4.6).
	Unheard bool

	ISS, IRS uint32 // initial sequence numbers, local and remote; the same on both sides of the daemon

	// TCP parameters.
	PeerMSS      int   // most payload+options bytes the peer takes in a segment (its MSS option, at most what Config.MTU allows)
	InnerMSS     int   // the same for the inner stack (the MSS it announced)
	WScaleOK     bool  // both SYNs carried a window scale
	LocalWScale  uint8 // shift of windows announced by the inner stack
	RemoteWScale uint8 // shift of windows announced by the peer
	SACKOK       bool
	TSOK         bool
	ECNOK        bool
	TSLocal      uint32 // newest TSval of the inner stack
	TSRemote     uint32 // newest TSval of the peer

	// Sending: TxInit is what this side has sent outward so far, its Init
	// message. The peer acknowledged TxAcked bytes of it; the fast path
	// keeps and resends the rest.
	TxInit  []byte
	TxAcked int
	PeerWnd int // peer's newest window in bytes, already scaled, counted from TxAcked

	// Receiving: RxOffset outer bytes are consumed (the peer's Init message
	// with any ignored trailing bytes); RxPending follows them in order and
	// is already acknowledged or about to be.
	RxOffset  int
	RxPending []byte
	RxEdge    int // right edge of the window announced outward so far, outer offset

	InnerWnd int // window of the inner stack in bytes as it stood in its SYN or SYN-ACK

	OuterTmpl packet.Template // headers of packets to the wire
	InnerTmpl packet.Template // headers of packets to the inner stack

	// Release is the segment that ends the inner handshake: the SYN-ACK for
	// an active opener, the final ACK for a passive one and after a
	// simultaneous open. The slow path sends it once, the fast path again
	// when the inner stack asks (T18).
	Release []byte

	RTT time.Duration // of the handshake, 0 when not measured
}
