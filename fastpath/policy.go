package fastpath

import (
	"net/netip"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// Rule gives a policy to the flows that match all of its conditions.
type Rule struct {
	Local, Remote           netip.Prefix // the zero Prefix matches every address
	LocalPorts, RemotePorts []PortRange  // empty: every port
	Policy                  slowpath.Policy
}

func (r *Rule) matches(k *packet.Key) bool {
	return within(r.Local, k.LocalAddr().Addr()) && within(r.Remote, k.RemoteAddr().Addr()) &&
		(len(r.LocalPorts) == 0 || inRanges(r.LocalPorts, k.LPort)) &&
		(len(r.RemotePorts) == 0 || inRanges(r.RemotePorts, k.RPort))
}

func within(p netip.Prefix, a netip.Addr) bool { return p == netip.Prefix{} || p.Contains(a) }

func inRanges(rs []PortRange, p uint16) bool {
	for _, r := range rs {
		if r.First <= p && p <= r.Last {
			return true
		}
	}
	return false
}

// policy returns slowpath.Config.Policy for the configuration: the first rule
// that matches, or else the ports and Require.
func (c *HostConfig) policy() func(*packet.Key, packet.Direction) slowpath.Policy {
	return func(k *packet.Key, _ packet.Direction) slowpath.Policy {
		for i := range c.Rules {
			if c.Rules[i].matches(k) {
				return c.Rules[i].Policy
			}
		}
		switch {
		case inRanges(c.Exclude, k.LPort), inRanges(c.Exclude, k.RPort),
			len(c.Ports) > 0 && !inRanges(c.Ports, k.LPort) && !inRanges(c.Ports, k.RPort):
			return slowpath.Policy{Verdict: slowpath.Plain}
		case c.Require:
			return slowpath.Policy{Verdict: slowpath.Require}
		}
		return slowpath.Policy{}
	}
}
