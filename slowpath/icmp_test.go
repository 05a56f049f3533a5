package slowpath

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// icmpError is an error from the wire about a segment of host 1 to host 2.
func icmpError(l link, typ, code byte, seq uint32) []byte {
	quoted := l.frame(tcp{src: 1, dst: 2, sport: clientPort, dport: serverPort, seq: seq, flags: packet.SYN})
	f := l.frame(tcp{src: 2, dst: 1, data: make([]byte, 200)})
	var x packet.L3Info
	if err := packet.ParseL3(f, &x); err != nil {
		panic(err)
	}
	proto, at := byte(1), x.L3+9
	if l.v6 {
		proto, at = 58, x.L3+6
	}
	f[at] = proto
	clear(f[x.L4:])
	f[x.L4], f[x.L4+1] = typ, code
	copy(f[x.L4+8:], quoted[x.L3:])
	packet.ICMPChecksum(f, x.L3, x.L4, l.v6)
	return f
}

// What a router or host says of a SYN or SYN-ACK reaches the inner stack as it
// came, so that connect fails as it does without encryption.
func TestICMPErrors(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		port, tooBig := byte(3), [2]byte{3, 4}
		unreachable := byte(3)
		if v6 {
			unreachable, port, tooBig = 1, 4, [2]byte{2, 0}
		}
		start := func() *script {
			s := newScript(t, Config{})
			s.link.v6 = v6
			return s
		}
		passed := func(s *script, typ, code byte, seq uint32) {
			t.Helper()
			f := icmpError(s.link, typ, code, seq)
			s.input(packet.FromOuter, f)
			s.wantKinds(SendInner)
			if !bytes.Equal(s.acts[0].Frame, f) {
				t.Error("the error was changed")
			}
		}
		dropped := func(s *script, typ, code byte, seq uint32) {
			t.Helper()
			before := s.m.Counters()[dropICMP]
			s.input(packet.FromOuter, icmpError(s.link, typ, code, seq))
			s.wantKinds()
			if s.m.Counters()[dropICMP] != before+1 {
				t.Error("not counted")
			}
		}

		s := start()
		dropped(s, unreachable, port, localISS)
		s.connect()
		dropped(s, unreachable, port, localISS+1)
		dropped(s, tooBig[0], tooBig[1], localISS)
		passed(s, unreachable, port, localISS)
		s.tick(offerIdle)
		s.wantReport(StateFailed, ReasonUnreachable)

		// A later copy of the SYN leaves without ENO.
		s = start()
		s.connect()
		for range maxSYNs {
			s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 11, 0)})
		}
		passed(s, unreachable, port, localISS)

		// The answer to a SYN.
		s = start()
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), AppendOffer(nil, 0, crypto.AllTEPs, Suboption{}))})
		dropped(s, unreachable, port, 0)
		s.answered()
		passed(s, unreachable, port, localISS)
		s.tick(answerIdle)
		s.wantReport(StateFailed, ReasonUnreachable)

		// The peer has answered: a late one is nobody's, and Init1 is not the
		// inner stack's.
		s = start()
		s.active(crypto.TEPX25519)
		dropped(s, unreachable, port, localISS)
		dropped(s, unreachable, port, localISS+1)

		// Not what it seems to be.
		s = start()
		s.connect()
		f := icmpError(s.link, unreachable, port, localISS)
		var e packet.ICMPError
		if err := packet.ParseICMP(f, &e); err != nil {
			t.Fatal(err)
		}
		binary.BigEndian.PutUint32(f[e.TCP+4:], localISS+2)
		s.input(packet.FromOuter, f)
		s.wantKinds()
		s.input(packet.FromInner, icmpError(s.link, unreachable, port, localISS))
		s.wantKinds()
		if n := s.m.Counters()[dropMalformed]; n != 2 {
			t.Errorf("%d of 2 dropped", n)
		}
	}
}
