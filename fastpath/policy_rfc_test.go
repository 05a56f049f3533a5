package fastpath

import (
	"net/netip"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// What a rule says of the b and a bits, of resumption and of caching is the
// policy of the connections that it matches, and of no other (RFC 8547 section
// 4.2, RFC 8548 section 3.5).
func TestRulePolicy(t *testing.T) {
	special := slowpath.Policy{NoResume: true, NoCache: true, PassiveRole: true, AppAware: slowpath.AppAwareMandatory}
	c := HostConfig{Rules: []Rule{
		{Remote: netip.MustParsePrefix("192.0.2.0/24"), RemotePorts: []PortRange{{80, 81}}, Policy: special},
		{Local: netip.MustParsePrefix("2001:db8::/32"), LocalPorts: []PortRange{{443, 443}}, Policy: slowpath.Policy{AppAware: slowpath.AppAwareOn}},
		{RemotePorts: []PortRange{{81, 90}}, Policy: slowpath.Policy{NoCache: true}},
	}}
	policy := c.policy()
	for _, x := range []struct {
		local, remote string
		want          slowpath.Policy
	}{
		{"198.51.100.1:40000", "192.0.2.7:80", special},
		{"198.51.100.1:40000", "192.0.2.7:81", special}, // the first that matches
		{"198.51.100.1:40000", "192.0.2.7:82", slowpath.Policy{NoCache: true}},
		{"198.51.100.1:40000", "192.0.3.7:80", slowpath.Policy{}},
		{"[2001:db8::1]:443", "[2001:db8::2]:40000", slowpath.Policy{AppAware: slowpath.AppAwareOn}},
		{"[2001:db9::1]:443", "[2001:db8::2]:40000", slowpath.Policy{}},
	} {
		k := packet.KeyOf(netip.MustParseAddrPort(x.local), netip.MustParseAddrPort(x.remote))
		for _, dir := range []packet.Direction{packet.FromInner, packet.FromOuter} {
			if got := policy(&k, dir); got != x.want {
				t.Errorf("%s to %s: %+v, want %+v", x.local, x.remote, got, x.want)
			}
		}
	}
}
