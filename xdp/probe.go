package xdp

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Capabilities is what can be known of a network device before anything is
// attached to it.
type Capabilities struct {
	Kernel    string // release
	Interface string
	Ifindex   int
	Driver    string // as ethtool -i tells; the kind of device where it does not
	MTU       int    // bytes

	// Virtual: packets may come from the same host, without a full checksum
	// (only the pseudo-header's sum), and longer than the MTU in ModeGeneric.
	Virtual  bool
	Loopback bool // the device on which the host talks to itself

	// NoEthernet: packets have no Ethernet header, as on tunnels (TUN, WireGuard,
	// PPP).
	NoEthernet bool

	RXQueues, TXQueues int // in use

	NativeXDP   bool // XDP with redirection in the driver
	MultiBuffer bool // native XDP for packets of several buffers

	// ZeroCopy is what the driver announces; whether a queue has it, only
	// binding a socket tells.
	ZeroCopy         bool
	ZeroCopySegments int  // descriptors of a zero-copy packet, at least 1
	TXChecksum       bool // checksum requests in zero-copy mode; in copy mode they always work

	// VLANStripped: the device takes the VLAN tag off received packets before
	// XDP sees them, which AttachHost cannot keep it from, and devices for VLANs
	// exist on it: XDP cannot tell their packets from untagged ones.
	VLANStripped bool

	Reasons []string // in words, why something above is missing
}

// Probe tells what a network device of the calling thread's network namespace
// can do. It changes nothing and needs no privilege.
func Probe(ifname string) (Capabilities, error) {
	c := Capabilities{Interface: ifname, RXQueues: 1, TXQueues: 1}
	link, err := FindLink(ifname)
	if err != nil {
		return c, err
	}
	if c.Kernel, _, _, err = kernelRelease(); err != nil {
		return c, err
	}
	c.Ifindex, c.MTU = link.Attrs().Index, link.Attrs().MTU
	c.Driver = link.Type()
	c.Loopback = link.Attrs().RawFlags&unix.IFF_LOOPBACK != 0
	c.NoEthernet = link.Attrs().EncapType != "ether" && !c.Loopback
	c.Virtual = link.Type() != "device" || c.Loopback

	tool, err := ethtool.NewEthtool()
	if err != nil {
		return c, fmt.Errorf("xdp: interface %s: %w", ifname, err)
	}
	defer tool.Close()
	if driver, err := tool.DriverName(ifname); err == nil && driver != "" {
		c.Driver = driver
	}
	// These pass the partial checksums of other guests of the same host.
	c.Virtual = c.Virtual || c.Driver == "virtio_net" || c.Driver == "vif"
	channels, err := tool.GetChannels(ifname)
	if err == nil {
		c.TXQueues = max(1, int(channels.TxCount+channels.CombinedCount))
	}
	if c.RXQueues, err = receiveQueues(tool, link, channels, err); err != nil {
		c.RXQueues = 1
	}

	f := deviceFeatures(c.Ifindex)
	if f.unknown != nil {
		c.Reasons = append(c.Reasons, fmt.Sprintf("the kernel does not tell the driver's XDP features: %v", f.unknown))
	}
	const native = featureBasic | featureRedirect
	c.NativeXDP = f.xdp&native == native && nativeAllowed(link) == nil
	c.MultiBuffer = c.NativeXDP && f.xdp&featureRXFragments != 0
	c.ZeroCopy = c.NativeXDP && f.xdp&featureZeroCopy != 0
	c.ZeroCopySegments = max(1, f.segments)
	c.TXChecksum = f.txChecksum
	for _, r := range []struct {
		has    bool
		reason string
	}{
		{c.NativeXDP, "no native XDP"},
		{c.ZeroCopy, "no zero-copy AF_XDP"},
		{!c.ZeroCopy || c.TXChecksum, "no transmit checksums in zero-copy mode"},
	} {
		if !r.has && f.unknown == nil {
			c.Reasons = append(c.Reasons, fmt.Sprintf("driver %s has %s", c.Driver, r.reason))
		}
	}

	if states, err := tool.FeaturesWithState(ifname); err == nil && losesTags(link, states[stripTags]) && hasVLANs(c.Ifindex) {
		c.VLANStripped = true
		c.Reasons = append(c.Reasons, fmt.Sprintf("%s strips VLAN tags before XDP, and cannot be kept from it", ifname))
	}
	return c, nil
}

// ReceiveQueues returns how many queues a device of the calling thread's network
// namespace receives on: at least 1.
func ReceiveQueues(ifname string) (int, error) {
	link, err := FindLink(ifname)
	if err != nil {
		return 0, err
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return 0, fmt.Errorf("xdp: interface %s: %w", ifname, err)
	}
	defer tool.Close()
	channels, err := tool.GetChannels(ifname)
	n, err := receiveQueues(tool, link, channels, err)
	if err != nil {
		return 0, fmt.Errorf("xdp: queues of interface %s: %w", ifname, err)
	}
	return n, nil
}

// receiveQueues is ReceiveQueues, given the device's channels or why they are not
// known.
func receiveQueues(tool *ethtool.Ethtool, link netlink.Link, c ethtool.Channels, err error) (int, error) {
	a := link.Attrs()
	switch {
	case err == nil:
		return max(1, int(c.RxCount+c.CombinedCount)), nil
	case !errors.Is(err, unix.EOPNOTSUPP):
		return 0, err
	case a.NumRxQueues <= 1:
		return 1, nil
	case link.Type() == "device":
		// Its driver tells the kernel alone.
		queues, err := filepath.Glob("/sys/class/net/" + a.Name + "/queues/rx-*")
		return max(1, len(queues)), err
	}
	// A bond or the like passes packets on with the number of the queue on which a
	// port received them.
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return 0, err
	}
	n := 1
	for _, l := range links {
		if l.Attrs().MasterIndex == a.Index {
			if c, err := tool.GetChannels(l.Attrs().Name); err == nil {
				n = max(n, int(c.RxCount+c.CombinedCount))
			}
		}
	}
	return min(n, a.NumRxQueues), nil
}

// hasVLANs reports whether there are VLAN devices on a device.
func hasVLANs(ifindex int) bool {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return true
	}
	for _, l := range links {
		if l.Type() == "vlan" && l.Attrs().ParentIndex == ifindex {
			return true
		}
	}
	return false
}

// Of the generic netlink family "netdev" (linux/netdev.h).
const (
	netdevDevGet = 1

	netdevIfindex     = 1
	netdevXDPFeatures = 3
	netdevZCSegments  = 4
	netdevXSKFeatures = 6

	featureBasic       = 1 << 0
	featureRedirect    = 1 << 1
	featureZeroCopy    = 1 << 3
	featureRXFragments = 1 << 5

	xskTXChecksum = 1 << 1
)

type features struct {
	xdp        uint64
	segments   int
	txChecksum bool
	unknown    error // why the kernel did not tell
}

// deviceFeatures asks the kernel for what a driver announces.
func deviceFeatures(ifindex int) (f features) {
	family, err := netlink.GenlFamilyGet("netdev")
	if err != nil {
		return features{unknown: err}
	}
	request := nl.NewNetlinkRequest(int(family.ID), 0)
	request.AddRawData([]byte{netdevDevGet, 1, 0, 0}) // command, version, reserved
	request.AddRawData(nl.NewRtAttr(netdevIfindex, nl.Uint32Attr(uint32(ifindex))).Serialize())
	messages, err := request.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return features{unknown: err}
	}
	for _, m := range messages {
		if len(m) < nl.SizeofGenlmsg {
			continue
		}
		attributes, err := nl.ParseRouteAttr(m[nl.SizeofGenlmsg:])
		if err != nil {
			return features{unknown: err}
		}
		for _, a := range attributes {
			switch {
			case a.Attr.Type == netdevXDPFeatures && len(a.Value) >= 8:
				f.xdp = nativeEndian.Uint64(a.Value)
			case a.Attr.Type == netdevZCSegments && len(a.Value) >= 4:
				f.segments = int(nativeEndian.Uint32(a.Value))
			case a.Attr.Type == netdevXSKFeatures && len(a.Value) >= 8:
				f.txChecksum = nativeEndian.Uint64(a.Value)&xskTXChecksum != 0
			}
		}
	}
	return f
}
