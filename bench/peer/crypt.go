package peer

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// Reasons why a connection was aborted here (Report.Err), besides the errors of
// package crypto.
var (
	ErrAuth           = errors.New("peer: a frame is not authentic")
	ErrFINWithoutFINp = errors.New("peer: FIN without FINp")
	ErrAfterFINp      = errors.New("peer: bytes after FINp")
	ErrRequired       = errors.New("peer: encryption required")
)

// crypt is the part of a Conn that does ENO and tcpcrypt.
type crypt struct {
	eno struct {
		offered  bool // our SYN carries an option
		mine     option
		agreed   *agreement
		sentACK  bool
		gotACK   bool
		disabled bool
	}
	role           crypto.Role
	enabled        bool // encryption is enabled; nothing plain from here on
	decided        bool // plain or keys there
	key            *crypto.PrivateKey
	ownInit, other []byte // Init messages
	nonceA         []byte
	session        *crypto.Session
	ticket         *Ticket // for the next connection
	consumed       int     // bytes of in that were processed
	genIn, genOut  uint32
	rekeyDue       bool // the next frame must have rekey = 1
	finpIn         bool
	finpOut        bool
	plain          []byte
	scratch        []byte
}

// Report is what a connection experienced.
type Report struct {
	Encrypted   bool
	PlainReason error // why not encrypted
	Err         error // why the connection was aborted or died; nil while open and after FIN on both sides
	Closed      bool

	ENOLocal, ENORemote []byte // options of the SYNs, with kind and length
	Role                crypto.Role
	TEP                 crypto.TEP
	AEAD                crypto.AEAD
	Resumed             bool
	SessionID           [crypto.SessionIDLen]byte

	Received []byte // opened plaintext, or the stream of a plain connection
	FINp     bool   // authentic end
	FIN      bool   // FIN seen
	RST      bool   // acceptable RST seen
	// RSTOffset is the offset at which an RST, acceptable or not, stood in the
	// other side's stream.
	RSTOffset int

	StreamIn, StreamOut  int // bytes of the TCP streams
	FramesIn, FramesOut  int
	EmptyIn, MaxFrameIn  int // frames without data; data bytes of the largest
	RekeysIn             int
	GenIn, GenOut        uint32
	Urgent               []int // positions of last urgent bytes in Received, one for each frame with URGp
	Retransmits, PeerMSS int
	// Anomalies counts rules that the other side broke, by name.
	Anomalies map[string]int

	scaleSeen bool
	initIn    int // length of the other side's Init message
}

// Report returns the state of the connection. Its slices and maps are copies.
func (c *Conn) Report() Report {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	r := c.report
	r.Encrypted = c.session != nil
	r.Closed, r.Err = c.state == stateClosed, c.err
	r.Received = bytes.Clone(c.plain)
	r.FINp = c.finpIn
	r.StreamIn, r.StreamOut = len(c.in), len(c.out)
	r.GenIn, r.GenOut = c.genIn, c.genOut
	r.Role = c.role
	r.Urgent = append([]int(nil), r.Urgent...)
	r.Anomalies = map[string]int{}
	for k, v := range c.report.Anomalies {
		r.Anomalies[k] = v
	}
	return r
}

// Ticket returns what resumes the connection's session, nil while there are no
// keys. It is good for one more connection.
func (c *Conn) Ticket() *Ticket {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	return c.ticket
}

func enoOptions(opts []byte) (all [][]byte) {
	frame.EachOption(opts, func(o frame.Option) bool {
		if o.Kind == frame.OptENO {
			all = append(all, bytes.Clone(opts[o.At:o.At+o.Len]))
		}
		return true
	})
	return all
}

// remoteOption takes the ENO option of the other SYN; more than one counts as
// none (RFC 8547 section 4.1).
func (c *Conn) remoteOption(opts []byte) (option, error) {
	all := enoOptions(opts)
	if len(all) > 0 {
		c.report.ENORemote = all[0]
	}
	if len(all) > 1 {
		c.anomaly("duplicate_eno_in_syn")
	}
	if len(all) != 1 {
		return option{}, ErrNoENO
	}
	return parseENO(all[0][2:])
}

func (c *Conn) nonce() []byte {
	b := make([]byte, c.cfg.NonceLen)
	_, _ = rand.Read(b)
	return b
}

// startENO makes the option of an active opener's SYN.
func (c *Conn) startENO() {
	if c.cfg.NoENO {
		c.goPlain(ErrENOOff)
		return
	}
	c.eno.offered = true
	var subs []Suboption
	for _, t := range c.cfg.TEPs {
		subs = append(subs, Suboption{TEP: t})
	}
	if len(c.cfg.Tickets) > 0 {
		t := c.cfg.Tickets[0]
		s := Suboption{t.TEP, t.data(c.nonce())}
		kept := subs[:0]
		for _, x := range subs {
			if x.TEP != t.TEP {
				kept = append(kept, x)
			}
		}
		subs = append(kept, s)
	}
	global := -1
	if c.cfg.ActiveB {
		c.role = crypto.RoleB
		global = globalB
	}
	c.setOption(BuildENO(global, subs...))
}

// setOption records our SYN-form option, or the one that the test wants.
func (c *Conn) setOption(o []byte) {
	if c.cfg.Option != nil {
		o = c.cfg.Option
	}
	c.report.ENOLocal = bytes.Clone(o)
	if len(o) >= 2 {
		c.eno.mine, _ = parseENO(o[2:])
	}
}

// answerENO decides about a SYN as passive opener.
func (c *Conn) answerENO(opts []byte) {
	c.role = crypto.RoleB
	if c.cfg.NoENO {
		c.goPlain(ErrENOOff)
		return
	}
	his, err := c.remoteOption(opts)
	if err == nil {
		var a agreement
		if a, err = choose(&his, c.cfg.TEPs, c.cfg.Tickets, c.nonce()); err == nil {
			c.eno.agreed = &a
			c.eno.offered = true
			c.setOption(BuildENO(globalB, Suboption{a.tep, a.own}))
			c.report.TEP = a.tep
			return
		}
	}
	if c.cfg.Option != nil {
		c.eno.offered = true
		c.setOption(nil)
	}
	c.goPlain(err)
}

// finishENO decides about a SYN-ACK as active opener.
func (c *Conn) finishENO(opts []byte) {
	if c.decided {
		return
	}
	his, err := c.remoteOption(opts)
	if err == nil {
		var a agreement
		if a, err = agree(&c.eno.mine, &his, c.cfg.Tickets); err == nil {
			c.eno.agreed = &a
			c.eno.gotACK = true
			c.report.TEP = a.tep
			if c.cfg.OmitACK {
				c.goPlain(ErrNoENOInACK)
				return
			}
			c.maybeEnable()
			return
		}
	}
	c.goPlain(err)
}

// enoACK adds the option of non-SYN segments, which they carry until one is
// received (RFC 8547 section 4.6).
func (c *Conn) enoACK(opts []byte) []byte {
	if c.eno.agreed == nil || c.eno.disabled || c.nonSYN || c.passive || c.cfg.OmitACK {
		return opts
	}
	c.eno.sentACK = true
	return append(opts, frame.OptENO, 2)
}

// firstNonSYN looks for ENO in the first segments behind the SYNs.
func (c *Conn) firstNonSYN(x *frame.Info, b []byte) {
	all := enoOptions(x.Options(b))
	if len(all) > 1 || len(all) == 1 && len(all[0]) != 2 {
		c.anomaly("nonsyn_eno_not_empty")
	}
	if c.nonSYN {
		return
	}
	c.nonSYN = true
	if !c.passive || c.decided || c.eno.agreed == nil {
		return
	}
	if len(all) == 0 {
		c.anomaly("eno_missing_third_ack")
		c.goPlain(ErrNoENOInACK)
		return
	}
	c.eno.gotACK = true
}

// goPlain ends the negotiation without encryption.
func (c *Conn) goPlain(reason error) {
	c.eno.disabled, c.decided = true, true
	c.eno.agreed = nil
	c.report.PlainReason = reason
	if c.cfg.Require && c.state != stateSYNSent {
		c.reset(fmt.Errorf("%w: %w", ErrRequired, reason))
	}
	c.notify()
}

// maybeEnable enables encryption when an ACK with ENO went both ways. For the
// active opener its own is about to leave.
func (c *Conn) maybeEnable() {
	if c.enabled || c.decided || c.eno.agreed == nil || !c.eno.gotACK || c.state != stateEstablished {
		return
	}
	c.enabled = true
	if c.cfg.NoSession {
		return
	}
	a := c.eno.agreed
	if t := a.ticket; t != nil {
		c.report.AEAD, c.report.Resumed = t.AEAD, true
		c.ready(crypto.NewResumedSession(t.OrigRole, t.AEAD, a.tepByte, t.Secret, t.sn(a.own, a.his)), t.OrigRole)
		return
	}
	if c.role == crypto.RoleA {
		c.sendInit(c.makeInit1)
	}
}

// sendInit makes and sends the own Init message.
func (c *Conn) sendInit(build func() ([]byte, error)) {
	m, err := build()
	if err != nil {
		c.reset(err)
		return
	}
	if n := c.cfg.Trailing; n > 0 {
		m = append(m, bytes.Repeat([]byte{0xee}, n)...)
		binary.BigEndian.PutUint32(m[4:], uint32(len(m)))
	}
	if c.cfg.Mutate != nil {
		m = c.cfg.Mutate(m)
	}
	c.ownInit = m
	c.inits = len(m)
	c.out = append(c.out, m...)
	c.frameTo = append(c.frameTo, len(c.out))
}

func (c *Conn) makeInit1() ([]byte, error) {
	var err error
	if c.key, err = crypto.GenerateKey(c.eno.agreed.tep, rand.Reader); err != nil {
		return nil, err
	}
	m := crypto.Init1{Ciphers: c.cfg.AEADs, Pub: c.key.Public(false)}
	_, _ = rand.Read(m.Nonce[:])
	c.nonceA = m.Nonce[:]
	return m.Append(nil), nil
}

// ready takes a session into use.
func (c *Conn) ready(s *crypto.Session, orig crypto.Role) {
	c.session = s
	c.decided = true
	c.report.SessionID = s.ID()
	c.ticket = &Ticket{s.NextSecret(), c.eno.agreed.tep, s.AEAD(), orig}
	c.notify()
}

// process works on what has arrived in order.
func (c *Conn) process() {
	if c.state == stateClosed && c.err != nil {
		return
	}
	if !c.enabled {
		if c.decided {
			c.plain = append(c.plain, c.in[c.consumed:]...)
			c.consumed = len(c.in)
			c.notify()
		}
		return
	}
	if c.cfg.NoSession {
		return
	}
	if err := c.advance(); err != nil {
		c.notify()
		if c.cfg.KeepOpen {
			c.err = err
			return
		}
		c.reset(err)
	}
	c.pump()
}

func (c *Conn) advance() error {
	if c.session == nil {
		if done, err := c.keyExchange(); err != nil || !done {
			return err
		}
	}
	for {
		rest := c.in[c.consumed:]
		if len(rest) == 0 {
			return nil
		}
		if c.finpIn {
			return ErrAfterFINp
		}
		n, err := crypto.FrameLen(rest)
		if err != nil {
			return err
		}
		if n == 0 || len(rest) < n {
			return nil
		}
		if err := c.open(rest[:n]); err != nil {
			return err
		}
		c.consumed += n
	}
}

// keyExchange waits for the other side's Init message and finishes the session.
func (c *Conn) keyExchange() (bool, error) {
	if c.other != nil {
		// The test chose a cipher that cannot be used: there are no keys.
		return false, nil
	}
	magic := uint32(crypto.Init2Magic)
	if c.role == crypto.RoleB {
		magic = crypto.Init1Magic
	}
	n, err := crypto.InitLen(c.in, magic)
	if err != nil || n == 0 || len(c.in) < n {
		return false, err
	}
	if !slices.ContainsFunc(c.pushed, func(s [2]int) bool { return s[0] < n && n <= s[1] }) {
		c.anomaly("psh_missing_at_init_end")
	}
	c.report.initIn, c.consumed = n, n
	c.other = bytes.Clone(c.in[:n])
	a := c.eno.agreed
	var es, init1, init2 []byte
	if c.role == crypto.RoleB {
		m, err := crypto.ParseInit1(a.tep, c.other)
		if err != nil {
			return false, err
		}
		if len(m.Append(nil)) != n {
			c.anomaly("init_trailing_bytes")
		}
		aead, ok := crypto.ChooseCipher(c.cfg.AEADs, m.Ciphers)
		if c.cfg.Cipher != 0 {
			aead, ok = c.cfg.Cipher, true
		}
		if !ok {
			return false, crypto.ErrNoCipher
		}
		if c.key, err = crypto.GenerateKey(a.tep, rand.Reader); err != nil {
			return false, err
		}
		var short bool
		if es, short, err = c.key.Shared(m.Pub); err != nil {
			return false, err
		}
		c.report.AEAD = aead
		c.nonceA = m.Nonce[:]
		c.sendInit(func() ([]byte, error) {
			r := crypto.Init2{Cipher: aead, Pub: c.key.Public(short)}
			_, _ = rand.Read(r.Nonce[:])
			return r.Append(nil), nil
		})
		init1, init2 = c.other, c.ownInit
	} else {
		m, err := crypto.ParseInit2(a.tep, c.other)
		if err != nil {
			return false, err
		}
		if len(m.Append(nil)) != n {
			c.anomaly("init_trailing_bytes")
		}
		if err := crypto.CheckCipher(m.Cipher, c.cfg.AEADs); err != nil {
			return false, err
		}
		if es, _, err = c.key.Shared(m.Pub); err != nil {
			return false, err
		}
		c.report.AEAD = m.Cipher
		init1, init2 = c.ownInit, c.other
	}
	c.key.Erase()
	if !c.report.AEAD.Valid() {
		return false, nil
	}
	enoA, enoB := c.report.ENOLocal, c.report.ENORemote
	if c.role == crypto.RoleB {
		enoA, enoB = enoB, enoA
	}
	transcript := append(bytes.Clone(enoA), enoB...)
	c.ready(crypto.NewSession(c.role, c.report.AEAD, a.tepByte, transcript, init1, init2, c.nonceA, es), c.role)
	return true, nil
}

// open opens one frame at c.consumed.
func (c *Conn) open(b []byte) error {
	control := b[0]
	if control&^crypto.ControlRekey != 0 {
		c.anomaly("cres_nonzero")
	}
	gen := c.genIn
	if control&crypto.ControlRekey != 0 {
		gen++
	}
	k := c.session.RecvKey(gen)
	if k == nil {
		return ErrAuth
	}
	c.scratch = append(c.scratch[:0], b...)
	p, ok := k.Open(c.scratch, uint64(c.consumed))
	if !ok {
		return fmt.Errorf("%w: offset %d, generation %d", ErrAuth, c.consumed, gen)
	}
	flags, urgent, data, err := crypto.ParsePlain(p)
	if err != nil {
		return err
	}
	if flags&^(crypto.FlagFIN|crypto.FlagURG) != 0 {
		c.anomaly("fres_nonzero")
	}
	if flags&crypto.FlagURG != 0 {
		c.report.Urgent = append(c.report.Urgent, len(c.plain)+int(urgent))
	}
	c.plain = append(c.plain, data...)
	c.report.FramesIn++
	c.report.MaxFrameIn = max(c.report.MaxFrameIn, len(data))
	if len(data) == 0 {
		c.report.EmptyIn++
	}
	c.finpIn = flags&crypto.FlagFIN != 0
	if gen > c.genIn {
		c.genIn = gen
		c.session.AdvanceRecv(gen)
		c.report.RekeysIn++
		if c.genIn > c.genOut && !c.finpOut && !c.cfg.NoRekey {
			c.genOut++
			c.rekeyDue = true
			_, _ = c.seal(Frame{})
		}
	}
	c.notify()
	return nil
}

// receivedFIN judges the end of the other side's stream.
func (c *Conn) receivedFIN() {
	if !c.enabled || c.finpIn || c.cfg.NoSession {
		return
	}
	if c.err == nil && !c.cfg.KeepOpen {
		c.reset(ErrFINWithoutFINp)
	}
}
