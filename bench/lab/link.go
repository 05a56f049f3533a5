package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// EndOptions are the properties of one end of a link. The zero value is an
// ordinary host interface.
type EndOptions struct {
	Name      string // interface name, default "eth0"
	NoAddress bool   // no IPv4 address, IPv6 off: for packet sockets and bridges
	NoOffload bool   // checksum, TSO, GSO and GRO off
	Queues    int    // receive and transmit queues, default 1
}

// LinkOptions are the properties of a veth pair.
type LinkOptions struct {
	MTU        int          // bytes, default 1500, both ends; below 1280 there is no IPv6
	Neighbours bool         // permanent neighbour entries, so that no ARP or ND is needed
	Net4       netip.Prefix // default 10.LAB.LINK.0/24; the ends get .1 and .2
	Net6       netip.Prefix // default fd00:LAB:LINK::/64; the ends get ::1 and ::2
	A, B       EndOptions
}

// Iface is a network interface in a namespace.
type Iface struct {
	NS    *Namespace
	Name  string
	Index int
	MAC   net.HardwareAddr
	MTU   int
	// IP4 and IP6 are the addresses with their prefix lengths. Without
	// address (EndOptions.NoAddress) the kernel does not have them; they are
	// the ones that are free for a user-space stack on the interface.
	IP4, IP6 netip.Prefix
}

// Addr4 returns the interface's IPv4 address.
func (i *Iface) Addr4() netip.Addr { return i.IP4.Addr() }

// Addr6 returns the interface's IPv6 address.
func (i *Iface) Addr6() netip.Addr { return i.IP6.Addr() }

// Connect joins two namespaces, or one with itself, by a veth pair. Both ends
// are up, with carrier and addresses ready for use, when it returns.
func (l *Lab) Connect(a, b *Namespace, o LinkOptions) (*Iface, *Iface, error) {
	if o.MTU == 0 {
		o.MTU = 1500
	}
	l.mu.Lock()
	closed := l.closed
	link := l.subnets
	l.subnets++
	l.mu.Unlock()
	if closed {
		return nil, nil, ErrClosed
	}
	if !o.Net4.IsValid() {
		o.Net4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(l.seq), byte(link), 0}), 24)
	}
	if !o.Net6.IsValid() {
		o.Net6 = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 2: byte(l.seq >> 8), 3: byte(l.seq), 4: byte(link >> 8), 5: byte(link)}), 64)
	}
	for _, e := range []*EndOptions{&o.A, &o.B} {
		if e.Name == "" {
			e.Name = "eth0"
		}
		if e.Queues == 0 {
			e.Queues = 1
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = o.A.Name
	attrs.MTU = o.MTU
	attrs.NumTxQueues, attrs.NumRxQueues = o.A.Queues, o.A.Queues
	veth := netlink.NewVeth(attrs)
	veth.PeerName = o.B.Name
	veth.PeerNamespace = netlink.NsFd(b.FD())
	veth.PeerMTU = uint32(o.MTU)
	veth.PeerNumTxQueues, veth.PeerNumRxQueues = uint32(o.B.Queues), uint32(o.B.Queues)
	if err := a.nl.LinkAdd(veth); err != nil {
		return nil, nil, privilege(fmt.Errorf("lab: veth between %s and %s: %w", a.short, b.short, err))
	}
	ia, err := a.setup(o.A, o.Net4, o.Net6, 1)
	if err != nil {
		return nil, nil, err
	}
	ib, err := b.setup(o.B, o.Net4, o.Net6, 2)
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(ia.awaitCarrier(), ib.awaitCarrier()); err != nil {
		return nil, nil, err
	}
	if o.Neighbours {
		if err := errors.Join(ia.AddNeighbour(ib.Addr4(), ib.MAC), ia.AddNeighbour(ib.Addr6(), ib.MAC),
			ib.AddNeighbour(ia.Addr4(), ia.MAC), ib.AddNeighbour(ia.Addr6(), ia.MAC)); err != nil {
			return nil, nil, err
		}
	}
	return ia, ib, nil
}

// setup finishes one end of a link: address number host of both networks,
// offloads, up.
func (n *Namespace) setup(e EndOptions, net4, net6 netip.Prefix, host byte) (*Iface, error) {
	i, err := n.Iface(e.Name)
	if err != nil {
		return nil, err
	}
	i.IP4, i.IP6 = hostAddress(net4, host), hostAddress(net6, host)
	if e.NoAddress {
		err := n.Sysctl("net/ipv6/conf/"+e.Name+"/disable_ipv6", "1")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
	} else {
		err := i.AddAddress(i.IP4)
		if i.MTU >= minMTU6 {
			err = errors.Join(err, i.AddAddress(i.IP6))
		}
		if err != nil {
			return nil, err
		}
	}
	if e.NoOffload {
		if err := i.SetOffload(false); err != nil {
			return nil, err
		}
	}
	return i, i.SetUp()
}

// minMTU6 is the least MTU at which a link carries IPv6 (RFC 8200 section 5).
const minMTU6 = 1280

func hostAddress(p netip.Prefix, host byte) netip.Prefix {
	b := p.Masked().Addr().AsSlice()
	b[len(b)-1] |= host
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, p.Bits())
}

// Iface finds an interface of the namespace by name. IP4 and IP6 of the result
// are not set.
func (n *Namespace) Iface(name string) (*Iface, error) {
	k, err := n.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("lab: interface %s of %s: %w", name, n.short, err)
	}
	a := k.Attrs()
	return &Iface{NS: n, Name: name, Index: a.Index, MAC: a.HardwareAddr, MTU: a.MTU}, nil
}

func (i *Iface) wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return privilege(fmt.Errorf("lab: %s of %s in %s: %w", what, i.Name, i.NS.short, err))
}

// SetGSOMaxSize sets how large the packets are that the stack hands to the interface
// to be cut, in bytes: more than 64 KiB is what is called BIG TCP.
func (i *Iface) SetGSOMaxSize(bytes int) error {
	nl, l := i.NS.nl, i.link()
	return i.wrap("GSO size", errors.Join(nl.LinkSetGSOMaxSize(l, bytes), nl.LinkSetGSOIPv4MaxSize(l, bytes)))
}

func (i *Iface) link() netlink.Link {
	a := netlink.NewLinkAttrs()
	a.Index, a.Name = i.Index, i.Name
	return &netlink.GenericLink{LinkAttrs: a, LinkType: "veth"}
}

// SetUp brings the interface up.
func (i *Iface) SetUp() error { return i.wrap("link up", i.NS.nl.LinkSetUp(i.link())) }

// SetDown takes the interface down; its IPv6 addresses go.
func (i *Iface) SetDown() error { return i.wrap("link down", i.NS.nl.LinkSetDown(i.link())) }

// SetMTU changes the MTU of this end, in bytes.
func (i *Iface) SetMTU(mtu int) error {
	err := i.NS.nl.LinkSetMTU(i.link(), mtu)
	if err == nil {
		i.MTU = mtu
	}
	return i.wrap("MTU", err)
}

// Delete removes the interface and, being a veth, its other end.
func (i *Iface) Delete() error { return i.wrap("delete", i.NS.nl.LinkDel(i.link())) }

// AddAddress gives the kernel an address on the interface, without duplicate
// address detection.
func (i *Iface) AddAddress(p netip.Prefix) error {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return i.wrap("address "+p.String(), i.NS.nl.AddrAdd(i.link(), a))
}

// AddNeighbour adds a permanent ARP or ND entry. On an interface without
// address of that family it does nothing.
func (i *Iface) AddNeighbour(a netip.Addr, mac net.HardwareAddr) error {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	have, err := i.NS.nl.AddrList(i.link(), family)
	if err != nil {
		return i.wrap("addresses", err)
	}
	if len(have) == 0 {
		return nil
	}
	return i.wrap("neighbour "+a.String(), i.NS.nl.NeighSet(&netlink.Neigh{
		LinkIndex: i.Index, Family: family, State: netlink.NUD_PERMANENT,
		IP: a.AsSlice(), HardwareAddr: mac,
	}))
}

// AddRoute adds a route through a gateway on the interface.
func (i *Iface) AddRoute(dst netip.Prefix, via netip.Addr) error {
	return i.wrap("route "+dst.String(), i.NS.nl.RouteAdd(&netlink.Route{
		LinkIndex: i.Index,
		Dst:       &net.IPNet{IP: dst.Masked().Addr().AsSlice(), Mask: net.CIDRMask(dst.Bits(), dst.Addr().BitLen())},
		Gw:        via.AsSlice(),
	}))
}

// Counters are an interface's packet counters.
type Counters struct {
	RxPackets, RxBytes, RxDropped uint64
	TxPackets, TxBytes, TxDropped uint64
}

// Counters reads the interface's counters.
func (i *Iface) Counters() (Counters, error) {
	k, err := i.NS.nl.LinkByIndex(i.Index)
	if err != nil {
		return Counters{}, i.wrap("counters", err)
	}
	s := k.Attrs().Statistics
	if s == nil {
		return Counters{}, i.wrap("counters", unix.ENODATA)
	}
	return Counters{
		RxPackets: s.RxPackets, RxBytes: s.RxBytes, RxDropped: s.RxDropped,
		TxPackets: s.TxPackets, TxBytes: s.TxBytes, TxDropped: s.TxDropped,
	}, nil
}
