package packet

import (
	"encoding/binary"
	"errors"
)

// ErrNotICMP: the frame is no ICMP or ICMPv6 message.
var ErrNotICMP = errors.New("packet: not ICMP")

// icmpHeader is the length in bytes of the header of an ICMP error, before the
// packet that it quotes.
const icmpHeader = 8

// ICMPError is a parsed view of an ICMP or ICMPv6 error about a TCP segment of
// this host's; it owns nothing.
type ICMPError struct {
	Frame  []byte // from the Ethernet header to the end of the IP packet, padding cut off
	L3, L4 int    // offsets of the IP and ICMP headers in Frame
	TCP    int    // offset in Frame of the quoted TCP header, of which there are 8 bytes or more
	V6     bool
	Key    Key
	Seq    uint32 // of the quoted segment
	TooBig bool   // the path takes packets of MTU bytes at most
	MTU    int
}

// ParseICMP reads a frame from the wire into e. It verifies the ICMP checksum.
// It fails with ErrNotICMP, and with ErrMalformed when the message is no error
// that quotes a TCP segment.
func ParseICMP(f []byte, e *ICMPError) error {
	var x L3Info
	if ParseL3(f, &x) != nil || x.Proto != 1 && x.Proto != 58 {
		return ErrNotICMP
	}
	ipLen := IPv4Len
	if x.V6 {
		ipLen = IPv6Len
	}
	f = f[:x.End:x.End]
	m := f[x.L4:]
	if len(m) < icmpHeader+ipLen+8 || x.V6 != (x.Proto == 58) || !ICMPChecksumOK(f, x.L3, x.L4, x.V6) {
		return ErrMalformed
	}
	quoted := m[icmpHeader:]
	k := Key{VLAN: x.VLAN}
	tcp := ipLen
	if x.V6 {
		if m[0] < 1 || m[0] > 4 || quoted[6] != 6 {
			return ErrMalformed
		}
		copy(k.Local[:], quoted[8:24])
		copy(k.Remote[:], quoted[24:40])
		e.TooBig, e.MTU = m[0] == 2, int(binary.BigEndian.Uint32(m[4:]))
	} else {
		if m[0] != 3 && m[0] != 11 && m[0] != 12 || quoted[9] != 6 {
			return ErrMalformed
		}
		k.Local = [16]byte{10: 0xff, 11: 0xff, 12: quoted[12], 13: quoted[13], 14: quoted[14], 15: quoted[15]}
		k.Remote = [16]byte{10: 0xff, 11: 0xff, 12: quoted[16], 13: quoted[17], 14: quoted[18], 15: quoted[19]}
		tcp = int(quoted[0]&15) * 4
		e.TooBig, e.MTU = m[0] == 3 && m[1] == 4, int(binary.BigEndian.Uint16(m[6:]))
	}
	if tcp < ipLen || len(quoted) < tcp+8 {
		return ErrMalformed
	}
	t := quoted[tcp:]
	k.LPort, k.RPort = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	e.Frame, e.L3, e.L4, e.TCP, e.V6 = f, x.L3, x.L4, x.L4+icmpHeader+tcp, x.V6
	e.Key, e.Seq = k, binary.BigEndian.Uint32(t[4:])
	return nil
}
