package fastpath

import (
	"encoding/binary"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// outerICMP takes an ICMP or ICMPv6 error about a segment of ours, and gives
// the inner stack the same error about the bytes it sent: sequence number
// mapped, MTU less the frame overhead (T21). It reports whether the frame was
// an ICMP message at all.
func (e *Engine) outerICMP(frame []byte) bool {
	var x packet.L3Info
	if packet.ParseL3(frame, &x) != nil || x.Proto != 1 && x.Proto != 58 {
		return false
	}
	frame = frame[:x.End]
	e.st.ICMPIn++
	m := frame[x.L4:]
	ipLen := packet.IPv4Len
	if x.V6 {
		ipLen = packet.IPv6Len
	}
	if len(m) < 8+ipLen+8 || x.V6 != (x.Proto == 58) || !packet.ICMPChecksumOK(frame, x.L3, x.L4, x.V6) {
		e.st.ICMPDropped++
		return true
	}
	emb := m[8:]
	key := packet.Key{VLAN: x.VLAN}
	tcp := 0
	tooBig, mtu := false, 0
	if x.V6 {
		if m[0] < 1 || m[0] > 4 || emb[6] != 6 {
			e.st.ICMPDropped++
			return true
		}
		copy(key.Local[:], emb[8:24])
		copy(key.Remote[:], emb[24:40])
		tcp = packet.IPv6Len
		tooBig, mtu = m[0] == 2, int(binary.BigEndian.Uint32(m[4:]))
	} else {
		if m[0] != 3 && m[0] != 11 && m[0] != 12 || emb[9] != 6 {
			e.st.ICMPDropped++
			return true
		}
		key.Local = [16]byte{10: 0xff, 11: 0xff, 12: emb[12], 13: emb[13], 14: emb[14], 15: emb[15]}
		key.Remote = [16]byte{10: 0xff, 11: 0xff, 12: emb[16], 13: emb[17], 14: emb[18], 15: emb[19]}
		tcp = int(emb[0]&15) * 4
		tooBig, mtu = m[0] == 3 && m[1] == 4, int(binary.BigEndian.Uint16(m[6:]))
	}
	if tcp < ipLen || len(emb) < tcp+8 {
		e.st.ICMPDropped++
		return true
	}
	key.LPort = binary.BigEndian.Uint16(emb[tcp:])
	key.RPort = binary.BigEndian.Uint16(emb[tcp+2:])
	f := e.tab.find(&key)
	if f == nil || f.state != flowLive {
		e.st.ICMPDropped++
		return true
	}
	o := offOf(f.iss, binary.BigEndian.Uint32(emb[tcp+4:]), f.unaO)
	if o < int64(f.unaO) || o >= int64(f.sentO) {
		e.st.ICMPDropped++
		return true
	}
	out := append([]byte(nil), frame...)
	om := out[x.L4:]
	if tooBig {
		least := 552
		if x.V6 {
			least = 1280
		}
		if mtu < least || f.pmtu != 0 && mtu >= f.pmtu {
			e.st.ICMPDropped++
			return true
		}
		f.pmtu = mtu
		if x.V6 {
			// Below 1280 an IPv6 stack ignores it; the translator cuts its
			// segments to f.pmtu by itself.
			binary.BigEndian.PutUint32(om[4:], uint32(max(mtu-overhead, 1280)))
		} else {
			binary.BigEndian.PutUint16(om[6:], uint16(mtu-overhead))
		}
	}
	binary.BigEndian.PutUint32(om[8+tcp+4:], seqOf(f.iss, f.floorI(uint64(o))))
	packet.ICMPChecksum(out, x.L3, x.L4, x.V6)
	e.SendInner(out, e.now)
	return true
}
