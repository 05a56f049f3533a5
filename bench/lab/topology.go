package lab

import "net/netip"

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
