package peer

import (
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

var noDeadline time.Time

const (
	neighbourRetry = 200 * time.Millisecond
	maxRTO         = 2 * time.Second
	maxRetries     = 12
)

// Config says how a connection behaves. The zero value follows the rules: X25519,
// all AEADs, frames as large as a segment, one frame a segment.
type Config struct {
	LocalPort uint16 // of an active opener; 0: one that is free

	// ENO (RFC 8547).
	NoENO     bool
	TEPs      []crypto.TEP // offered, or in order of preference; default X25519
	Option    []byte       // sent in the SYN or SYN-ACK in place of the right one, with kind and length
	OmitACK   bool         // active: no ENO option in non-SYN segments
	ActiveB   bool         // active: set the b bit
	Tickets   []*Ticket    // active: the first is proposed; passive: accepted if proposed
	NonceLen  int          // bytes of resumption nonce, 0 to 8; default 8, -1 for none
	Require   bool         // abort rather than go on as plain TCP
	NoSession bool         // stop after ENO: send no Init message and ignore what comes

	// Key exchange (RFC 8548 section 3.3).
	AEADs     []crypto.AEAD            // offered, or in order of preference; default all
	Cipher    crypto.AEAD              // passive: choose this one, offered or not
	InitSplit []int                    // segment sizes of the Init message, the last repeats; default as ordinary data
	Trailing  int                      // bytes that follow the fields inside the Init message, to be ignored
	Piggyback bool                     // active: Init1, or the first frames, in the third ACK
	Mutate    func(init []byte) []byte // replaces the Init message

	// Frames (RFC 8548 section 4.2).
	FrameSize   int  // data bytes of frames that Write makes, 1 to 65518; default what fits a segment
	FrameRandom bool // random sizes from 1 to FrameSize
	NoRekey     bool // leave the other side's rekeying unanswered
	KeepOpen    bool // do not abort after an error in what is received

	// TCP.
	MSS           int             // announced, and the most that is sent; default what the MTU allows
	SegmentSize   int             // data bytes a segment; default MSS
	SegmentRandom bool            // random sizes from 1 to SegmentSize
	Align         bool            // a segment does not go beyond the end of a frame
	Resegment     bool            // retransmissions have random boundaries
	Window        int             // receive window in bytes, default 1 MiB
	NoScale       bool            // no window scale option
	Timestamps    bool            // RFC 7323
	Options       []byte          // further options of the SYN or SYN-ACK
	Flight        int             // most bytes sent and not acknowledged, default 256 KiB
	RTO           time.Duration   // initial retransmission time-out, default 200 ms
	OnSend        func(*Out) bool // sees each segment before it leaves, may change it; false loses it
	OnReceive     func(*In) bool  // sees each segment that came in; false loses it
}

// Out is a segment about to be sent.
type Out struct {
	*frame.Segment
	Offset int  // of its first byte in the stream, 0 is the first after the SYN
	Again  bool // some of it was sent before
}

// In is a segment that came in.
type In struct {
	*frame.Info
	Frame []byte // valid during the call
}

func (c *Config) setDefaults(mtu int, v6 bool) {
	headers := frame.IPv4Len + frame.TCPLen
	if v6 {
		headers = frame.IPv6Len + frame.TCPLen
	}
	if c.MSS == 0 {
		c.MSS = mtu - headers
	}
	if c.TEPs == nil {
		c.TEPs = []crypto.TEP{crypto.TEPX25519}
	}
	if c.AEADs == nil {
		c.AEADs = crypto.AllAEADs
	}
	if c.NonceLen == 0 {
		c.NonceLen = crypto.MaxResumeNonce
	}
	c.NonceLen = max(c.NonceLen, 0)
	if c.SegmentSize == 0 {
		c.SegmentSize = c.MSS
	}
	if c.Window == 0 {
		c.Window = 1 << 20
	}
	if c.Flight == 0 {
		c.Flight = 256 << 10
	}
	if c.RTO == 0 {
		c.RTO = 200 * time.Millisecond
	}
}
