package lab

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Options are the properties of Pair and Middle. The zero value is a 1500-byte
// cable with every kernel offload on.
type Options struct {
	MTU        int  // bytes, default 1500
	Queues     int  // of the hosts' interfaces, default 1
	NoOffload  bool // on both hosts: checksum, TSO, GSO and GRO off
	Neighbours bool // permanent neighbour entries
	A, B       EndOptions
}

func (o Options) ends() (a, b EndOptions) {
	a, b = o.A, o.B
	for _, e := range []*EndOptions{&a, &b} {
		e.NoOffload = e.NoOffload || o.NoOffload
		if e.Queues == 0 {
			e.Queues = o.Queues
		}
	}
	return a, b
}

// Pair is two hosts, in namespaces "a" and "b", joined by a veth.
type Pair struct {
	A, B *Iface
}

// Pair builds two hosts on one cable.
func (l *Lab) Pair(o Options) (*Pair, error) {
	a, err := l.Namespace("a")
	if err != nil {
		return nil, err
	}
	b, err := l.Namespace("b")
	if err != nil {
		return nil, err
	}
	ea, eb := o.ends()
	ia, ib, err := l.Connect(a, b, LinkOptions{MTU: o.MTU, Neighbours: o.Neighbours, A: ea, B: eb})
	if err != nil {
		return nil, err
	}
	return &Pair{A: ia, B: ib}, nil
}

// Path is two hosts, in namespaces "a" and "b", with namespace "mid" between
// them. The hosts are in one subnet: something has to bridge the two middle
// interfaces, which have no addresses, before they see each other.
type Path struct {
	A, B       *Iface
	Mid        *Namespace
	MidA, MidB *Iface // "a" and "b" in Mid, the far ends of the hosts' cables
}

// Middle builds two hosts with a namespace between them, in which a Forwarder
// or a gateway can run.
func (l *Lab) Middle(o Options) (*Path, error) {
	var ns [3]*Namespace
	for i, name := range []string{"a", "mid", "b"} {
		var err error
		if ns[i], err = l.Namespace(name); err != nil {
			return nil, err
		}
	}
	ea, eb := o.ends()
	middle := func(name string, e EndOptions) EndOptions {
		return EndOptions{Name: name, NoAddress: true, NoOffload: true, Queues: e.Queues}
	}
	net4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(l.seq), 255, 0}), 24)
	net6 := netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 2: byte(l.seq >> 8), 3: byte(l.seq), 4: 0xff, 5: 0xff}), 64)
	ia, ma, err := l.Connect(ns[0], ns[1], LinkOptions{MTU: o.MTU, Net4: net4, Net6: net6, A: ea, B: middle("a", ea)})
	if err != nil {
		return nil, err
	}
	mb, ib, err := l.Connect(ns[1], ns[2], LinkOptions{MTU: o.MTU, Net4: net4, Net6: net6, A: middle("b", eb), B: eb})
	if err != nil {
		return nil, err
	}
	if o.Neighbours {
		for _, e := range [][2]*Iface{{ia, ib}, {ib, ia}} {
			for _, addr := range []netip.Addr{e[1].Addr4(), e[1].Addr6()} {
				if err := e[0].AddNeighbour(addr, e[1].MAC); err != nil {
					return nil, err
				}
			}
		}
	}
	return &Path{A: ia, B: ib, Mid: ns[1], MidA: ma, MidB: mb}, nil
}

// A Site is a host and, between it and the rest of a path, a namespace for a
// gateway or a bridge, which has an interface to either side.
type Site struct {
	Host         *Iface
	Outer, Inner *Iface
}

// Behind puts a host, in namespaces "ha" and "hb", behind each end of a path, with
// so many queues. The hosts are in one subnet. They send whole packets with
// checksums, as XDP that forwards between veths needs it.
func (l *Lab) Behind(ends [2]*Iface, queues int) (sites [2]Site, err error) {
	o := LinkOptions{
		Net4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(l.seq), 254, 0}), 24),
		Net6: netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 2: byte(l.seq >> 8), 3: byte(l.seq), 4: 0xff, 5: 0xfe}), 64),
	}
	inner := EndOptions{Name: "eth1", NoAddress: true, Queues: queues}
	host := EndOptions{Queues: queues}
	for i, end := range ends {
		s := &sites[i]
		s.Outer = end
		ns, err := l.Namespace([]string{"ha", "hb"}[i])
		if err != nil {
			return sites, err
		}
		if i == 0 {
			o.A, o.B = host, inner
			s.Host, s.Inner, err = l.Connect(ns, end.NS, o)
		} else {
			o.A, o.B = inner, host
			s.Inner, s.Host, err = l.Connect(end.NS, ns, o)
		}
		if err != nil {
			return sites, err
		}
		for _, f := range []Feature{TSO, GSO, TxChecksum} {
			if err := s.Host.SetFeature(f, false); err != nil {
				return sites, err
			}
		}
		if err := s.Host.SetFeature(GRO, true); err != nil {
			return sites, err
		}
	}
	return sites, nil
}

// Bridge joins interfaces of the namespace by a bridge of the kernel.
func (n *Namespace) Bridge(name string, ports ...*Iface) error {
	a := netlink.NewLinkAttrs()
	a.Name = name
	br := &netlink.Bridge{LinkAttrs: a}
	if err := n.nl.LinkAdd(br); err != nil {
		return privilege(fmt.Errorf("lab: bridge %s in %s: %w", name, n.short, err))
	}
	for _, p := range ports {
		if err := n.nl.LinkSetMaster(p.link(), br); err != nil {
			return p.wrap("bridge "+name, err)
		}
	}
	if err := n.nl.LinkSetUp(br); err != nil {
		return privilege(fmt.Errorf("lab: bridge %s in %s: %w", name, n.short, err))
	}
	return nil
}
