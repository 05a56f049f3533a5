package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// describeCards finds the network cards, so many of them.
func describeCards(n int, resp *vm.Response) error {
	var cards []netlink.Link
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		cards = cards[:0]
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if _, err := os.Stat("/sys/class/net/" + l.Attrs().Name + "/device"); err == nil {
				cards = append(cards, l)
			}
		}
		if len(cards) == n {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d network cards, not %d", len(cards), n)
		}
	}
	slices.SortFunc(cards, func(a, b netlink.Link) int {
		return bytes.Compare(a.Attrs().HardwareAddr, b.Attrs().HardwareAddr)
	})
	for _, l := range cards {
		c, err := xdp.Probe(l.Attrs().Name)
		if err != nil {
			return err
		}
		resp.Cards = append(resp.Cards, vm.CardInfo{Interface: c.Interface, Driver: c.Driver, Queues: c.RXQueues})
	}
	return nil
}

// setUp gives the interface its queues, MTU and addresses, and waits for the
// link.
func setUp(req *vm.Request) error {
	l, err := netlink.LinkByName(req.Interface)
	if err != nil {
		return err
	}
	if req.Queues > 0 {
		tool, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer tool.Close()
		c, err := tool.GetChannels(req.Interface)
		if err != nil {
			return fmt.Errorf("channels: %w", err)
		}
		if int(c.CombinedCount) != req.Queues {
			c.CombinedCount = uint32(req.Queues)
			if _, err := tool.SetChannels(req.Interface, c); err != nil {
				return fmt.Errorf("%d channels: %w", req.Queues, err)
			}
		}
	}
	if req.MTU > 0 && l.Attrs().MTU != req.MTU {
		if err := netlink.LinkSetMTU(l, req.MTU); err != nil {
			return fmt.Errorf("MTU %d: %w", req.MTU, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	for _, text := range req.Args {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = 0x02 // IFA_F_NODAD: it is used at once
		}
		if err := netlink.AddrReplace(l, a); err != nil {
			return fmt.Errorf("address %s: %w", text, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return waitCarrier(req.Interface, true)
}

// stack makes a device over others.
func stack(req *vm.Request) error {
	if len(req.Args) < 2 {
		return errors.New("kind and name are wanted")
	}
	base, err := netlink.LinkByName(req.Interface)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = req.Args[1]
	switch req.Args[0] {
	case "bond":
		bond := netlink.NewLinkBond(attrs)
		bond.Mode, bond.Miimon = netlink.BOND_MODE_ACTIVE_BACKUP, 100
		if err := netlink.LinkAdd(bond); err != nil {
			return fmt.Errorf("bond: %w", err)
		}
		for _, name := range append([]string{req.Interface}, req.Args[2:]...) {
			port, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			// One that is up cannot be enslaved.
			if err := netlink.LinkSetDown(port); err != nil {
				return err
			}
			if err := netlink.LinkSetBondSlave(port, bond); err != nil {
				return fmt.Errorf("port %s of the bond: %w", name, err)
			}
		}
		return nil
	case "vlan":
		attrs.ParentIndex = base.Attrs().Index
		if err := netlink.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: 5}); err != nil {
			return fmt.Errorf("vlan: %w", err)
		}
		return netlink.LinkSetUp(base)
	}
	return fmt.Errorf("unknown kind %q", req.Args[0])
}

func unstack(req *vm.Request) error {
	l, err := netlink.LinkByName(req.Interface)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

// spread changes which queue the hardware delivers to.
func (a *agent) spread(req *vm.Request) (err error) {
	if a.restore != nil {
		if err := a.restore(); err != nil {
			return err
		}
		a.restore = nil
	}
	if req.Queues >= 0 {
		_, a.restore, err = xdp.Concentrate(req.Interface, []int{req.Queues})
	}
	return err
}

func setLink(name string, up bool) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if up {
		return netlink.LinkSetUp(l)
	}
	return netlink.LinkSetDown(l)
}

// waitCarrier waits until the link is there, which some drivers reset for much,
// or until it is gone.
func waitCarrier(name string, want bool) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		// It cannot be read of an interface that is down.
		b, err := os.ReadFile("/sys/class/net/" + name + "/carrier")
		if (err == nil && strings.TrimSpace(string(b)) == "1") == want {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the carrier of %s is not %v", name, want)
		}
	}
}

// attached tells what hangs on the interface.
func attached(name string, resp *vm.Response) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	resp.XDP = l.Attrs().Xdp != nil && l.Attrs().Xdp.Attached
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer tool.Close()
	if features, err := tool.Features(name); err == nil {
		resp.Strips = features["rx-vlan-hw-parse"]
	}
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, x := range links {
		resp.Devices = append(resp.Devices, x.Attrs().Name)
	}
	sockets, err := netlink.SocketDiagXDP()
	if err != nil {
		return err
	}
	for _, s := range sockets {
		if s.XDPInfo != nil && int(s.XDPInfo.Ifindex) == l.Attrs().Index {
			resp.Bound = append(resp.Bound, int(s.XDPInfo.QueueID))
		}
	}
	slices.Sort(resp.Bound)
	return nil
}

// counters are those of the driver (ethtool -S).
func counters(name string, resp *vm.Response) error {
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer tool.Close()
	resp.Counters, err = tool.Stats(name)
	return err
}
