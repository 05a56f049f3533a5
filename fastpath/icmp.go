package fastpath

import (
	"encoding/binary"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// outerICMP takes an ICMP or ICMPv6 error about a segment of ours, and gives
// the inner stack the same error about the bytes it sent: sequence number
// mapped, MTU less the frame overhead (T21). Errors about flows that are being
// opened are the slow path's. It reports whether the frame was an ICMP message at
// all.
func (e *Engine) outerICMP(frame []byte) bool {
	var c packet.ICMPError
	switch packet.ParseICMP(frame, &c) {
	case nil:
	case packet.ErrNotICMP:
		return false
	default:
		e.st.ICMPIn++
		e.st.ICMPDropped++
		return true
	}
	e.st.ICMPIn++
	f := e.tab.find(&c.Key)
	if f == nil {
		if !e.elsewhere(packet.FromOuter, &c.Key, frame) {
			e.toSlow(packet.FromOuter, &c.Key, 0, c.Frame)
		}
		return true
	}
	o := offOf(f.iss, c.Seq, f.unaO)
	if f.state != flowLive || o < int64(f.unaO) || o >= int64(f.sentO) {
		e.st.ICMPDropped++
		return true
	}
	out := append([]byte(nil), c.Frame...)
	if c.TooBig {
		least := 552
		if c.V6 {
			least = 1280
		}
		if c.MTU < least || f.pmtu != 0 && c.MTU >= f.pmtu {
			e.st.ICMPDropped++
			return true
		}
		f.pmtu = c.MTU
		if c.V6 {
			// Below 1280 an IPv6 stack ignores it; the translator cuts its
			// segments to f.pmtu by itself.
			binary.BigEndian.PutUint32(out[c.L4+4:], uint32(max(c.MTU-overhead, 1280)))
		} else {
			binary.BigEndian.PutUint16(out[c.L4+6:], uint16(c.MTU-overhead))
		}
	}
	binary.BigEndian.PutUint32(out[c.TCP+4:], seqOf(f.iss, f.floorI(uint64(o))))
	packet.ICMPChecksum(out, c.L3, c.L4, c.V6)
	e.SendInner(out, e.now)
	return true
}
