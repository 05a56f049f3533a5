package slowpath

import (
	"encoding/binary"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Values of TCP options.
const (
	optMSSLen   = 4
	maxWScale   = 14 // RFC 7323 section 2.3
	defaultMSS4 = 536
	defaultMSS6 = 1220
	exidTFO     = 0xf989 // Fast Open before it had a kind (RFC 7413 section 4.1.1)
	exidENO     = 0x454e // ENO before it had a kind (RFC 8547 section 11)
)

// synOptions is what the options of a SYN or SYN-ACK say. It keeps no
// reference to the segment.
type synOptions struct {
	mss      int // 0 when absent
	wscale   uint8
	hasWS    bool
	sackOK   bool
	ts       bool
	tfo      bool
	conflict bool // MPTCP, TCP-MD5 or TCP-AO: they fail when the payload changes
	legacy   bool // ENO as an experimental option
	enos     int  // number of ENO options
	eno      [packet.MaxOptions]byte
	enoN     int // length in bytes of the first ENO option
}

// option returns the first ENO option, kind and length included.
func (o *synOptions) option() []byte { return o.eno[:o.enoN] }

func readSYNOptions(opts []byte) (o synOptions) {
	// The walk ends at an option that does not fit, as Linux does.
	_ = packet.WalkOptions(opts, func(b []byte) bool {
		switch {
		case b[0] == packet.OptMSS && len(b) == optMSSLen:
			o.mss = int(binary.BigEndian.Uint16(b[2:]))
		case b[0] == packet.OptWScale && len(b) == 3:
			o.wscale, o.hasWS = min(b[2], maxWScale), true
		case b[0] == packet.OptSACKOK && len(b) == 2:
			o.sackOK = true
		case b[0] == packet.OptTimestamp && len(b) == 10:
			o.ts = true
		case isTFO(b):
			o.tfo = true
		case isLegacyENO(b):
			o.legacy = true
		case b[0] == packet.OptMD5 || b[0] == packet.OptAO || b[0] == packet.OptMPTCP:
			o.conflict = true
		case b[0] == packet.OptENO:
			if o.enos == 0 {
				o.enoN = copy(o.eno[:], b)
			}
			o.enos++
		}
		return true
	})
	return o
}

func isTFO(b []byte) bool {
	return b[0] == packet.OptTFO || b[0] == packet.OptExp2 && len(b) >= 4 && binary.BigEndian.Uint16(b[2:]) == exidTFO
}

func isLegacyENO(b []byte) bool {
	return b[0] == packet.OptExp1 && len(b) >= 4 && binary.BigEndian.Uint16(b[2:]) == exidENO
}

// hasENO reports whether the options of a segment without SYN carry ENO.
func hasENO(opts []byte) (found bool) {
	_ = packet.WalkOptions(opts, func(b []byte) bool {
		found = b[0] == packet.OptENO
		return !found
	})
	return found
}

// optionEdit says how to change the options of a handshake segment. ENO
// options of the original are always left out.
type optionEdit struct {
	mss int    // value of the MSS option, which is added when missing; 0: as it is
	tfo bool   // leave Fast Open options out
	eno []byte // ENO option to add at the end; one never stands beside the experimental one (RFC 8547 section 11)
}

// apply returns the edited options, padded to a multiple of 4; ok is false
// when they do not fit into a TCP header. The padding that the sender put
// between its options stays where there is room.
func (e *optionEdit) apply(opts []byte) (edited []byte, ok bool) {
	for _, keepNOPs := range []bool{true, false} {
		b := e.build(opts, keepNOPs)
		if len(b) <= packet.MaxOptions {
			return b, true
		}
	}
	return nil, false
}

func (e *optionEdit) build(opts []byte, keepNOPs bool) []byte {
	b := make([]byte, 0, 2*packet.MaxOptions)
	mss := e.mss
	for len(opts) > 0 && opts[0] != packet.OptEnd {
		if opts[0] == packet.OptNOP {
			if keepNOPs {
				b = append(b, packet.OptNOP)
			}
			opts = opts[1:]
			continue
		}
		if len(opts) < 2 || opts[1] < 2 || int(opts[1]) > len(opts) {
			break
		}
		o := opts[:opts[1]]
		opts = opts[len(o):]
		switch {
		case o[0] == packet.OptENO, e.tfo && isTFO(o), e.eno != nil && isLegacyENO(o):
		case o[0] == packet.OptMSS && len(o) == optMSSLen && e.mss != 0:
			if mss != 0 {
				b = appendMSS(b, mss)
				mss = 0
			}
		default:
			b = append(b, o...)
		}
	}
	// What is left at the end is the padding of options that went away.
	for len(b) > 0 && b[len(b)-1] == packet.OptNOP && !endsInOption(b) {
		b = b[:len(b)-1]
	}
	if mss != 0 {
		b = appendMSS(b, mss)
	}
	b = append(b, e.eno...)
	for len(b)%4 != 0 {
		b = append(b, packet.OptNOP)
	}
	return b
}

// endsInOption reports whether the last byte of b belongs to an option, even
// though it looks like a NOP.
func endsInOption(b []byte) bool {
	for len(b) > 0 {
		if b[0] == packet.OptNOP {
			b = b[1:]
			continue
		}
		if int(b[1]) == len(b) {
			return true
		}
		b = b[b[1]:]
	}
	return false
}

func appendMSS(b []byte, mss int) []byte {
	return binary.BigEndian.AppendUint16(append(b, packet.OptMSS, optMSSLen), uint16(mss))
}
