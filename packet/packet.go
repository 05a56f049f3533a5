// Package packet reads and writes the headers that the rest of the program
// works on: Ethernet with at most one VLAN tag, IPv4, IPv6 without extension
// headers, and TCP with its options. It knows nothing of encryption and keeps
// no state, so both the slow path and the fast path use it.
//
// Nothing here allocates; every slice returned points into the frame that was
// given, and lives as long as that frame's buffer.
package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// TCP flags, as they stand in byte 13 of the header (RFC 9293 section 3.1).
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

// Header and option sizes in bytes.
const (
	EthLen     = 14
	VLANLen    = 4
	IPv4Len    = 20
	IPv6Len    = 40
	TCPLen     = 20
	MaxOptions = 40
	// MaxHeaders is the longest header Compose writes: Ethernet, one VLAN
	// tag, IPv6, TCP with all its options.
	MaxHeaders = EthLen + VLANLen + IPv6Len + TCPLen + MaxOptions
)

// TCP option kinds.
const (
	OptEnd       = 0
	OptNOP       = 1
	OptMSS       = 2
	OptWScale    = 3
	OptSACKOK    = 4
	OptSACK      = 5
	OptTimestamp = 8
	OptMD5       = 19
	OptAO        = 29
	OptMPTCP     = 30
	OptTFO       = 34
	OptENO       = 69 // RFC 8547 section 4.1
	OptExp1      = 253
	OptExp2      = 254
)

// Direction tells which address of a packet is this host's.
type Direction uint8

const (
	// FromOuter: the packet came from the wire, its destination is local.
	FromOuter Direction = iota
	// FromInner: the packet came from the local stack, its source is local.
	FromInner
)

// String returns "outer" or "inner".
func (d Direction) String() string {
	if d == FromOuter {
		return "outer"
	}
	return "inner"
}

// Key names a flow as this host sees it. IPv4 addresses are stored v4-mapped.
// It is comparable and can be a map key.
type Key struct {
	Local, Remote [16]byte
	LPort, RPort  uint16
	VLAN          uint16 // 802.1Q tag control without priority, 0 for untagged
}

// KeySize is the length in bytes of a Key in the BPF maps.
const KeySize = 40

// Bytes returns the key in the layout of struct flow_key of the BPF programs:
// local and remote address, both ports in network order, VLAN in host order,
// two zero bytes.
func (k *Key) Bytes() (b [KeySize]byte) {
	copy(b[0:16], k.Local[:])
	copy(b[16:32], k.Remote[:])
	binary.BigEndian.PutUint16(b[32:], k.LPort)
	binary.BigEndian.PutUint16(b[34:], k.RPort)
	binary.NativeEndian.PutUint16(b[36:], k.VLAN)
	return b
}

// KeyFromBytes is the inverse of Bytes.
func KeyFromBytes(b [KeySize]byte) (k Key) {
	copy(k.Local[:], b[0:16])
	copy(k.Remote[:], b[16:32])
	k.LPort = binary.BigEndian.Uint16(b[32:])
	k.RPort = binary.BigEndian.Uint16(b[34:])
	k.VLAN = binary.NativeEndian.Uint16(b[36:])
	return k
}

// KeyOf builds the key of an untagged flow from its two endpoints.
func KeyOf(local, remote netip.AddrPort) Key {
	return Key{Local: local.Addr().As16(), Remote: remote.Addr().As16(), LPort: local.Port(), RPort: remote.Port()}
}

// LocalAddr returns the local endpoint, IPv4 unmapped.
func (k *Key) LocalAddr() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(k.Local).Unmap(), k.LPort)
}

// RemoteAddr returns the remote endpoint, IPv4 unmapped.
func (k *Key) RemoteAddr() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(k.Remote).Unmap(), k.RPort)
}

// String returns "local-remote", with the VLAN when there is one.
func (k Key) String() string {
	if k.VLAN != 0 {
		return fmt.Sprintf("%s-%s vlan %d", k.LocalAddr(), k.RemoteAddr(), k.VLAN)
	}
	return fmt.Sprintf("%s-%s", k.LocalAddr(), k.RemoteAddr())
}

// Hash mixes the key into 64 bits; two hosts get unrelated values.
func (k *Key) Hash() uint64 {
	const m = 0x9e3779b97f4a7c15
	h := binary.LittleEndian.Uint64(k.Local[8:]) * m
	h ^= h >> 29
	h = (h + binary.LittleEndian.Uint64(k.Remote[8:])) * m
	h ^= h >> 31
	h = (h ^ binary.LittleEndian.Uint64(k.Local[:])) * m
	h ^= h >> 29
	h = (h ^ binary.LittleEndian.Uint64(k.Remote[:])) * m
	h ^= h >> 31
	h = (h ^ uint64(k.LPort)<<32 ^ uint64(k.RPort)<<16 ^ uint64(k.VLAN)) * m
	return h ^ h>>32
}

// Reasons why a frame is not a TCP segment that can be worked on.
var (
	ErrTruncated = errors.New("packet: frame shorter than its headers say")
	ErrNotTCP    = errors.New("packet: not TCP")
	ErrFragment  = errors.New("packet: IP fragment")
	ErrExtHeader = errors.New("packet: IPv6 extension header")
	ErrMalformed = errors.New("packet: malformed header")
)

// Segment is a parsed view of one TCP segment; it owns nothing.
type Segment struct {
	Frame  []byte // from the Ethernet header to the end of the IP packet, padding cut off
	L3, L4 int    // offsets of the IP and TCP headers in Frame
	Data   int    // offset of the payload in Frame
	V6     bool
	TOS    uint8 // traffic class: DSCP and ECN
	Flags  uint8
	HasTS  bool
	NSACK  uint8
	Key    Key

	Seq, Ack     uint32
	Wnd, Urg     uint16
	TSval, TSecr uint32
	SACK         [4][2]uint32 // left and right edges, NSACK of them
}

// Payload returns the segment's data.
func (s *Segment) Payload() []byte { return s.Frame[s.Data:] }

// Len returns the number of payload bytes.
func (s *Segment) Len() int { return len(s.Frame) - s.Data }

// Options returns the TCP option bytes.
func (s *Segment) Options() []byte { return s.Frame[s.L4+TCPLen : s.Data] }

// Src and Dst return the packet's addresses, 4 or 16 bytes.
func (s *Segment) Src() []byte {
	if s.V6 {
		return s.Frame[s.L3+8 : s.L3+24]
	}
	return s.Frame[s.L3+12 : s.L3+16]
}

// Dst returns the destination address, 4 or 16 bytes.
func (s *Segment) Dst() []byte {
	if s.V6 {
		return s.Frame[s.L3+24 : s.L3+40]
	}
	return s.Frame[s.L3+16 : s.L3+20]
}

// L3Info is what ParseL3 finds out.
type L3Info struct {
	L3, L4 int
	End    int // end of the IP packet in the frame
	Proto  uint8
	V6     bool
	VLAN   uint16
}

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherVLAN = 0x8100
)

// ParseL3 finds the layer 4 header of an IPv4 or IPv6 packet. It refuses
// fragments and extension headers.
func ParseL3(f []byte, x *L3Info) error {
	if len(f) < EthLen {
		return ErrTruncated
	}
	et := binary.BigEndian.Uint16(f[12:])
	l3 := EthLen
	x.VLAN = 0
	if et == etherVLAN {
		if len(f) < EthLen+VLANLen {
			return ErrTruncated
		}
		x.VLAN = binary.BigEndian.Uint16(f[14:]) & 0xfff
		et = binary.BigEndian.Uint16(f[16:])
		l3 += VLANLen
	}
	x.L3 = l3
	switch et {
	case etherIPv4:
		if len(f) < l3+IPv4Len {
			return ErrTruncated
		}
		ihl := int(f[l3]&15) * 4
		tot := int(binary.BigEndian.Uint16(f[l3+2:]))
		if f[l3]>>4 != 4 || ihl < IPv4Len || tot < ihl {
			return ErrMalformed
		}
		if l3+tot > len(f) {
			return ErrTruncated
		}
		x.V6, x.L4, x.End, x.Proto = false, l3+ihl, l3+tot, f[l3+9]
		if binary.BigEndian.Uint16(f[l3+6:])&0x3fff != 0 {
			return ErrFragment
		}
	case etherIPv6:
		if len(f) < l3+IPv6Len {
			return ErrTruncated
		}
		pl := int(binary.BigEndian.Uint16(f[l3+4:]))
		if f[l3]>>4 != 6 {
			return ErrMalformed
		}
		if l3+IPv6Len+pl > len(f) {
			return ErrTruncated
		}
		x.V6, x.L4, x.End, x.Proto = true, l3+IPv6Len, l3+IPv6Len+pl, f[l3+6]
		switch x.Proto {
		case 44:
			return ErrFragment
		case 0, 43, 60, 135:
			return ErrExtHeader
		}
	default:
		return ErrNotTCP
	}
	return nil
}

// Parse reads a frame into s. It does not verify checksums. Options are read as
// far as they fit into the header: what follows one that does not is ignored,
// as Linux does, so that no segment is lost for it (RFC 9293 section 3.1).
func Parse(f []byte, dir Direction, s *Segment) error {
	var x L3Info
	if err := ParseL3(f, &x); err != nil {
		return err
	}
	if x.Proto != 6 {
		return ErrNotTCP
	}
	l4 := x.L4
	if l4+TCPLen > x.End {
		return ErrTruncated
	}
	t := f[l4:x.End]
	hl := int(t[12]>>4) * 4
	if hl < TCPLen || hl > len(t) {
		return ErrMalformed
	}
	s.Frame, s.L3, s.L4, s.Data, s.V6 = f[:x.End:x.End], x.L3, l4, l4+hl, x.V6
	s.Seq = binary.BigEndian.Uint32(t[4:])
	s.Ack = binary.BigEndian.Uint32(t[8:])
	s.Flags = t[13]
	s.Wnd = binary.BigEndian.Uint16(t[14:])
	s.Urg = binary.BigEndian.Uint16(t[18:])
	s.HasTS, s.NSACK = false, 0
	sp, dp := binary.BigEndian.Uint16(t[0:]), binary.BigEndian.Uint16(t[2:])
	k := &s.Key
	k.VLAN = x.VLAN
	src, dst := &k.Remote, &k.Local
	if dir == FromInner {
		src, dst = dst, src
		k.LPort, k.RPort = sp, dp
	} else {
		k.LPort, k.RPort = dp, sp
	}
	ip := f[x.L3:]
	if x.V6 {
		s.TOS = ip[0]<<4 | ip[1]>>4
		copy(src[:], ip[8:24])
		copy(dst[:], ip[24:40])
	} else {
		s.TOS = ip[1]
		mapV4(src, ip[12:])
		mapV4(dst, ip[16:])
	}
	o := t[TCPLen:hl]
	if len(o) == 12 && binary.BigEndian.Uint32(o) == 0x0101080a {
		s.HasTS = true
		s.TSval = binary.BigEndian.Uint32(o[4:])
		s.TSecr = binary.BigEndian.Uint32(o[8:])
		return nil
	}
	s.parseOptions(o)
	return nil
}

// mapV4 stores the IPv4 address at ip v4-mapped: in words as Hash reads them, since
// a word that was just stored in bytes must get to the cache before it can be read.
func mapV4(a *[16]byte, ip []byte) {
	le := binary.LittleEndian
	le.PutUint64(a[:], 0)
	le.PutUint64(a[8:], uint64(le.Uint32(ip))<<32|0xffff<<16)
}

func (s *Segment) parseOptions(o []byte) {
	for len(o) > 0 {
		switch o[0] {
		case OptEnd:
			return
		case OptNOP:
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return
		}
		n := int(o[1])
		switch {
		case o[0] == OptTimestamp && n == 10:
			s.HasTS = true
			s.TSval = binary.BigEndian.Uint32(o[2:])
			s.TSecr = binary.BigEndian.Uint32(o[6:])
		case o[0] == OptSACK && n >= 10 && (n-2)%8 == 0 && s.Flags&SYN == 0:
			for i := 2; i < n && s.NSACK < 4; i += 8 {
				s.SACK[s.NSACK] = [2]uint32{binary.BigEndian.Uint32(o[i:]), binary.BigEndian.Uint32(o[i+4:])}
				s.NSACK++
			}
		}
		o = o[n:]
	}
}

// WalkOptions calls fn for each option of o other than NOP with its whole
// bytes (kind and length included) until fn returns false or the end of the
// list. It returns ErrMalformed when an option does not fit.
func WalkOptions(o []byte, fn func(opt []byte) bool) error {
	for len(o) > 0 {
		switch o[0] {
		case OptEnd:
			return nil
		case OptNOP:
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return ErrMalformed
		}
		if !fn(o[:o[1]:o[1]]) {
			return nil
		}
		o = o[o[1]:]
	}
	return nil
}

// SeqDiff returns a-b as a signed distance in sequence space.
func SeqDiff(a, b uint32) int32 { return int32(a - b) }

// TSOlder reports whether a timestamp is older than recent, the newest one of the
// same host's, so that its segment is an old duplicate (RFC 7323 section 5). After
// 0 none is: some stacks have that in their SYN, whatever their clock says next,
// and Linux makes the same exception.
func TSOlder(tsval, recent uint32) bool { return recent != 0 && SeqDiff(tsval, recent) < 0 }
