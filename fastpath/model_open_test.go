package fastpath

import (
	"encoding/binary"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// How a model opens its connection.
const (
	opened = iota // it is open, or was handed over so
	listening
	synSent
	synReceived
)

// connect opens actively.
func (m *model) connect(now time.Duration) {
	m.now, m.started, m.opening = now, true, synSent
	m.sendSYN()
}

func (m *model) listen() { m.started, m.opening = true, listening }

// sendSYN sends a SYN, or a SYN-ACK once the other side's SYN has come.
func (m *model) sendSYN() {
	c := &m.cfg
	h := packet.Header{Seq: m.iss, Flags: packet.SYN, Wnd: uint16(m.synWnd())}
	if m.opening == synReceived {
		h.Flags |= packet.ACK
		h.Ack = m.irs + 1
	}
	if c.ecn {
		h.Flags |= packet.ECE
		if m.opening == synSent {
			h.Flags |= packet.CWR
		}
	}
	o := append(make([]byte, 0, packet.MaxOptions), packet.OptMSS, 4, byte(c.ourMSS>>8), byte(c.ourMSS))
	if c.sack {
		o = append(o, packet.OptNOP, packet.OptNOP, packet.OptSACKOK, 2)
	}
	if c.ts {
		o = append(o, packet.OptNOP, packet.OptNOP, packet.OptTimestamp, 10)
		o = binary.BigEndian.AppendUint32(o, m.ts())
		o = binary.BigEndian.AppendUint32(o, m.tsRecent)
	}
	if c.ws {
		o = append(o, packet.OptNOP, packet.OptWScale, 3, c.shift)
	}
	h.Opts = o
	m.rcvEdge = m.synWnd()
	m.tmpl.SetECN(0)
	buf, _ := m.compose(&h, 0)
	(&xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(m.tmpl.L4()), CsumOffset: 16}).Put(buf)
	m.synAt = m.now + time.Second<<min(m.synTries, 2)
	m.synTries++
	m.out(buf)
}

// learnSYN takes the other side's SYN: what both want holds.
func (m *model) learnSYN(s *packet.Segment) {
	c := &m.cfg
	m.irs, m.tsRecent = s.Seq, s.TSval
	mss, sack, ts, ws := 536, false, false, false
	packet.WalkOptions(s.Options(), func(o []byte) bool {
		switch {
		case o[0] == packet.OptMSS && len(o) == 4:
			mss = int(binary.BigEndian.Uint16(o[2:]))
		case o[0] == packet.OptSACKOK:
			sack = true
		case o[0] == packet.OptTimestamp:
			ts = true
		case o[0] == packet.OptWScale && len(o) == 3:
			ws, c.peerShift = true, o[2]
		case o[0] == packet.OptENO && m.shielded && s.Flags&packet.ACK == 0:
			m.fail("%s: a SYN with ENO", m.name)
		}
		return true
	})
	c.sack, c.ts, c.ws = c.sack && sack, c.ts && ts, c.ws && ws
	if !c.ws {
		c.shift, c.peerShift = 0, 0
	}
	c.ecn = c.ecn && s.Flags&packet.ECE != 0
	c.mss, c.rcvMSS = min(mss, c.ourMSS), c.ourMSS
	if c.ts {
		c.mss, c.rcvMSS = c.mss-12, c.rcvMSS-12
	}
	c.mss = max(c.mss, 88)
	c.gso = max(c.mss, c.gso/c.mss*c.mss)
	m.cwnd = uint64(10 * c.mss)
}

// inputOpening takes a segment of the handshake. It reports whether there is
// nothing more in it.
func (m *model) inputOpening(s *packet.Segment) bool {
	fl := s.Flags
	ours := fl&packet.ACK != 0 && s.Ack == m.iss+1
	switch m.opening {
	case listening:
		if fl&(packet.SYN|packet.ACK|packet.RST) == packet.SYN {
			m.learnSYN(s)
			m.opening = synReceived
			m.sendSYN()
		}
	case synSent:
		switch {
		case fl&packet.ACK != 0 && !ours:
			if fl&packet.RST == 0 {
				m.transmit(uint64(offOf(m.iss, s.Ack, 0)), 0, packet.RST, false)
			}
		case fl&packet.RST != 0:
			if ours {
				m.refuse()
			}
		case fl&packet.SYN != 0:
			m.learnSYN(s)
			if ours {
				m.establish(uint64(s.Wnd), true)
				break
			}
			m.opening = synReceived
			m.sendSYN()
		}
	case synReceived:
		switch {
		case fl&packet.RST != 0:
			if s.Seq == m.irs+1 {
				m.refuse()
			}
		case fl&(packet.SYN|packet.ACK) == packet.SYN:
			if s.Seq == m.irs {
				m.sendSYN()
			}
		case ours && fl&packet.SYN != 0:
			if s.Seq == m.irs {
				m.establish(uint64(s.Wnd), true)
			}
		case ours && uint64(offOf(m.irs, s.Seq, 0)) <= m.rcvEdge:
			m.establish(uint64(s.Wnd)<<m.cfg.peerShift, false)
			return m.reset
		}
	}
	return true
}

// establish ends the handshake. The end of one in SYN-RECEIVED is an ACK, which is
// not answered.
func (m *model) establish(wnd uint64, answer bool) {
	m.opening, m.synAt = opened, 0
	m.max = 0
	m.begin(m.now, wnd, answer)
}

// refuseSYN answers a SYN that there is no socket for.
func (m *model) refuseSYN(s *packet.Segment) {
	buf, _ := m.compose(&packet.Header{Ack: s.Seq + 1, Flags: packet.RST | packet.ACK}, 0)
	(&xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(m.tmpl.L4()), CsumOffset: 16}).Put(buf)
	m.out(buf)
}

// refuse ends a connection that never opened.
func (m *model) refuse() { m.reset, m.synAt = true, 0 }

// acceptable reports whether a segment at offset o with n bytes passes the
// checks of a TCP whose segments come from a network (RFC 9293, RFC 7323); what
// does not is answered. Between engine and model nothing like that may happen
// unless packets get lost.
func (m *model) acceptable(s *packet.Segment, o, n int64) bool {
	switch a := offOf(m.iss, s.Ack, m.una); {
	case s.HasTS && m.cfg.ts && packet.SeqDiff(s.TSval, m.tsRecent) < 0,
		o+n < int64(m.rcv) || o > int64(max(m.rcvEdge, m.oldEdge)),
		s.Flags&packet.ACK != 0 && (a > int64(m.max) || a < int64(m.una)-1<<30):
		if s.Flags&packet.RST == 0 && (n > 0 || s.Flags&packet.FIN != 0 || o < int64(m.rcv)) {
			m.sendAck()
		}
		return false
	}
	return true
}
