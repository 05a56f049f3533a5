package peer

import (
	"bytes"
	"errors"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// Reasons why a connection is plain TCP (Report.PlainReason).
var (
	ErrENOOff        = errors.New("peer: ENO switched off")
	ErrNoENO         = errors.New("peer: the other SYN carried no ENO option, or several")
	ErrENOIllFormed  = errors.New("peer: the other ENO option is ill-formed")
	ErrNoTEP         = errors.New("peer: no valid TEP in common")
	ErrSameRole      = errors.New("peer: both sides set the same b bit")
	ErrNoENOInACK    = errors.New("peer: the first ACK carried no ENO option")
	errNotNegotiated = errors.New("peer: not negotiated")
)

// Global suboption bits (RFC 8547 section 4.2).
const (
	globalB = 1
	globalA = 2
)

// Suboption is a TEP suboption (RFC 8547 section 4.1).
type Suboption struct {
	TEP  crypto.TEP
	Data []byte // nil: v = 0
}

// option is a parsed SYN-form ENO option.
type option struct {
	global byte
	subs   []Suboption
}

// BuildENO makes a SYN-form ENO option, with kind and length. global is left out
// when it is negative. A suboption with data that is not the last gets a length
// byte (RFC 8547 section 4.4).
func BuildENO(global int, subs ...Suboption) []byte {
	o := []byte{frame.OptENO, 0}
	if global >= 0 {
		o = append(o, byte(global))
	}
	for i, s := range subs {
		if s.Data == nil {
			o = append(o, byte(s.TEP))
			continue
		}
		if i < len(subs)-1 {
			o = append(o, 0x80|byte(len(s.Data)-1))
		}
		o = append(o, 0x80|byte(s.TEP))
		o = append(o, s.Data...)
	}
	o[1] = byte(len(o))
	return o
}

// parseENO parses the contents of a SYN-form option.
func parseENO(c []byte) (o option, err error) {
	globals := 0
	for len(c) > 0 {
		b := c[0]
		glt := b & 0x7f
		switch {
		case b < 0x20:
			if globals++; globals == 1 {
				o.global = b
			}
			c = c[1:]
		case b < 0x80:
			o.subs = append(o.subs, Suboption{TEP: crypto.TEP(glt)})
			c = c[1:]
		case b < 0xa0:
			n := int(b&0x1f) + 1
			if len(c) < 2+n || c[1] < 0xa0 {
				return o, ErrENOIllFormed
			}
			o.subs = append(o.subs, Suboption{crypto.TEP(c[1] & 0x7f), bytes.Clone(c[2 : 2+n])})
			c = c[2+n:]
		default:
			o.subs = append(o.subs, Suboption{crypto.TEP(glt), append([]byte{}, c[1:]...)})
			c = nil
		}
	}
	return o, nil
}

func (o *option) find(t crypto.TEP) (s Suboption, times int) {
	for _, x := range o.subs {
		if x.TEP == t {
			s = x
			times++
		}
	}
	return s, times
}

// Ticket is what resumes a session (RFC 8548 section 3.5). It serves for one
// connection.
type Ticket struct {
	Secret   *crypto.Secret
	TEP      crypto.TEP
	AEAD     crypto.AEAD
	OrigRole crypto.Role
}

// named reports whether the other side's suboption data names the ticket.
func (t *Ticket) named(tep crypto.TEP, data []byte) bool {
	if t.TEP != tep || len(data) < crypto.ResumeLen || len(data) > crypto.ResumeLen+crypto.MaxResumeNonce {
		return false
	}
	half := t.Secret.ResumeHalf(t.OrigRole.Peer())
	return bytes.Equal(half[:], data[:crypto.ResumeLen])
}

// data returns the suboption data that proposes or accepts the ticket.
func (t *Ticket) data(nonce []byte) []byte {
	half := t.Secret.ResumeHalf(t.OrigRole)
	return append(half[:], nonce...)
}

// sn returns the session nonce from the suboption data of both sides.
func (t *Ticket) sn(own, other []byte) []byte {
	a, b := own[crypto.ResumeLen:], other[crypto.ResumeLen:]
	if t.OrigRole == crypto.RoleB {
		a, b = b, a
	}
	return append(bytes.Clone(a), b...)
}

// agreement is what both options amount to.
type agreement struct {
	tep      crypto.TEP
	tepByte  byte // as B sent it
	ticket   *Ticket
	own, his []byte // suboption data in a resumption
}

// agree finds the negotiated TEP as host A, from its own option and B's (RFC
// 8547 section 4.5).
func agree(mine, his *option, tickets []*Ticket) (agreement, error) {
	if mine.global&globalB == his.global&globalB {
		return agreement{}, ErrSameRole
	}
	for _, s := range slices.Backward(his.subs) {
		own, n := mine.find(s.TEP)
		if _, m := his.find(s.TEP); n != 1 || m != 1 || !s.TEP.Valid() {
			continue
		}
		if s.Data == nil {
			return agreement{tep: s.TEP, tepByte: byte(s.TEP)}, nil
		}
		for _, t := range tickets {
			if own.Data != nil && t.named(s.TEP, s.Data) {
				return agreement{s.TEP, 0x80 | byte(s.TEP), t, own.Data, s.Data}, nil
			}
		}
	}
	return agreement{}, ErrNoTEP
}

// choose makes host B's choice from A's option: a resumption that a ticket
// allows, else the first TEP of the preferences.
func choose(his *option, prefs []crypto.TEP, tickets []*Ticket, nonce []byte) (agreement, error) {
	if his.global&globalB != 0 {
		return agreement{}, ErrSameRole
	}
	for _, tep := range prefs {
		s, n := his.find(tep)
		if n != 1 {
			continue
		}
		for _, t := range tickets {
			if t.named(tep, s.Data) {
				return agreement{tep, 0x80 | byte(tep), t, t.data(nonce), s.Data}, nil
			}
		}
	}
	for _, tep := range prefs {
		if s, n := his.find(tep); n == 1 && len(s.Data) <= crypto.ResumeLen+crypto.MaxResumeNonce {
			return agreement{tep: tep, tepByte: byte(tep)}, nil
		}
	}
	return agreement{}, ErrNoTEP
}
