package xdp

import (
	"encoding/binary"
	"net/netip"
)

// segment describes a TCP segment, or what the tests make of it.
type segment struct {
	src, dst netip.AddrPort
	vlans    []uint16 // 802.1Q tags, outermost first
	tagType  uint16   // instead of 0x8100
	flags    byte
	options  []byte // of TCP, padded to a multiple of 4
	ipOption []byte // IPv4 options
	fragment uint16 // IPv4 flags and offset
	extra    []byte // IPv6 extension headers, the first byte is the next header's type
	extType  byte   // type of the first of them
	payload  []byte
	srcMAC   [6]byte
	truncate int // bytes to leave off the end
}

const (
	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10
)

func (s segment) ethernet(proto uint16) []byte {
	b := append([]byte{2, 0, 0, 0, 0, 1}, s.srcMAC[:]...)
	tag := uint16(0x8100)
	if s.tagType != 0 {
		tag = s.tagType
	}
	for _, v := range s.vlans {
		b = binary.BigEndian.AppendUint16(b, tag)
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return binary.BigEndian.AppendUint16(b, proto)
}

func (s segment) tcp() []byte {
	b := binary.BigEndian.AppendUint16(nil, s.src.Port())
	b = binary.BigEndian.AppendUint16(b, s.dst.Port())
	b = append(b, 0, 0, 0, 1, 0, 0, 0, 0)
	options := append([]byte(nil), s.options...)
	for len(options)%4 != 0 {
		options = append(options, 1)
	}
	b = append(b, byte(20+len(options))<<2, s.flags, 0xff, 0xff, 0, 0, 0, 0)
	return append(append(b, options...), s.payload...)
}

// ip wraps l4 in an IP header.
func (s segment) ip(proto byte, l4 []byte) []byte {
	if s.src.Addr().Is4() {
		header := 20 + len(s.ipOption)
		b := []byte{0x40 | byte(header/4), 0}
		b = binary.BigEndian.AppendUint16(b, uint16(header+len(l4)))
		b = append(b, 0, 1)
		b = binary.BigEndian.AppendUint16(b, s.fragment)
		b = append(b, 64, proto, 0, 0)
		b = append(b, s.src.Addr().AsSlice()...)
		b = append(b, s.dst.Addr().AsSlice()...)
		b = append(b, s.ipOption...)
		binary.BigEndian.PutUint16(b[10:], ^fold(sum(0, b)))
		return append(b, l4...)
	}
	b := []byte{0x60, 0, 0, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.extra)+len(l4)))
	if len(s.extra) > 0 {
		proto = s.extType
	}
	b = append(b, proto, 64)
	b = append(b, s.src.Addr().AsSlice()...)
	b = append(b, s.dst.Addr().AsSlice()...)
	b = append(b, s.extra...)
	return append(b, l4...)
}

func (s segment) etherType() uint16 {
	if s.src.Addr().Is4() {
		return 0x0800
	}
	return 0x86dd
}

func (s segment) frame() []byte {
	b := append(s.ethernet(s.etherType()), s.ip(6, s.tcp())...)
	return b[:len(b)-s.truncate]
}

// icmp is an ICMP error that carries the first quoted bytes of s, sent by from
// to the source of s.
func (s segment) icmp(from netip.Addr, kind byte, quoted int) []byte {
	inner := s.ip(6, s.tcp())
	inner = inner[:min(quoted, len(inner))]
	outer := segment{src: netip.AddrPortFrom(from, 0), dst: s.src, vlans: s.vlans}
	proto := byte(1)
	if from.Is6() {
		proto = 58
	}
	return append(outer.ethernet(outer.etherType()), outer.ip(proto, append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, inner...))...)
}

func sum(initial uint32, b []byte) uint32 {
	for len(b) > 1 {
		initial += uint32(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		initial += uint32(b[0]) << 8
	}
	return initial
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// pseudoSum is the sum of the pseudo-header of a frame without tag, not
// complemented, and where its transport header starts.
func pseudoSum(frame []byte) (pseudo uint16, l4 int) {
	ip := frame[14:]
	if ip[0]>>4 == 4 {
		l4 = 14 + int(ip[0]&15)*4
		length := uint32(binary.BigEndian.Uint16(ip[2:])) - uint32(l4-14)
		return fold(sum(uint32(ip[9])+length, ip[12:20])), l4
	}
	length := uint32(binary.BigEndian.Uint16(ip[4:]))
	return fold(sum(uint32(ip[6])+length, ip[8:40])), 54
}
