package xdp

import (
	"encoding/binary"
	"net/netip"
)

// A FlowKey names a TCP connection of this host, in the layout of struct
// flow_key of the eBPF programs: local and remote address (16 bytes each, IPv4
// mapped), local and remote port (big endian), VLAN identifier without
// priority (native order, 0 is none), two zero bytes.
type FlowKey = [KeySize]byte

// KeySize is the length in bytes of a FlowKey.
const KeySize = 40

// NewFlowKey returns the key of the connection between two addresses. Zones
// are ignored.
func NewFlowKey(local, remote netip.AddrPort, vlan uint16) FlowKey {
	var k FlowKey
	l, r := local.Addr().As16(), remote.Addr().As16()
	copy(k[0:], l[:])
	copy(k[16:], r[:])
	binary.BigEndian.PutUint16(k[32:], local.Port())
	binary.BigEndian.PutUint16(k[34:], remote.Port())
	nativeEndian.PutUint16(k[36:], vlan&0xfff)
	return k
}

// SplitFlowKey is the inverse of NewFlowKey; IPv4 addresses come unmapped.
func SplitFlowKey(k FlowKey) (local, remote netip.AddrPort, vlan uint16) {
	local = netip.AddrPortFrom(netip.AddrFrom16([16]byte(k[0:16])).Unmap(), binary.BigEndian.Uint16(k[32:]))
	remote = netip.AddrPortFrom(netip.AddrFrom16([16]byte(k[16:32])).Unmap(), binary.BigEndian.Uint16(k[34:]))
	return local, remote, nativeEndian.Uint16(k[36:])
}
