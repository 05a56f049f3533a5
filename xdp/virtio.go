package xdp

import "encoding/binary"

var nativeEndian = binary.NativeEndian

// VnetHdrLen is the length in bytes of the header before each packet of a TAP
// queue (struct virtio_net_hdr_mrg_rxbuf).
const VnetHdrLen = 12

// Values of VnetHdr.Flags and VnetHdr.GSOType.
const (
	VnetNeedsCsum = 1 // the checksum field holds the pseudo-header's sum
	VnetDataValid = 2 // the checksum is known to be right

	VnetGSONone  = 0
	VnetGSOTCPv4 = 1
	VnetGSOTCPv6 = 4
	VnetGSOECN   = 0x80 // or-ed to the type: the first segment has CWR
)

// VnetHdr is the virtio-net header of a packet.
type VnetHdr struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // bytes of all headers from Ethernet on; a hint for GSO packets
	GSOSize    uint16 // payload bytes of a segment
	CsumStart  uint16 // offset of the first summed byte from the Ethernet header
	CsumOffset uint16 // offset of the checksum field from CsumStart
}

// Put writes h to the first VnetHdrLen bytes of b.
func (h VnetHdr) Put(b []byte) {
	_ = b[VnetHdrLen-1]
	b[0], b[1] = h.Flags, h.GSOType
	binary.LittleEndian.PutUint16(b[2:], h.HdrLen)
	binary.LittleEndian.PutUint16(b[4:], h.GSOSize)
	binary.LittleEndian.PutUint16(b[6:], h.CsumStart)
	binary.LittleEndian.PutUint16(b[8:], h.CsumOffset)
	b[10], b[11] = 0, 0 // num_buffers: the kernel neither sets nor reads it
}

// ParseVnetHdr reads the first VnetHdrLen bytes of b.
func ParseVnetHdr(b []byte) VnetHdr {
	_ = b[VnetHdrLen-1]
	return VnetHdr{
		Flags:      b[0],
		GSOType:    b[1],
		HdrLen:     binary.LittleEndian.Uint16(b[2:]),
		GSOSize:    binary.LittleEndian.Uint16(b[4:]),
		CsumStart:  binary.LittleEndian.Uint16(b[6:]),
		CsumOffset: binary.LittleEndian.Uint16(b[8:]),
	}
}
