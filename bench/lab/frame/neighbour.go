package frame

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// AppendARPRequest appends an ARP request (RFC 826) for target to dst.
func AppendARPRequest(dst []byte, mac net.HardwareAddr, self, target netip.Addr) []byte {
	dst = append(dst, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	dst = append(dst, mac...)
	dst = append(dst, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	dst = append(dst, mac...)
	dst = append(dst, self.AsSlice()...)
	dst = append(dst, 0, 0, 0, 0, 0, 0)
	return append(dst, target.AsSlice()...)
}

// AppendSolicitation appends an ND neighbour solicitation (RFC 4861 section 4.3)
// for target to dst.
func AppendSolicitation(dst []byte, mac net.HardwareAddr, self, target netip.Addr) []byte {
	t := target.As16()
	group := [16]byte{0xff, 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]}
	to := net.HardwareAddr{0x33, 0x33, 0xff, t[13], t[14], t[15]}
	return appendND(dst, 135, 0, mac, to, self.As16(), group, t, 1)
}

// appendND appends an ND message with a link-layer address option.
func appendND(dst []byte, typ, flags uint8, mac, to net.HardwareAddr, src, dstAddr, target [16]byte, opt uint8) []byte {
	at := len(dst)
	dst = append(dst, to...)
	dst = append(dst, mac...)
	dst = append(dst, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, ProtoICMPv6, 255)
	dst = append(dst, src[:]...)
	dst = append(dst, dstAddr[:]...)
	dst = append(dst, typ, 0, 0, 0, flags, 0, 0, 0)
	dst = append(dst, target[:]...)
	dst = append(dst, opt, 1)
	dst = append(dst, mac...)
	p := dst[at:]
	x := Info{L3: EthLen, L4: EthLen + IPv6Len, End: len(p), Proto: ProtoICMPv6, V6: true}
	binary.BigEndian.PutUint16(p[x.L4+2:], ^fold(x.transportSum(p)))
	return dst
}

// Neighbour is what a frame says about the link-layer address of an IP address.
type Neighbour struct {
	Addr netip.Addr
	MAC  net.HardwareAddr // a copy
}

// AnswerNeighbour handles ARP and ND for a host with the given addresses (either
// may be the zero Addr). learned is set when b is a request or an answer that
// names its sender; answer is the frame to send when b asks for one of the
// host's addresses, nil otherwise. Untagged frames only.
func AnswerNeighbour(b []byte, mac net.HardwareAddr, self ...netip.Addr) (learned Neighbour, answer []byte) {
	mine := func(a netip.Addr) bool {
		for _, s := range self {
			if s.IsValid() && s == a {
				return true
			}
		}
		return false
	}
	if len(b) < EthLen {
		return learned, nil
	}
	switch binary.BigEndian.Uint16(b[12:]) {
	case EtherARP:
		a := b[EthLen:]
		if len(a) < 28 || binary.BigEndian.Uint16(a[2:]) != EtherIPv4 || a[4] != 6 || a[5] != 4 {
			return learned, nil
		}
		sender, target := netip.AddrFrom4([4]byte(a[14:])), netip.AddrFrom4([4]byte(a[24:]))
		learned = Neighbour{sender, append(net.HardwareAddr(nil), a[8:14]...)}
		if binary.BigEndian.Uint16(a[6:]) != 1 || !mine(target) {
			return learned, nil
		}
		answer = append(answer, a[8:14]...)
		answer = append(answer, mac...)
		answer = append(answer, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
		answer = append(answer, mac...)
		answer = append(answer, a[24:28]...)
		answer = append(answer, a[8:18]...)
		return learned, answer
	case EtherIPv6:
		x, ok := Parse(b)
		if !ok || x.Proto != ProtoICMPv6 || x.End-x.L4 < 24 {
			return learned, nil
		}
		m := b[x.L4:x.End]
		var lladdr net.HardwareAddr
		for o := m[24:]; len(o) >= 8 && o[1] != 0 && int(o[1])*8 <= len(o); o = o[int(o[1])*8:] {
			if o[0] == 1 || o[0] == 2 {
				lladdr = append(net.HardwareAddr(nil), o[2:8]...)
			}
		}
		target := netip.AddrFrom16([16]byte(m[8:]))
		switch m[0] {
		case 135:
			src := x.addr(b, 0)
			if lladdr != nil && !src.IsUnspecified() {
				learned = Neighbour{src, lladdr}
			}
			if !mine(target) {
				return learned, nil
			}
			to := src.As16()
			if src.IsUnspecified() {
				to = [16]byte{0xff, 2, 15: 1}
			}
			const solicitedOverride = 0x60
			return learned, appendND(nil, 136, solicitedOverride, mac, append(net.HardwareAddr(nil), b[6:12]...), target.As16(), to, target.As16(), 2)
		case 136:
			if lladdr != nil {
				learned = Neighbour{target, lladdr}
			}
		}
	}
	return learned, nil
}
