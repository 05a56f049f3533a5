package slowpath

import (
	"bytes"
	"encoding/binary"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Offsets in a TCP header.
const (
	tcpSeq      = 4
	tcpOffset   = 12 // data offset and the AE bit
	tcpFlags    = 13
	tcpWindow   = 14
	tcpChecksum = 16

	aeBit = 1 // RFC 9768 section 3.1.1, low bit of byte 12
)

// copyFrame returns the segment's packet as it is, but for the checksums:
// that of IPv4 is right and that of TCP zero.
func copyFrame(s *packet.Segment) []byte {
	f := bytes.Clone(s.Frame)
	f[s.L4+tcpChecksum], f[s.L4+tcpChecksum+1] = 0, 0
	if !s.V6 {
		packet.PutIPv4Checksum(f[s.L3:s.L4])
	}
	return f
}

// rewriteSYN returns a copy of a SYN or SYN-ACK with other options, without
// its data, and with AccECN taken off, which does not survive reframing (T16).
func rewriteSYN(s *packet.Segment, opts []byte) []byte {
	f := packet.Rewrite(nil, s, opts, nil)
	f[s.L4+tcpOffset] &^= aeBit
	return f
}

// capWindow makes the window of a SYN or SYN-ACK no larger than openWindow and
// returns it, in bytes.
func capWindow(f []byte, l4 int) int {
	w := min(binary.BigEndian.Uint16(f[l4+tcpWindow:]), openWindow)
	binary.BigEndian.PutUint16(f[l4+tcpWindow:], w)
	return int(w)
}

// stripSYN returns a SYN or SYN-ACK as plain TCP has to see it. ENO options go,
// and with them the data, whose meaning only a TEP defines (RFC 8547 section
// 4.7); a segment without ENO is not changed.
func stripSYN(s *packet.Segment, o *synOptions) []byte {
	if o.enos == 0 {
		return copyFrame(s)
	}
	var edit optionEdit
	opts, ok := edit.apply(s.Options())
	if !ok {
		return copyFrame(s)
	}
	return packet.Rewrite(nil, s, opts, nil)
}

// learnReverse fills t for the packets that answer s.
func learnReverse(t *packet.Template, s *packet.Segment, dir packet.Direction) {
	f := bytes.Clone(s.Frame[:s.Data])
	copy(f[0:6], s.Frame[6:12])
	copy(f[6:12], s.Frame[0:6])
	ip := f[s.L3:]
	if s.V6 {
		copy(ip[8:24], s.Dst())
		copy(ip[24:40], s.Src())
		ip[7] = replyTTL
		binary.BigEndian.PutUint16(ip[4:], uint16(s.Data-s.L4))
	} else {
		copy(ip[12:16], s.Dst())
		copy(ip[16:20], s.Src())
		ip[8] = replyTTL
		binary.BigEndian.PutUint16(ip[2:], uint16(s.Data-s.L3))
	}
	copy(f[s.L4:], s.Frame[s.L4+2:s.L4+4])
	copy(f[s.L4+2:], s.Frame[s.L4:s.L4+2])
	var r packet.Segment
	if packet.Parse(f, dir^1, &r) == nil {
		t.Learn(&r)
		t.SetECN(0)
	}
}

// replyTTL is the hop limit of answers for which no packet of their direction
// was seen.
const replyTTL = 64

// Reset returns the frame with the RST that answers s (RFC 9293 section 3.10.7.1),
// for the side that s came from, without its TCP checksum; nil when s cannot be
// answered.
func Reset(s *packet.Segment, dir packet.Direction) []byte {
	var t packet.Template
	learnReverse(&t, s, dir)
	if !t.Set() {
		return nil
	}
	h := packet.Header{Flags: packet.RST, Seq: s.Ack}
	if s.Flags&packet.ACK == 0 {
		n := uint32(s.Len())
		if s.Flags&packet.SYN != 0 {
			n++
		}
		if s.Flags&packet.FIN != 0 {
			n++
		}
		h = packet.Header{Flags: packet.RST | packet.ACK, Ack: s.Seq + n}
	}
	return compose(&t, &h, nil)
}

func compose(t *packet.Template, h *packet.Header, payload []byte) []byte {
	f := make([]byte, packet.MaxHeaders+len(payload))
	n := t.Compose(f, h, len(payload))
	return append(f[:n], payload...)
}
