package doctor

import (
	"encoding/binary"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Of the generic netlink family "ethtool" (linux/ethtool_netlink.h).
const (
	ethtoolHeaderIndex = 1

	rssHeader    = 1
	rssIndir     = 4
	rssKey       = 5
	rssInputXfrm = 6

	// RXH_XFRM_SYM_XOR and RXH_XFRM_SYM_OR_XOR: the hardware makes source and
	// destination change places without effect.
	symmetricXfrm = 1<<0 | 1<<1
)

// readRSS asks the kernel for the spreading of an interface.
func readRSS(ifindex int) RSS {
	family, err := netlink.GenlFamilyGet("ethtool")
	if err != nil {
		return RSS{}
	}
	request := nl.NewNetlinkRequest(int(family.ID), 0)
	request.AddRawData([]byte{unix.ETHTOOL_MSG_RSS_GET, 1, 0, 0}) // command, version, reserved
	header := nl.NewRtAttr(rssHeader|unix.NLA_F_NESTED, nil)
	header.AddRtAttr(ethtoolHeaderIndex, nl.Uint32Attr(uint32(ifindex)))
	request.AddRawData(header.Serialize())
	messages, err := request.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(messages) == 0 || len(messages[0]) < nl.SizeofGenlmsg {
		return RSS{}
	}
	attributes, err := nl.ParseRouteAttr(messages[0][nl.SizeofGenlmsg:])
	if err != nil {
		return RSS{}
	}
	var indirection []uint32
	var key []byte
	var xfrm uint32
	for _, a := range attributes {
		switch {
		case a.Attr.Type == rssIndir:
			for b := a.Value; len(b) >= 4; b = b[4:] {
				indirection = append(indirection, binary.NativeEndian.Uint32(b))
			}
		case a.Attr.Type == rssKey:
			key = a.Value
		case a.Attr.Type == rssInputXfrm && len(a.Value) >= 4:
			xfrm = binary.NativeEndian.Uint32(a.Value)
		}
	}
	return describeRSS(indirection, key, xfrm)
}

func describeRSS(indirection []uint32, key []byte, xfrm uint32) RSS {
	r := RSS{Known: len(indirection) > 0, Symmetric: xfrm != ^uint32(0) && xfrm&symmetricXfrm != 0 || periodic(key)}
	for _, q := range indirection {
		if !slices.Contains(r.Queues, int(q)) {
			r.Queues = append(r.Queues, int(q))
		}
	}
	slices.Sort(r.Queues)
	return r
}

// periodic reports whether a Toeplitz key repeats every two bytes, which makes
// the hash of both directions of a connection the same.
func periodic(key []byte) bool {
	if len(key) < 4 {
		return false
	}
	for i, b := range key {
		if b != key[i%2] {
			return false
		}
	}
	return true
}
