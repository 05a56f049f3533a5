// Package frame reads, rewrites and composes Ethernet frames that carry TCP, for
// the forwarder and for user-space endpoints in tests. It deliberately shares
// nothing with the code that the tests are about, so that a wrong checksum or
// length there does not look right here.
//
// Ethernet with up to two VLAN tags, IPv4 with options and IPv6 without
// extension headers are understood. Nothing here panics on any input.
package frame

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// TCP flags (RFC 9293 section 3.1).
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// TCP option kinds.
const (
	OptEnd       = 0
	OptNOP       = 1
	OptMSS       = 2
	OptWScale    = 3
	OptSACKOK    = 4
	OptTimestamp = 8
	OptENO       = 69 // RFC 8547 section 4.1
)

// EtherTypes and protocol numbers.
const (
	EtherIPv4 = 0x0800
	EtherARP  = 0x0806
	EtherVLAN = 0x8100
	EtherQinQ = 0x88a8
	EtherIPv6 = 0x86dd

	ProtoTCP    = 6
	ProtoICMPv6 = 58
)

// Header sizes in bytes.
const (
	EthLen  = 14
	VLANLen = 4
	IPv4Len = 20
	IPv6Len = 40
	TCPLen  = 20
)

// Info tells where the parts of a frame are, as offsets into it.
type Info struct {
	EtherType uint16 // of the network layer, behind VLAN tags
	L3        int
	L4        int // 0 unless the frame is IP
	End       int // end of the IP packet; the rest is padding
	Proto     uint8
	V6        bool
	Fragment  bool

	// Set when TCP is true.
	TCP  bool // a whole TCP header is there and the packet is no fragment
	Data int  // offset of the payload
}

// Parse reads the headers of a frame. ok is false when they do not fit in it or
// contradict each other.
func Parse(b []byte) (x Info, ok bool) {
	if len(b) < EthLen {
		return x, false
	}
	x.EtherType, x.L3 = binary.BigEndian.Uint16(b[12:]), EthLen
	for range 2 {
		if x.EtherType != EtherVLAN && x.EtherType != EtherQinQ {
			break
		}
		if len(b) < x.L3+VLANLen {
			return x, false
		}
		x.EtherType = binary.BigEndian.Uint16(b[x.L3+2:])
		x.L3 += VLANLen
	}
	ip := b[x.L3:]
	switch x.EtherType {
	case EtherIPv4:
		if len(ip) < IPv4Len || ip[0]>>4 != 4 {
			return x, false
		}
		hl, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
		if hl < IPv4Len || total < hl || total > len(ip) {
			return x, false
		}
		x.L4, x.End, x.Proto = x.L3+hl, x.L3+total, ip[9]
		x.Fragment = binary.BigEndian.Uint16(ip[6:])&0x3fff != 0
	case EtherIPv6:
		if len(ip) < IPv6Len || ip[0]>>4 != 6 {
			return x, false
		}
		n := int(binary.BigEndian.Uint16(ip[4:]))
		if IPv6Len+n > len(ip) {
			return x, false
		}
		x.L4, x.End, x.Proto, x.V6 = x.L3+IPv6Len, x.L3+IPv6Len+n, ip[6], true
	default:
		return x, true
	}
	if x.Proto != ProtoTCP || x.Fragment {
		return x, true
	}
	if x.End-x.L4 < TCPLen {
		return x, false
	}
	x.Data = x.L4 + int(b[x.L4+12]>>4)*4
	if x.Data < x.L4+TCPLen || x.Data > x.End {
		return x, false
	}
	x.TCP = true
	return x, true
}

// The accessors below need x.TCP.

// Seq returns the sequence number.
func (x *Info) Seq(b []byte) uint32 { return binary.BigEndian.Uint32(b[x.L4+4:]) }

// Ack returns the acknowledgment number.
func (x *Info) Ack(b []byte) uint32 { return binary.BigEndian.Uint32(b[x.L4+8:]) }

// Flags returns the TCP flags.
func (x *Info) Flags(b []byte) uint8 { return b[x.L4+13] }

// Window returns the window field, not scaled.
func (x *Info) Window(b []byte) uint16 { return binary.BigEndian.Uint16(b[x.L4+14:]) }

// Urgent returns the urgent pointer.
func (x *Info) Urgent(b []byte) uint16 { return binary.BigEndian.Uint16(b[x.L4+18:]) }

// Options returns the TCP option bytes, a part of b.
func (x *Info) Options(b []byte) []byte { return b[x.L4+TCPLen : x.Data] }

// Payload returns the data, a part of b.
func (x *Info) Payload(b []byte) []byte { return b[x.Data:x.End] }

// Src returns source address and port.
func (x *Info) Src(b []byte) netip.AddrPort {
	return netip.AddrPortFrom(x.addr(b, 0), binary.BigEndian.Uint16(b[x.L4:]))
}

// Dst returns destination address and port.
func (x *Info) Dst(b []byte) netip.AddrPort {
	return netip.AddrPortFrom(x.addr(b, 1), binary.BigEndian.Uint16(b[x.L4+2:]))
}

func (x *Info) addr(b []byte, which int) netip.Addr {
	if x.V6 {
		return netip.AddrFrom16([16]byte(b[x.L3+8+16*which:]))
	}
	return netip.AddrFrom4([4]byte(b[x.L3+12+4*which:]))
}

// Option is one TCP option: kind and data, and where it starts in the option
// bytes.
type Option struct {
	Kind uint8
	Data []byte // without kind and length
	At   int
	Len  int // with kind and length
}

// EachOption calls f for the options in opts, padding excepted, until f returns
// false, the list ends or it is malformed.
func EachOption(opts []byte, f func(Option) bool) {
	for i := 0; i < len(opts); {
		switch opts[i] {
		case OptEnd:
			return
		case OptNOP:
			i++
			continue
		}
		if i+1 >= len(opts) {
			return
		}
		n := int(opts[i+1])
		if n < 2 || i+n > len(opts) {
			return
		}
		if !f(Option{Kind: opts[i], Data: opts[i+2 : i+n], At: i, Len: n}) {
			return
		}
		i += n
	}
}

// FindOption returns the data of the first option of a kind.
func FindOption(opts []byte, kind uint8) (data []byte, ok bool) {
	EachOption(opts, func(o Option) bool {
		if o.Kind == kind {
			data, ok = o.Data, true
		}
		return !ok
	})
	return data, ok
}

// sum adds the big-endian 16-bit words of b (RFC 1071); an odd last byte is the
// high half of a word.
func sum(b []byte, s uint64) uint64 {
	for len(b) >= 8 {
		v := binary.BigEndian.Uint64(b)
		s += v>>32 + v&0xffffffff
		b = b[8:]
	}
	for len(b) >= 2 {
		s += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// transportSum is the sum of the pseudo-header and what the IP packet carries.
func (x *Info) transportSum(b []byte) uint64 {
	s := uint64(x.Proto) + uint64(x.End-x.L4)
	if x.V6 {
		s = sum(b[x.L3+8:x.L3+40], s)
	} else {
		s = sum(b[x.L3+12:x.L3+20], s)
	}
	return sum(b[x.L4:x.End], s)
}

// ChecksumOK verifies the TCP checksum; it needs x.TCP.
func (x *Info) ChecksumOK(b []byte) bool { return fold(x.transportSum(b)) == 0xffff }

// FixChecksums writes the TCP checksum and, for IPv4, the header checksum; it
// needs x.TCP.
func (x *Info) FixChecksums(b []byte) {
	if !x.V6 {
		fixIPv4(b[x.L3:x.L4])
	}
	b[x.L4+16], b[x.L4+17] = 0, 0
	binary.BigEndian.PutUint16(b[x.L4+16:], ^fold(x.transportSum(b)))
}

func fixIPv4(h []byte) {
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], ^fold(sum(h, 0)))
}

// CompleteChecksum finishes a checksum that the sender left to its device: start
// is the offset of the transport header and field that of its checksum, which
// holds the sum of the pseudo-header.
func CompleteChecksum(b []byte, start, end, field int) {
	c := ^fold(sum(b[start:end], 0))
	if c == 0 {
		c = 0xffff // UDP: zero would mean that there is no checksum
	}
	binary.BigEndian.PutUint16(b[field:], c)
}

// Cut appends to dst the TCP segment in b reduced to payload bytes [from, to):
// sequence number, lengths, IPv4 identification (plus id) and checksums are
// made to fit, CWR stays on the piece that has the first byte, PSH and FIN on
// that with the last. It needs x.TCP, and no urgent pointer.
func (x *Info) Cut(dst, b []byte, from, to, id int) []byte {
	at := len(dst)
	dst = append(dst, b[:x.Data]...)
	dst = append(dst, b[x.Data+from:x.Data+to]...)
	p := dst[at:]
	y := *x
	y.End = len(p)
	y.putLengths(p)
	if !x.V6 {
		binary.BigEndian.PutUint16(p[x.L3+4:], binary.BigEndian.Uint16(b[x.L3+4:])+uint16(id))
	}
	binary.BigEndian.PutUint32(p[x.L4+4:], x.Seq(b)+uint32(from))
	if from > 0 {
		p[x.L4+13] &^= CWR
	}
	if x.Data+to < x.End {
		p[x.L4+13] &^= PSH | FIN
	}
	y.FixChecksums(p)
	return dst
}

// Join appends to dst one segment with the payloads of the segments a and b,
// which must be adjacent: a's sequence number, everything else from b.
func (x *Info) Join(dst, a []byte, y *Info, b []byte) []byte {
	at := len(dst)
	dst = append(dst, b[:y.Data]...)
	dst = append(dst, x.Payload(a)...)
	dst = append(dst, y.Payload(b)...)
	p := dst[at:]
	z := *y
	z.End = len(p)
	z.putLengths(p)
	binary.BigEndian.PutUint32(p[z.L4+4:], x.Seq(a))
	p[z.L4+13] |= x.Flags(a) & CWR
	z.FixChecksums(p)
	return dst
}

func (x *Info) putLengths(p []byte) {
	if x.V6 {
		binary.BigEndian.PutUint16(p[x.L3+4:], uint16(x.End-x.L3-IPv6Len))
	} else {
		binary.BigEndian.PutUint16(p[x.L3+2:], uint16(x.End-x.L3))
	}
}

// Segment is a TCP segment to compose.
type Segment struct {
	SrcMAC, DstMAC net.HardwareAddr
	VLAN           uint16 // 802.1Q tag control, 0 for untagged
	Src, Dst       netip.AddrPort
	TOS, TTL       uint8 // TTL 0 stands for 64
	ID             uint16
	Seq, Ack       uint32
	Flags          uint8
	Window, Urgent uint16
	Options        []byte // padded here to a multiple of 4; at most 40 bytes
	Payload        []byte
}

// Append appends the frame of the segment, with checksums, to dst.
func (s *Segment) Append(dst []byte) []byte {
	at := len(dst)
	dst = append(dst, s.DstMAC...)
	dst = append(dst, s.SrcMAC...)
	x := Info{L3: EthLen, Proto: ProtoTCP, V6: s.Src.Addr().Is6(), TCP: true}
	if s.VLAN != 0 {
		dst = binary.BigEndian.AppendUint16(dst, EtherVLAN)
		dst = binary.BigEndian.AppendUint16(dst, s.VLAN)
		x.L3 += VLANLen
	}
	ttl := s.TTL
	if ttl == 0 {
		ttl = 64
	}
	opts := (len(s.Options) + 3) &^ 3
	n := TCPLen + opts + len(s.Payload)
	if x.V6 {
		x.L4 = x.L3 + IPv6Len
		dst = binary.BigEndian.AppendUint16(dst, EtherIPv6)
		dst = binary.BigEndian.AppendUint32(dst, 6<<28|uint32(s.TOS)<<20)
		dst = binary.BigEndian.AppendUint16(dst, uint16(n))
		dst = append(dst, ProtoTCP, ttl)
	} else {
		x.L4 = x.L3 + IPv4Len
		dst = binary.BigEndian.AppendUint16(dst, EtherIPv4)
		dst = append(dst, 0x45, s.TOS)
		dst = binary.BigEndian.AppendUint16(dst, uint16(IPv4Len+n))
		dst = binary.BigEndian.AppendUint16(dst, s.ID)
		dst = append(dst, 0x40, 0, ttl, ProtoTCP, 0, 0) // don't fragment
	}
	dst = append(dst, s.Src.Addr().AsSlice()...)
	dst = append(dst, s.Dst.Addr().AsSlice()...)
	dst = binary.BigEndian.AppendUint16(dst, s.Src.Port())
	dst = binary.BigEndian.AppendUint16(dst, s.Dst.Port())
	dst = binary.BigEndian.AppendUint32(dst, s.Seq)
	dst = binary.BigEndian.AppendUint32(dst, s.Ack)
	dst = append(dst, uint8(TCPLen+opts)/4<<4, s.Flags)
	dst = binary.BigEndian.AppendUint16(dst, s.Window)
	dst = append(dst, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, s.Urgent)
	dst = append(dst, s.Options...)
	for i := len(s.Options); i < opts; i++ {
		dst = append(dst, OptEnd)
	}
	x.Data = x.L4 + TCPLen + opts
	dst = append(dst, s.Payload...)
	x.End = len(dst) - at
	x.FixChecksums(dst[at:])
	return dst
}

// FixIPv4Checksum writes the header checksum of the IPv4 header b[l3:l4].
func FixIPv4Checksum(b []byte, l3, l4 int) { fixIPv4(b[l3:l4]) }

// AppendICMP appends to dst the frame, without MAC addresses, of an ICMP or
// ICMPv6 error that quotes the start of an IP packet. mtu is that of "packet too
// big" and "fragmentation needed".
func AppendICMP(dst []byte, from, to netip.Addr, typ, code uint8, mtu int, quoted []byte) []byte {
	at := len(dst)
	n := 8 + len(quoted)
	dst = append(dst, make([]byte, 12)...)
	x := Info{L3: EthLen, Proto: 1, V6: from.Is6()}
	if x.V6 {
		x.L4, x.Proto = EthLen+IPv6Len, ProtoICMPv6
		dst = binary.BigEndian.AppendUint16(dst, EtherIPv6)
		dst = binary.BigEndian.AppendUint32(dst, 6<<28)
		dst = binary.BigEndian.AppendUint16(dst, uint16(n))
		dst = append(dst, ProtoICMPv6, 64)
	} else {
		x.L4 = EthLen + IPv4Len
		dst = binary.BigEndian.AppendUint16(dst, EtherIPv4)
		dst = append(dst, 0x45, 0)
		dst = binary.BigEndian.AppendUint16(dst, uint16(IPv4Len+n))
		dst = append(dst, 0, 0, 0, 0, 64, x.Proto, 0, 0)
	}
	dst = append(append(dst, from.AsSlice()...), to.AsSlice()...)
	dst = append(dst, typ, code, 0, 0)
	dst = append(binary.BigEndian.AppendUint32(dst, uint32(mtu)), quoted...)
	p := dst[at:]
	x.End = len(p)
	if x.V6 {
		binary.BigEndian.PutUint16(p[x.L4+2:], ^fold(x.transportSum(p)))
	} else {
		fixIPv4(p[x.L3:x.L4])
		binary.BigEndian.PutUint16(p[x.L4+2:], ^fold(sum(p[x.L4:], 0)))
	}
	return dst
}
