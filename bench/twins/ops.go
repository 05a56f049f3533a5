package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// operation is something that an administrator does to a host while connections
// are in use: to the same host of both pairs.
type operation struct {
	name string
	do   func(ctx context.Context, p *pair, host int) error
}

// byNetlink is an operation on the interface.
func byNetlink(name string, do func(nl *netlink.Handle, dev netlink.Link) error) operation {
	return operation{name, func(_ context.Context, p *pair, host int) error {
		h := p.hosts[host]
		nl := h.NS.Netlink()
		dev, err := nl.LinkByName(h.Name)
		if err != nil {
			return err
		}
		return do(nl, dev)
	}}
}

// newOperation draws one. n is its number in the world, for names that have to be
// new.
func newOperation(rng *rand.Rand, n int) operation {
	switch rng.IntN(13) {
	case 0:
		mtu := pick(rng, 1280, 1300, 1400, 1500, 1500)
		return byNetlink(fmt.Sprintf("MTU %d", mtu), func(nl *netlink.Handle, dev netlink.Link) error { return nl.LinkSetMTU(dev, mtu) })
	case 1:
		d := time.Duration(rng.Int64N(int64(400 * time.Millisecond)))
		return operation{fmt.Sprintf("down for %v", d), func(_ context.Context, p *pair, host int) error { return p.flap(host, d) }}
	case 2:
		f, on := pick(rng, lab.TxChecksum, lab.TSO, lab.GSO, lab.GRO), rng.IntN(2) == 0
		return operation{fmt.Sprintf("%v %v", f, on), func(_ context.Context, p *pair, host int) error { return p.hosts[host].SetFeature(f, on) }}
	case 3:
		return newQdisc(rng)
	case 4:
		r := pick(rng, netlink.Route{MTU: 1400}, netlink.Route{MTU: 1300, MTULock: true}, netlink.Route{AdvMSS: 600}, netlink.Route{RtoMin: 5},
			netlink.Route{QuickACK: 1}, netlink.Route{InitCwnd: 2}, netlink.Route{Congctl: "reno"}, netlink.Route{})
		return operation{fmt.Sprintf("route with MTU %d lock %v advmss %d rto_min %d quickack %d initcwnd %d congctl %q", r.MTU, r.MTULock, r.AdvMSS, r.RtoMin,
			r.QuickACK, r.InitCwnd, r.Congctl), func(_ context.Context, p *pair, host int) error { return p.route(host, r) }}
	case 5:
		return byNetlink("a VLAN", func(nl *netlink.Handle, dev netlink.Link) error {
			return addLink(nl, &netlink.Vlan{LinkAttrs: attrs(fmt.Sprintf("v%d", n), dev), VlanId: 100 + n})
		})
	case 6:
		return byNetlink("a macvlan", func(nl *netlink.Handle, dev netlink.Link) error {
			return addLink(nl, &netlink.Macvlan{LinkAttrs: attrs(fmt.Sprintf("mv%d", n), dev), Mode: netlink.MACVLAN_MODE_BRIDGE})
		})
	case 7:
		on := rng.IntN(2) == 0
		return byNetlink(fmt.Sprintf("promiscuous %v", on), func(nl *netlink.Handle, dev netlink.Link) error {
			if on {
				return nl.SetPromiscOn(dev)
			}
			return nl.SetPromiscOff(dev)
		})
	case 8:
		a := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 77, byte(n), 1), Mask: net.CIDRMask(24, 32)}}
		return byNetlink("another address", func(nl *netlink.Handle, dev netlink.Link) error { return nl.AddrReplace(dev, a) })
	case 9:
		name, value := pick(rng, "tcp_sack", "tcp_timestamps", "tcp_window_scaling", "tcp_ecn", "tcp_mtu_probing", "tcp_shrink_window",
			"tcp_moderate_rcvbuf", "tcp_recovery", "tcp_frto"), fmt.Sprint(rng.IntN(2))
		return operation{name + " " + value, func(_ context.Context, p *pair, host int) error {
			return p.hosts[host].NS.Sysctl("net/ipv4/"+name, value)
		}}
	case 10:
		return newCommand(rng)
	case 11:
		q := pick(rng, 1, 100, 1000)
		return byNetlink(fmt.Sprintf("transmit queue of %d", q), func(nl *netlink.Handle, dev netlink.Link) error { return nl.LinkSetTxQLen(dev, q) })
	default:
		return byNetlink("a VRF that goes again", func(nl *netlink.Handle, _ netlink.Link) error {
			vrf := &netlink.Vrf{LinkAttrs: attrs("vrf0", nil), Table: 10}
			if err := nl.LinkAdd(vrf); err != nil {
				return err
			}
			return nl.LinkDel(vrf)
		})
	}
}

func attrs(name string, parent netlink.Link) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	if parent != nil {
		a.ParentIndex = parent.Attrs().Index
	}
	return a
}

func addLink(nl *netlink.Handle, l netlink.Link) error {
	if err := nl.LinkAdd(l); err != nil {
		return err
	}
	return nl.LinkSetUp(l)
}

// newQdisc is another queueing discipline, or a shaper.
func newQdisc(rng *rand.Rand) operation {
	name := pick(rng, "fq", "pfifo_fast", "fq_codel", "prio", "sfq", "pfifo", "tbf")
	return byNetlink("qdisc "+name, func(nl *netlink.Handle, dev netlink.Link) error {
		a := netlink.QdiscAttrs{LinkIndex: dev.Attrs().Index, Parent: netlink.HANDLE_ROOT}
		switch name {
		case "tbf":
			return nl.QdiscReplace(&netlink.Tbf{QdiscAttrs: a, Rate: 100e6 / 8, Buffer: 64 << 10, Limit: 1 << 20})
		case "prio":
			return nl.QdiscReplace(netlink.NewPrio(a))
		}
		return nl.QdiscReplace(&netlink.GenericQdisc{QdiscAttrs: a, QdiscType: name})
	})
}

// newCommand is a command to the daemon, where there is one.
func newCommand(rng *rand.Rand) operation {
	name := pick(rng, "rekey", "flush", "status", "flows", "stats")
	return operation{"tcpcrypt " + name, func(ctx context.Context, p *pair, host int) (err error) {
		d := p.daemons[host]
		if d == nil {
			return nil
		}
		switch name {
		case "rekey":
			_, err = d.Rekey(ctx)
		case "flush":
			_, err = d.FlushCache(ctx)
		case "status":
			_, err = d.Status(ctx)
		case "flows":
			_, err = d.Flows(ctx)
		default:
			_, err = d.Stats(ctx)
		}
		return err
	}}
}

// flap sets the interface of a host down and up again. What goes with it and does
// not come back by itself is put back.
func (p *pair) flap(host int, d time.Duration) error {
	h, peer := p.hosts[host], p.hosts[1-host]
	if err := h.SetDown(); err != nil {
		return err
	}
	time.Sleep(d)
	return errors.Join(h.SetUp(), h.AddNeighbour(peer.Addr4(), peer.MAC), h.AddNeighbour(peer.Addr6(), peer.MAC))
}

// route gives the IPv4 route to the other host the metrics of r.
func (p *pair) route(host int, r netlink.Route) error {
	h := p.hosts[host]
	nl := h.NS.Netlink()
	dev, err := nl.LinkByName(h.Name)
	if err != nil {
		return err
	}
	net4 := h.IP4.Masked()
	r.LinkIndex, r.Scope, r.Src = dev.Attrs().Index, netlink.SCOPE_LINK, net.IP(h.Addr4().AsSlice())
	r.Dst = &net.IPNet{IP: net.IP(net4.Addr().AsSlice()), Mask: net.CIDRMask(net4.Bits(), 32)}
	return nl.RouteReplace(&r)
}

// operate carries out operations until ctx is done. What fails is as it was, on
// both pairs.
func (t *twins) operate(ctx context.Context) {
	rng := rand.New(rand.NewPCG(t.w.seed, 1<<32))
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(100+rng.IntN(300)) * time.Millisecond):
		}
		op, host := newOperation(rng, n), rng.IntN(2)
		var errs [2]error
		var wg sync.WaitGroup
		for i, p := range t.pairs {
			wg.Go(func() { errs[i] = op.do(context.WithoutCancel(ctx), p, host) })
		}
		wg.Wait()
		t.mu.Lock()
		t.operations = append(t.operations, fmt.Sprintf("%s: %s %v", "ab"[host:host+1], op.name, errs))
		t.mu.Unlock()
	}
}
