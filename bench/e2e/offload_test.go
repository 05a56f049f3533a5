package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Offloads of the hosts' interfaces, on and off, before the daemon starts and
// while it runs, change nothing.
func TestOffloads(t *testing.T) {
	features := []lab.Feature{lab.TxChecksum, lab.TSO, lab.GSO, lab.GRO}
	for _, c := range []struct {
		name string
		on   [2][]bool // of A and B, in the order of features
	}{
		{"off at both", [2][]bool{{false, false, false, false}, {false, false, false, false}}},
		{"on at A alone", [2][]bool{{true, true, true, true}, {false, false, false, false}}},
		{"GRO at B alone", [2][]bool{{false, false, false, false}, {false, false, false, true}}},
		{"no TSO", [2][]bool{{true, false, true, true}, {true, false, true, true}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			set := func() {
				for i, host := range []*lab.Iface{b.path.A, b.path.B} {
					for k := range features {
						// Without checksums there is no TSO: off from the last
						// on, on from the first.
						f, on := features[k], c.on[i][k]
						if !c.on[i][0] {
							f, on = features[len(features)-1-k], c.on[i][len(features)-1-k]
						}
						if err := host.SetFeature(f, on); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			set()
			a, z := b.both()
			for _, when := range []string{"before", "meanwhile"} {
				for _, v6 := range []bool{false, true} {
					err := b.exchange(v6, stream(1, 2<<20), stream(2, 2<<20), func() {
						b.sameSession(a, z)
						if when == "meanwhile" {
							for i := range c.on {
								for k := range c.on[i] {
									c.on[i][k] = !c.on[i][k]
								}
							}
							set()
						}
					})
					if err != nil {
						t.Fatalf("set %s, IPv6 %v: %v", when, v6, err)
					}
				}
			}
			b.encryptedOnly(a, z, 4)
		})
	}
}

// BIG TCP: packets of more than 64 KiB on the way to the interface, over IPv6 with a
// jumbogram's header.
func TestBigTCP(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	if err := b.path.A.SetGSOMaxSize(180000); err != nil {
		t.Fatal(err)
	}
	a, z := b.both()
	eachIP(t, func(t *testing.T, v6 bool) {
		if err := b.exchange(v6, stream(1, 32<<20), stream(2, 1<<20), nil); err != nil {
			t.Fatal(err)
		}
	})
	b.encryptedOnly(a, z, 2)
	if n := b.stats(a).Counters["guard_out_flow_dropped"]; n != 0 {
		t.Errorf("the guard stopped %d packets that were not diverted", n)
	}
}

// What A sends takes one router, what B sends another.
func TestAsymmetricRouting(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	l := b.path.A.NS.Lab()
	ns := func(name string) *lab.Namespace {
		n, err := l.Namespace(name)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	leftNet, rightNet := ns("leftnet"), ns("rightnet")
	// connect puts a host's interface into one of the two networks.
	connect := func(host, network *lab.Namespace, ifname string, last byte) (*lab.Iface, *lab.Iface) {
		net := byte(1)
		if network == rightNet {
			net = 2
		}
		i, port, err := l.Connect(host, network, lab.LinkOptions{
			A: lab.EndOptions{Name: ifname, NoAddress: true}, B: lab.EndOptions{Name: fmt.Sprintf("port%d", last), NoAddress: true},
		})
		if err != nil {
			t.Fatal(err)
		}
		i.IP4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 251, net, last}), 24)
		if err := i.AddAddress(i.IP4); err != nil {
			t.Fatal(err)
		}
		return i, port
	}
	left, right := ns("left"), ns("right")
	there, back := ns("there"), ns("back")
	hostL, portL := connect(left, leftNet, "eth0", 1)
	hostR, portR := connect(right, rightNet, "eth0", 1)
	thereL, portTL := connect(there, leftNet, "left", 2)
	thereR, portTR := connect(there, rightNet, "right", 2)
	_, portBL := connect(back, leftNet, "left", 3)
	backR, portBR := connect(back, rightNet, "right", 3)
	if err := errors.Join(leftNet.Bridge("br0", portL, portTL, portBL), rightNet.Bridge("br0", portR, portTR, portBR)); err != nil {
		t.Fatal(err)
	}
	for _, router := range []*lab.Namespace{there, back} {
		for _, s := range [][2]string{{"ip_forward", "1"}, {"conf/all/send_redirects", "0"}} {
			if err := router.Sysctl("net/ipv4/"+s[0], s[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := hostL.AddRoute(hostR.IP4.Masked(), thereL.Addr4()); err != nil {
		t.Fatal(err)
	}
	if err := hostR.AddRoute(hostL.IP4.Masked(), backR.Addr4()); err != nil {
		t.Fatal(err)
	}
	b.path = &lab.Path{A: hostL, B: hostR}
	a, z := b.both()
	if err := b.exchange(false, stream(1, 4<<20), stream(2, 4<<20), func() { b.sameSession(a, z) }); err != nil {
		t.Fatal(err)
	}
	c, err := thereR.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if c.TxBytes < 4<<20 || c.RxBytes > 1<<20 {
		t.Errorf("the way there carried %d bytes, and %d the other way", c.TxBytes, c.RxBytes)
	}
	b.encryptedOnly(a, z, 1)
}
