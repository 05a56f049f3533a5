package packet

import (
	"encoding/binary"
	"math/bits"
)

// Template is the layer 2 and 3 header that a flow's packets carry in one
// direction, learned from the packets seen there. The zero value is unset.
type Template struct {
	n, l3  uint8
	v6     bool
	sp, dp uint16
	id     uint16
	sum    uint32 // IPv4: of the header without TOS, length, identification and checksum
	b      [EthLen + VLANLen + IPv6Len]byte
}

// v4Len is the length of Ethernet and IPv4 headers without a VLAN tag.
const v4Len = EthLen + IPv4Len

// Learn takes addresses, VLAN tag, TTL, DSCP, flow label and ports from a
// segment that travels in the template's direction. IPv4 options are left out.
func (t *Template) Learn(s *Segment) {
	t.l3, t.v6 = uint8(s.L3), s.V6
	if s.V6 {
		t.n = uint8(s.L3 + IPv6Len)
		copy(t.b[:t.n], s.Frame)
	} else {
		t.n = uint8(s.L3 + IPv4Len)
		if t.n == v4Len {
			*(*[v4Len]byte)(t.b[:]) = [v4Len]byte(s.Frame)
		} else {
			copy(t.b[:t.n], s.Frame)
		}
		t.b[s.L3] = 0x45
		ip := s.Frame[s.L3:][:IPv4Len]
		t.id = binary.BigEndian.Uint16(ip[4:])
		// From the frame: what was just stored would have to get to the cache first.
		le := binary.LittleEndian
		a := 0x45 + uint64(le.Uint16(ip[6:])) + uint64(le.Uint16(ip[8:])) + uint64(le.Uint32(ip[12:])) + uint64(le.Uint32(ip[16:]))
		t.sum = uint32(Fold(a))
	}
	t.sp = binary.BigEndian.Uint16(s.Frame[s.L4:])
	t.dp = binary.BigEndian.Uint16(s.Frame[s.L4+2:])
}

// Set reports whether Learn was called.
func (t *Template) Set() bool { return t.n != 0 }

// V6 reports whether the template is of an IPv6 flow.
func (t *Template) V6() bool { return t.v6 }

// L3 returns the offset of the IP header.
func (t *Template) L3() int { return int(t.l3) }

// L4 returns the offset of the TCP header in frames made from the template.
func (t *Template) L4() int { return int(t.n) }

// TOS returns the traffic class that the last learned packet had.
func (t *Template) TOS() uint8 {
	if t.v6 {
		return t.b[t.l3]<<4 | t.b[t.l3+1]>>4
	}
	return t.b[t.l3+1]
}

// SetECN replaces the two ECN bits of the traffic class.
func (t *Template) SetECN(ecn uint8) {
	if t.v6 {
		t.b[t.l3+1] = t.b[t.l3+1]&^0x30 | ecn&3<<4
	} else {
		t.b[t.l3+1] = t.b[t.l3+1]&^3 | ecn&3
	}
}

// Header is what Compose needs besides the template.
type Header struct {
	Seq, Ack uint32
	Flags    uint8
	Wnd, Urg uint16
	Opts     []byte // whole option bytes, a multiple of 4, at most 40
}

// Compose writes Ethernet, IP and TCP headers for a segment with n bytes of
// payload into dst and returns the length of the headers; the caller puts the
// payload behind them. dst must have room for MaxHeaders bytes. The IPv4 header
// checksum is filled in; the TCP checksum field is zero, see FullChecksum and
// PartialChecksum. IPv4 identifications count up from the last learned one.
func (t *Template) Compose(dst []byte, h *Header, n int) int {
	l4 := int(t.n)
	if l4 == v4Len {
		*(*[v4Len]byte)(dst) = [v4Len]byte(t.b[:])
	} else {
		copy(dst[:l4], t.b[:l4])
	}
	tl := TCPLen + len(h.Opts)
	ip := dst[t.l3:l4]
	if t.v6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(tl+n))
		ip[6] = 6
	} else {
		t.id++
		total := uint16(IPv4Len + tl + n)
		binary.BigEndian.PutUint16(ip[2:], total)
		binary.BigEndian.PutUint16(ip[4:], t.id)
		a := uint64(t.sum) + uint64(t.b[t.l3+1])<<8 + uint64(bits.ReverseBytes16(total)) + uint64(bits.ReverseBytes16(t.id))
		binary.LittleEndian.PutUint16(ip[10:], ^Fold(a))
	}
	p := dst[l4 : l4+tl]
	binary.BigEndian.PutUint16(p[0:], t.sp)
	binary.BigEndian.PutUint16(p[2:], t.dp)
	binary.BigEndian.PutUint32(p[4:], h.Seq)
	binary.BigEndian.PutUint32(p[8:], h.Ack)
	p[12] = uint8(tl/4) << 4
	p[13] = h.Flags
	binary.BigEndian.PutUint16(p[14:], h.Wnd)
	p[16], p[17] = 0, 0
	binary.BigEndian.PutUint16(p[18:], h.Urg)
	copy(p[TCPLen:], h.Opts)
	return l4 + tl
}

// Rewrite appends to dst a copy of s with the given TCP options and payload in
// place of its own; lengths and the IPv4 checksum are made to fit, the TCP
// checksum is zeroed. opts must be a multiple of 4 and at most 40 bytes long.
func Rewrite(dst []byte, s *Segment, opts, payload []byte) []byte {
	at := len(dst)
	dst = append(dst, s.Frame[:s.L4+TCPLen]...)
	dst = append(dst, opts...)
	dst = append(dst, payload...)
	f := dst[at:]
	if s.V6 {
		binary.BigEndian.PutUint16(f[s.L3+4:], uint16(len(f)-s.L4))
	} else {
		binary.BigEndian.PutUint16(f[s.L3+2:], uint16(len(f)-s.L3))
		PutIPv4Checksum(f[s.L3:s.L4])
	}
	f[s.L4+12] = uint8((TCPLen+len(opts))/4)<<4 | f[s.L4+12]&0xf
	f[s.L4+16], f[s.L4+17] = 0, 0
	return dst
}

// PutIPv4Checksum writes the checksum of the IPv4 header ip.
func PutIPv4Checksum(ip []byte) {
	ip[10], ip[11] = 0, 0
	binary.LittleEndian.PutUint16(ip[10:], ^foldIPv4(ip[:int(ip[0]&15)*4]))
}

// foldIPv4 returns the folded sum of a whole IPv4 header.
func foldIPv4(ip []byte) uint16 {
	if len(ip) == IPv4Len {
		le := binary.LittleEndian
		// Two words of 64 bits may carry; halves of them do not.
		a, b := le.Uint64(ip), le.Uint64(ip[8:])
		return Fold(a>>32 + a&0xffffffff + b>>32 + b&0xffffffff + uint64(le.Uint32(ip[16:])))
	}
	return Fold(Sum(ip, 0))
}

// pseudoSum returns the unfolded sum of the pseudo-header of the IP packet ip
// with n bytes of protocol proto.
func pseudoSum(ip []byte, v6 bool, proto uint8, n int) uint64 {
	// Protocol and length as they would be stored, and read as little-endian words.
	a := uint64(proto)<<8 + uint64(bits.ReverseBytes32(uint32(n)))
	if v6 {
		return Sum(ip[8:40], a)
	}
	return a + uint64(binary.LittleEndian.Uint32(ip[12:])) + uint64(binary.LittleEndian.Uint32(ip[16:]))
}

// FullChecksum writes the TCP checksum of the frame whose IP and TCP headers
// are at l3 and l4; the frame ends with the IP packet.
func FullChecksum(f []byte, l3, l4 int, v6 bool) {
	t := f[l4:]
	t[16], t[17] = 0, 0
	binary.LittleEndian.PutUint16(t[16:], ^Fold(Sum(t, pseudoSum(f[l3:], v6, 6, len(t)))))
}

// HeadChecksum is FullChecksum of a frame whose payload has the given Sum.
func HeadChecksum(f []byte, l3, l4 int, v6 bool, payload uint64) {
	t := f[l4:]
	t[16], t[17] = 0, 0
	a := pseudoSum(f[l3:], v6, 6, len(t))
	a, c := bits.Add64(a, payload, 0)
	binary.LittleEndian.PutUint16(t[16:], ^Fold(Sum(t[:int(t[12]>>4)*4], a+c)))
}

// PartialChecksum writes the pseudo-header sum into the TCP checksum field, as
// checksum offload (CHECKSUM_PARTIAL) wants it. l4len is the length of TCP
// header and payload together, which may be more than the frame holds.
func PartialChecksum(f []byte, l3, l4, l4len int, v6 bool) {
	binary.LittleEndian.PutUint16(f[l4+16:], Fold(pseudoSum(f[l3:], v6, 6, l4len)))
}

// ChecksumOK verifies a segment's TCP checksum, and the IPv4 header's. With virtual set, a field that
// holds just the pseudo-header sum is taken too: that is what virtual devices
// deliver for packets that never left this machine (T12).
func (s *Segment) ChecksumOK(virtual bool) bool {
	t := s.Frame[s.L4:]
	if !s.V6 && foldIPv4(s.Frame[s.L3:s.L4]) != 0xffff {
		return false
	}
	p := pseudoSum(s.Frame[s.L3:], s.V6, 6, len(t))
	return Fold(Sum(t, p)) == 0xffff || virtual && Fold(p) == binary.LittleEndian.Uint16(t[16:])
}

// ICMPChecksum writes the checksum of an ICMP (IPv4) or ICMPv6 message that
// runs from l4 to the end of the frame.
func ICMPChecksum(f []byte, l3, l4 int, v6 bool) {
	m := f[l4:]
	m[2], m[3] = 0, 0
	var a uint64
	if v6 {
		a = pseudoSum(f[l3:], true, 58, len(m))
	}
	binary.LittleEndian.PutUint16(m[2:], ^Fold(Sum(m, a)))
}

// ICMPChecksumOK verifies an ICMP or ICMPv6 message.
func ICMPChecksumOK(f []byte, l3, l4 int, v6 bool) bool {
	var a uint64
	if v6 {
		a = pseudoSum(f[l3:], true, 58, len(f)-l4)
	}
	return Fold(Sum(f[l4:], a)) == 0xffff
}
