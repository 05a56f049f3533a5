package slowpath

import (
	"bytes"
	"errors"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Initial suboption bytes (RFC 8547 section 4.1, table 1).
const (
	enoV    = 0x80 // v bit: suboption data follows
	enoTEP  = 0x20 // the lowest glt that is a TEP identifier
	enoLen  = 0x1f // nnnnn of a length byte, and the global suboption's bits
	enoB    = 0x01 // passive role bit
	enoA    = 0x02 // application-aware bit
	enoHead = 2    // kind and length
)

// Lengths in bytes of the data of a resumption suboption: half an identifier
// and a nonce of 0 to 8 bytes (RFC 8548 section 3.5).
const (
	minResumeData = 9
	maxResumeData = 17
)

// ErrIllFormed: a SYN-form ENO option that RFC 8547 section 4.4 says to
// ignore.
var ErrIllFormed = errors.New("eno: ill-formed option")

// Suboption is an offer to use one TEP.
type Suboption struct {
	TEP  crypto.TEP // identifier without the v bit; it may be unknown
	V    bool       // variable-length data: a resumption suboption
	Data []byte     // what follows a byte with v = 1; points into the option
}

// Byte returns the initial byte of the suboption, the v bit included.
func (s Suboption) Byte() byte {
	if s.V {
		return byte(s.TEP) | enoV
	}
	return byte(s.TEP)
}

// ENO is a SYN-form ENO option (RFC 8547 section 4.1).
type ENO struct {
	Global   byte // the first global suboption, z bits cleared; 0 when there is none
	Explicit bool // the option has a global suboption
	Subs     []Suboption
}

// PassiveRole reports the b bit: the sender plays role B (RFC 8547 section
// 4.3).
func (e *ENO) PassiveRole() bool { return e.Global&enoB != 0 }

// AppAware reports the a bit (RFC 8547 section 4.2).
func (e *ENO) AppAware() bool { return e.Global&enoA != 0 }

// Vacuous reports whether the option has no TEP suboption (RFC 8547 section
// 4.6).
func (e *ENO) Vacuous() bool { return len(e.Subs) == 0 }

// offer returns the only suboption for tep; ok is false when there is none or
// more than one: tcpcrypt defines no repetition (RFC 8547 section 4.5).
func (e *ENO) offer(tep crypto.TEP) (sub Suboption, ok bool) {
	for _, s := range e.Subs {
		if s.TEP == tep {
			if ok {
				return sub, false
			}
			sub, ok = s, true
		}
	}
	return sub, ok
}

// ParseENO decodes a SYN-form ENO option, kind and length included. The
// suboptions' data point into opt. It fails with ErrIllFormed (RFC 8547
// section 4.4).
func ParseENO(opt []byte) (ENO, error) {
	var e ENO
	if len(opt) < enoHead || opt[0] != packet.OptENO || int(opt[1]) != len(opt) {
		return e, ErrIllFormed
	}
	for c := opt[enoHead:]; len(c) > 0; {
		b := c[0]
		c = c[1:]
		glt := b &^ enoV
		switch {
		case b&enoV == 0 && glt < enoTEP:
			// Later bytes of this range may get a meaning one day: only
			// the first one counts.
			if !e.Explicit {
				e.Explicit, e.Global = true, b&(enoA|enoB)
			}
		case b&enoV == 0:
			e.Subs = append(e.Subs, Suboption{TEP: crypto.TEP(glt)})
		case glt < enoTEP:
			n := int(b&enoLen) + 1
			if len(c) < 1+n || c[0] < enoV|enoTEP {
				return e, ErrIllFormed
			}
			e.Subs = append(e.Subs, Suboption{TEP: crypto.TEP(c[0] &^ enoV), V: true, Data: c[1 : 1+n]})
			c = c[1+n:]
		default:
			e.Subs = append(e.Subs, Suboption{TEP: crypto.TEP(glt), V: true, Data: c})
			c = nil
		}
	}
	return e, nil
}

// AppendOffer appends the option of an active opener: fresh key agreement with
// each of teps, and, unless its TEP is 0, the resumption suboption resume, last
// so that it needs no length byte (RFC 8548 section 3.5). global is the global
// suboption; a zero is left out, which says the same (RFC 8547 section 4.2). teps
// are in order of preference, which host B writes down from its end (RFC 8547
// section 4.5).
func AppendOffer(dst []byte, global byte, teps []crypto.TEP, resume Suboption) []byte {
	start := len(dst)
	dst = append(dst, packet.OptENO, 0)
	if global != 0 {
		dst = append(dst, global)
	}
	if global&enoB != 0 {
		teps = slices.Clone(teps)
		slices.Reverse(teps)
	}
	for _, t := range teps {
		if t != resume.TEP {
			dst = append(dst, byte(t))
		}
	}
	if resume.TEP != 0 {
		dst = append(append(dst, resume.Byte()), resume.Data...)
	}
	dst[start+1] = byte(len(dst) - start)
	return dst
}

// AppendAnswer appends the option of a passive opener that chose sub: an
// explicit global suboption with b = 1 and that TEP alone (RFC 8547 sections
// 4.2 and 4.5).
func AppendAnswer(dst []byte, global byte, sub Suboption) []byte {
	dst = append(dst, packet.OptENO, byte(enoHead+2+len(sub.Data)), global|enoB, sub.Byte())
	return append(dst, sub.Data...)
}

// appendNonSYN appends the option of a segment without SYN: its presence is
// all that counts (RFC 8547 section 4.1).
func appendNonSYN(dst []byte) []byte { return append(dst, packet.OptENO, enoHead) }

// Transcript returns host A's option followed by host B's, both as they stood
// in the TCP headers (RFC 8547 section 4.8).
func Transcript(a, b []byte) []byte { return slices.Concat(a, b) }

// ChooseTEP is the negotiation of a passive opener: it picks from the offer of
// the active opener the valid TEP that comes first in prefs (RFC 8547 section
// 4.5). Resumption suboptions count as offers of fresh key agreement, unless
// their data is too long to be one (RFC 8548 section 3.5). When encryption has
// to be disabled, reason is one of the Reason constants.
func ChooseTEP(offer *ENO, prefs []crypto.TEP) (tep crypto.TEP, reason string) {
	if offer.Vacuous() {
		return 0, ReasonVacuous
	}
	if offer.PassiveRole() {
		return 0, ReasonRoleConflict
	}
	for _, t := range prefs {
		if s, ok := offer.offer(t); ok && len(s.Data) <= maxResumeData {
			return t, ""
		}
	}
	return 0, ReasonNoCommonTEP
}

// NegotiatedTEP is the negotiation of the host that plays role A: the last valid
// TEP of answer, the option of host B, that host A offered (RFC 8547 section
// 4.5). A suboption with v = 1 is only valid as the answer to a resumption
// suboption, and with half, the half of its identifier that the answer has to
// name (RFC 8548 section 3.5). When encryption has to be disabled, reason is one
// of the Reason constants.
func NegotiatedTEP(offer, answer *ENO, half []byte) (chosen Suboption, reason string) {
	if answer.Vacuous() {
		return chosen, ReasonVacuous
	}
	if offer.PassiveRole() == answer.PassiveRole() {
		return chosen, ReasonRoleConflict
	}
	for _, s := range slices.Backward(answer.Subs) {
		ours, offered := offer.offer(s.TEP)
		if _, once := answer.offer(s.TEP); !offered || !once {
			continue
		}
		if len(ours.Data) > maxResumeData || s.V && (!ours.V || !isResumption(s) || !bytes.Equal(s.Data[:crypto.ResumeLen], half)) {
			continue
		}
		return s, ""
	}
	return chosen, ReasonNoCommonTEP
}

// isResumption reports whether s has the form of a resumption suboption.
func isResumption(s Suboption) bool {
	return s.V && len(s.Data) >= minResumeData && len(s.Data) <= maxResumeData
}
