package fastpath

import (
	"fmt"
	"net/netip"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
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

// requires reports whether some flows are refused rather than plain.
func (c *HostConfig) requires() bool {
	for i := range c.Rules {
		if c.Rules[i].Policy.Verdict == slowpath.Require {
			return true
		}
	}
	return c.Require
}

// kernelPolicy is the configuration for the BPF programs, whose rules have one
// range of ports each. It fails when that makes too many.
func (c *HostConfig) kernelPolicy() (p xdp.Policy, err error) {
	p = xdp.Policy{Ports: portRanges(c.Ports), Exclude: portRanges(c.Exclude), Require: c.Require}
	for i := range c.Rules {
		r := &c.Rules[i]
		for _, l := range anyPort(r.LocalPorts) {
			for _, m := range anyPort(r.RemotePorts) {
				p.Rules = append(p.Rules, xdp.Rule{
					Local: r.Local, Remote: r.Remote, LocalPorts: l, RemotePorts: m, Verdict: kernelVerdict[r.Policy.Verdict],
				})
			}
		}
	}
	if len(p.Rules) > xdp.MaxRules {
		return p, fmt.Errorf("rule: %d rules, one for each pair of port ranges, are more than the %d that are supported", len(p.Rules), xdp.MaxRules)
	}
	return p, nil
}

var kernelVerdict = map[slowpath.Verdict]xdp.Verdict{
	slowpath.Encrypt: xdp.VerdictEncrypt, slowpath.Require: xdp.VerdictRequire, slowpath.Plain: xdp.VerdictPlain,
}

func anyPort(rs []PortRange) [][2]uint16 {
	if len(rs) == 0 {
		return [][2]uint16{{0, 65535}}
	}
	return portRanges(rs)
}

func portRanges(rs []PortRange) [][2]uint16 {
	out := make([][2]uint16, 0, len(rs))
	for _, r := range rs {
		out = append(out, [2]uint16{r.First, r.Last})
	}
	return out
}
