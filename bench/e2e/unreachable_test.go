package e2e

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// A router says that it cannot reach the destination: connect fails at once and
// for that reason, as it does without the daemon.
func TestUnreachable(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	p, err := lab.Start(t).Pair(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range [][2]string{{"net/ipv4/ip_forward", "1"}, {"net/ipv6/conf/all/forwarding", "1"}} {
		if err := p.B.NS.Sysctl(s[0], s[1]); err != nil {
			t.Fatal(err)
		}
	}
	d, err := daemon.Start(ctx, program, p.A, nil)
	if err != nil {
		t.Fatal(err)
	}
	answered := uint64(0)
	for _, c := range []struct {
		name, dst string
		via       netip.Addr
		want      syscall.Errno // what Linux makes of another Linux's error
	}{
		{"IPv4", "198.51.100.0/24", p.B.Addr4(), syscall.EHOSTUNREACH},
		{"IPv6", "2001:db8::/64", p.B.Addr6(), syscall.ENETUNREACH},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst := netip.MustParsePrefix(c.dst)
			if err := p.A.AddRoute(dst, c.via); err != nil {
				t.Fatal(err)
			}
			_, n, err := net.ParseCIDR(c.dst)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.B.NS.Netlink().RouteAdd(&netlink.Route{Dst: n, Type: unix.RTN_UNREACHABLE}); err != nil {
				t.Fatal(err)
			}
			to := netip.AddrPortFrom(dst.Addr().Next(), 80)
			conn, err := p.A.NS.Dial(ctx, "tcp", to.String())
			if err == nil {
				conn.Close()
			}
			if !errors.Is(err, c.want) {
				t.Fatalf("connect: %v, want %v", err, c.want)
			}
			st, err := d.Stats(ctx)
			if err != nil {
				t.Fatal(err)
			}
			answered++
			if st.Counters["slowpath_offered"] != answered || st.Counters["icmp_in"] != answered {
				t.Errorf("%d offers, %d ICMP errors, want %d", st.Counters["slowpath_offered"], st.Counters["icmp_in"], answered)
			}
		})
	}
}
