package xdp

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

const (
	verdictDrop     = 1
	verdictPass     = 2
	verdictRedirect = 4

	tcNext     = 0xffffffff
	tcShot     = 2
	tcRedirect = 7
)

// hostPrograms loads bpf/host.c without attaching it: IPv4 and IPv6
// connections of v4 and v6 are inserted, port 80 is selected and 81 excluded,
// and queue 0 has a socket.
func hostPrograms(t *testing.T, heartbeat uint64) *ebpf.Collection {
	t.Helper()
	needRoot(t)
	spec, err := bpf.LoadHost()
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]any{
		"nic_ifindex": uint32(1), "tap_ifindex": uint32(1), "mark": uint32(0x1234567),
		"inject_mac_high": binary.NativeEndian.Uint32(testMAC[0:]), "inject_mac_low": binary.NativeEndian.Uint16(testMAC[4:]),
		"heartbeat_timeout": heartbeat,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			t.Fatal(err)
		}
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(c.Close)
	d := &Diverter{diversion: diversion{collection: c, flows: newFlowMap(c.Maps["flows"], c.Maps["pairs"])}}
	if err := d.SetPolicy(Policy{Ports: [][2]uint16{{80, 81}}, Exclude: [][2]uint16{{81, 81}}}); err != nil {
		t.Fatal(err)
	}
	if err := d.Enable(true); err != nil {
		t.Fatal(err)
	}
	for _, key := range []FlowKey{
		NewFlowKey(local4, remote4, 0), NewFlowKey(local6, remote6, 0), NewFlowKey(local4, remote4, 7),
	} {
		if err := d.Insert(key); err != nil {
			t.Fatal(err)
		}
	}
	// An XSKMAP takes sockets that are not bound.
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := c.Maps["xsks"].Put(uint32(0), uint32(fd)); err != nil {
		t.Fatal(err)
	}
	return c
}

var (
	testMAC = [6]byte{0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee}

	local4  = netip.MustParseAddrPort("10.9.0.1:40000")
	remote4 = netip.MustParseAddrPort("10.9.0.2:5000")
	local6  = netip.MustParseAddrPort("[fd09::1]:40000")
	remote6 = netip.MustParseAddrPort("[fd09::2]:5000")
	router4 = netip.MustParseAddr("10.9.0.254")
	router6 = netip.MustParseAddr("fd09::fe")

	other4  = netip.MustParseAddrPort("10.9.0.3:5000") // no flows with it
	other6  = netip.MustParseAddrPort("[fd09::3]:5000")
	client4 = netip.MustParseAddrPort("10.9.0.3:50001")
	server4 = netip.MustParseAddrPort("10.9.0.1:80")
	client6 = netip.MustParseAddrPort("[fd09::3]:50001")
	server6 = netip.MustParseAddrPort("[fd09::1]:80")

	eno = []byte{69, 3, 0x21}
)

func options(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

type verdictCase struct {
	name    string
	frame   []byte
	verdict uint32
	counter string
}

func runVerdicts(t *testing.T, c *ebpf.Collection, program string, cases []verdictCase) {
	t.Helper()
	runCounted(t, c, program, hostCounters, cases)
}

// runCounted runs a program whose counters have the given names.
func runCounted(t *testing.T, c *ebpf.Collection, program string, counters []string, cases []verdictCase) {
	t.Helper()
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			before, err := readCounters(c.Maps["counters"], counters)
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.Programs[program].Run(&ebpf.RunOptions{Data: tc.frame, DataOut: make([]byte, len(tc.frame)+64)})
			if errors.Is(err, ebpf.ErrNotSupported) {
				t.Skip("the kernel has no BPF_PROG_TEST_RUN")
			}
			if err != nil {
				t.Fatal(err)
			}
			if got != tc.verdict {
				t.Errorf("verdict %d, want %d", int32(got), int32(tc.verdict))
			}
			after, err := readCounters(c.Maps["counters"], counters)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range counters {
				want := before[name]
				if name == tc.counter {
					want++
				}
				if after[name] != want {
					t.Errorf("counter %s moved by %d", name, after[name]-before[name])
				}
			}
		})
	}
}

func TestCounterNames(t *testing.T) {
	host, err := bpf.LoadHost()
	if err != nil {
		t.Fatal(err)
	}
	if n := int(host.Maps["counters"].MaxEntries); n != len(hostCounters) {
		t.Errorf("%d counters, %d names", n, len(hostCounters))
	}
	guard, err := bpf.LoadGuard()
	if err != nil {
		t.Fatal(err)
	}
	if n := int(guard.Maps["guard_counters"].MaxEntries); n != len(guardCounters) {
		t.Errorf("%d guard counters, %d names", n, len(guardCounters))
	}
	gateway, err := bpf.LoadGateway()
	if err != nil {
		t.Fatal(err)
	}
	if n := int(gateway.Maps["counters"].MaxEntries); n != len(gatewayCounterNames()) {
		t.Errorf("%d counters of a gateway, %d names", n, len(gatewayCounterNames()))
	}
}

func xdpCases() []verdictCase {
	hop := []byte{6, 0, 0, 0, 0, 0, 0, 0}      // an extension header, then TCP
	fragment := []byte{6, 0, 0, 1, 0, 0, 0, 9} // a first fragment of TCP
	udp := append((segment{}).ethernet(0x0800), segment{src: remote4, dst: local4}.ip(17, make([]byte, 8))...)
	syn := func(o []byte) segment {
		return segment{src: client4, dst: server4, flags: flagSYN, options: o}
	}
	sent4 := segment{src: local4, dst: remote4}
	sent6 := segment{src: local6, dst: remote6}
	return []verdictCase{
		{"flow v4", segment{src: remote4, dst: local4, flags: flagACK}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"flow v4 reset", segment{src: remote4, dst: local4, flags: flagRST}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"flow v4 with IP options", segment{src: remote4, dst: local4, ipOption: make([]byte, 40)}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"flow v4 with payload", segment{src: remote4, dst: local4, payload: make([]byte, 1400)}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"flow v6", segment{src: remote6, dst: local6, flags: flagACK}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"flow in VLAN, priority ignored", segment{src: remote4, dst: local4, vlans: []uint16{0xe007}}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"flow in another VLAN", segment{src: remote4, dst: local4, vlans: []uint16{8}}.frame(), verdictPass, "xdp_passed"},
		{"flow v6 in VLAN", segment{src: remote6, dst: local6, vlans: []uint16{7}}.frame(), verdictPass, "xdp_passed"},
		{"two tags", segment{src: remote4, dst: local4, vlans: []uint16{7, 7}}.frame(), verdictPass, "xdp_passed_vlan_stacked"},
		{"service tag", segment{src: remote4, dst: local4, vlans: []uint16{7}, tagType: 0x88a8}.frame(), verdictPass, "xdp_passed_vlan_stacked"},
		{"reverse direction", segment{src: local4, dst: remote4}.frame(), verdictPass, "xdp_passed"},
		{"another port", segment{src: remote4, dst: netip.AddrPortFrom(local4.Addr(), 40001)}.frame(), verdictPass, "xdp_passed"},
		{"UDP", udp, verdictPass, "xdp_passed"},
		{"ARP", append((segment{}).ethernet(0x0806), make([]byte, 28)...), verdictPass, "xdp_passed"},
		{"IPv4 header length 4", func() []byte {
			f := segment{src: remote4, dst: local4}.frame()
			f[14] = 0x41
			return f
		}(), verdictPass, "xdp_passed"},
		{"cut in TCP header", segment{src: remote4, dst: local4, truncate: 1}.frame(), verdictPass, "xdp_passed_short"},
		{"cut in IP header", segment{src: remote4, dst: local4, truncate: 21}.frame(), verdictPass, "xdp_passed_short"},
		{"cut in IPv6 header", segment{src: remote6, dst: local6, truncate: 21}.frame(), verdictPass, "xdp_passed_short"},
		{"cut in tag", append((segment{}).ethernet(0x8100), 0, 7), verdictPass, "xdp_passed_short"},

		{"extension header", segment{src: remote6, dst: local6, extra: hop}.frame(), verdictPass, "xdp_passed_extension_header"},
		{"fragment v6 between a flow's addresses", segment{src: remote6, dst: local6, extra: fragment, extType: 44}.frame(), verdictDrop, "xdp_fragment_dropped"},
		{"fragment v6 of others", segment{src: other6, dst: local6, extra: fragment, extType: 44}.frame(), verdictPass, "xdp_passed"},
		{"fragment v6 of UDP", segment{src: remote6, dst: local6, extra: []byte{17, 0, 0, 1, 0, 0, 0, 9}, extType: 44}.frame(), verdictPass, "xdp_passed_extension_header"},
		{"first fragment v4", segment{src: remote4, dst: local4, fragment: 0x2000}.frame(), verdictDrop, "xdp_fragment_dropped"},
		{"last fragment v4", segment{src: remote4, dst: local4, fragment: 0x0003}.frame(), verdictDrop, "xdp_fragment_dropped"},
		{"don't-fragment is none", segment{src: remote4, dst: local4, fragment: 0x4000}.frame(), verdictRedirect, "xdp_flow_redirected"},
		{"fragment v4 of others", segment{src: other4, dst: local4, fragment: 0x2000}.frame(), verdictPass, "xdp_passed"},

		{"SYN with ENO", syn(eno).frame(), verdictRedirect, "xdp_syn_redirected"},
		{"SYN with ENO v6", segment{src: client6, dst: server6, flags: flagSYN, options: eno}.frame(), verdictRedirect, "xdp_syn_redirected"},
		{"SYN with ENO in VLAN", segment{src: client4, dst: server4, vlans: []uint16{9}, flags: flagSYN, options: eno}.frame(), verdictRedirect, "xdp_syn_redirected"},
		{"SYN with ECN and ENO", segment{src: client4, dst: server4, flags: flagSYN | 0xc0, options: eno}.frame(), verdictRedirect, "xdp_syn_redirected"},
		{"SYN with ENO and data", segment{src: client4, dst: server4, flags: flagSYN, options: eno, payload: []byte("GET")}.frame(), verdictRedirect, "xdp_syn_redirected"},
		{"SYN without options", syn(nil).frame(), verdictPass, "xdp_passed"},
		{"SYN with other options", syn(options([]byte{2, 4, 5, 0xb4}, []byte{4, 2, 8, 10}, make([]byte, 8), []byte{1, 3, 3, 7})).frame(), verdictPass, "xdp_passed"},
		{"ENO last of 40 bytes", syn(options([]byte{2, 4, 5, 0xb4}, []byte{254, 31}, make([]byte, 29), []byte{69, 5, 1, 2, 3})).frame(), verdictRedirect, "xdp_syn_redirected"},
		{"ENO in the last two bytes", syn(options([]byte{254, 38}, make([]byte, 36), []byte{69, 2})).frame(), verdictRedirect, "xdp_syn_redirected"},
		{"ENO after NOPs", syn(options([]byte{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, eno)).frame(), verdictRedirect, "xdp_syn_redirected"},
		{"40 NOPs", syn([]byte{39: 1, 0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1, 11: 1, 12: 1, 13: 1, 14: 1, 15: 1, 16: 1, 17: 1, 18: 1, 19: 1, 20: 1, 21: 1, 22: 1, 23: 1, 24: 1, 25: 1, 26: 1, 27: 1, 28: 1, 29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 1, 35: 1, 36: 1, 37: 1, 38: 1}).frame(), verdictPass, "xdp_passed"},
		{"ENO behind end of options", syn(options([]byte{0}, eno)).frame(), verdictPass, "xdp_passed"},
		{"ENO inside another option", syn([]byte{254, 8, 69, 3, 1, 0, 0, 0}).frame(), verdictPass, "xdp_passed"},
		{"option of length 0 before ENO", syn(options([]byte{254, 0}, eno)).frame(), verdictPass, "xdp_passed"},
		{"option of length 1 before ENO", syn(options([]byte{254, 1}, eno)).frame(), verdictPass, "xdp_passed"},
		{"ENO of length 0", syn([]byte{69, 0, 1, 1}).frame(), verdictPass, "xdp_passed"},
		{"ENO beyond the options", syn([]byte{69, 5, 1, 1}).frame(), verdictPass, "xdp_passed"},
		{"option of length 255 before ENO", syn(options([]byte{254, 255}, eno)).frame(), verdictPass, "xdp_passed"},
		{"ENO kind in the last byte", syn([]byte{1, 1, 1, 69}).frame(), verdictPass, "xdp_passed"},
		{"experimental ENO", syn([]byte{253, 4, 0x45, 0x4e}).frame(), verdictPass, "xdp_passed"},
		{"options beyond the packet", func() []byte {
			f := syn(eno).frame()
			f[14+20+12] = 0xf0
			return f
		}(), verdictPass, "xdp_passed"},
		{"data offset below 5", func() []byte {
			f := syn(eno).frame()
			f[14+20+12] = 0x40
			return f
		}(), verdictPass, "xdp_passed"},
		{"SYN-ACK with ENO", segment{src: client4, dst: server4, flags: flagSYN | flagACK, options: eno}.frame(), verdictPass, "xdp_passed"},
		{"SYN-RST with ENO", segment{src: client4, dst: server4, flags: flagSYN | flagRST, options: eno}.frame(), verdictPass, "xdp_passed"},
		{"SYN with ENO to an excluded port", segment{src: client4, dst: netip.AddrPortFrom(server4.Addr(), 81), flags: flagSYN, options: eno}.frame(), verdictPass, "xdp_passed"},
		{"SYN with ENO from an excluded port", segment{src: netip.AddrPortFrom(client4.Addr(), 81), dst: server4, flags: flagSYN, options: eno}.frame(), verdictPass, "xdp_passed"},
		{"SYN with ENO from a selected port", segment{src: netip.AddrPortFrom(client4.Addr(), 80), dst: local4, flags: flagSYN, options: eno}.frame(), verdictRedirect, "xdp_syn_redirected"},
		{"SYN with ENO to another port", segment{src: client4, dst: local4, flags: flagSYN, options: eno}.frame(), verdictPass, "xdp_passed"},

		{"ICMP fragmentation needed", sent4.icmp(router4, 3, 28), verdictRedirect, "xdp_icmp_redirected"},
		{"ICMP time exceeded", sent4.icmp(router4, 11, 60), verdictRedirect, "xdp_icmp_redirected"},
		{"ICMP parameter problem, quoted options", segment{src: local4, dst: remote4, ipOption: make([]byte, 12)}.icmp(router4, 12, 40), verdictRedirect, "xdp_icmp_redirected"},
		{"ICMP in VLAN", segment{src: local4, dst: remote4, vlans: []uint16{7}}.icmp(router4, 3, 28), verdictRedirect, "xdp_icmp_redirected"},
		{"ICMP redirect", sent4.icmp(router4, 5, 28), verdictPass, "xdp_passed"},
		{"ICMP echo", sent4.icmp(router4, 8, 28), verdictPass, "xdp_passed"},
		{"ICMP about others", segment{src: local4, dst: other4}.icmp(router4, 3, 28), verdictPass, "xdp_passed"},
		{"ICMP about a packet from the peer", segment{src: remote4, dst: local4}.icmp(router4, 3, 28), verdictPass, "xdp_passed"},
		{"ICMP about a later fragment", segment{src: local4, dst: remote4, fragment: 5}.icmp(router4, 3, 28), verdictPass, "xdp_passed"},
		{"ICMP too short for ports", sent4.icmp(router4, 3, 23), verdictPass, "xdp_passed_short"},
		{"ICMP too short for an address", sent4.icmp(router4, 3, 19), verdictPass, "xdp_passed_short"},
		{"ICMPv6 packet too big", sent6.icmp(router6, 2, 60), verdictRedirect, "xdp_icmp_redirected"},
		{"ICMPv6 unreachable", sent6.icmp(router6, 1, 44), verdictRedirect, "xdp_icmp_redirected"},
		{"ICMPv6 neighbour", sent6.icmp(router6, 135, 60), verdictPass, "xdp_passed"},
		{"ICMPv6 too short", sent6.icmp(router6, 2, 43), verdictPass, "xdp_passed_short"},
		{"ICMPv6 about others", segment{src: local6, dst: other6}.icmp(router6, 2, 60), verdictPass, "xdp_passed"},
	}
}

func TestXDPVerdicts(t *testing.T) {
	c := hostPrograms(t, 0)
	for _, program := range []string{"host_xdp", "host_xdp_frags"} {
		t.Run(program, func(t *testing.T) { runVerdicts(t, c, program, xdpCases()) })
	}
	// The injected packets' address means something in generic mode only.
	injected := segment{src: remote4, dst: local4, srcMAC: testMAC}.frame()
	runVerdicts(t, c, "host_xdp", []verdictCase{{"injected address, native", injected, verdictRedirect, "xdp_flow_redirected"}})
	if err := c.Maps["control"].Put(uint32(controlGeneric), uint64(1)); err != nil {
		t.Fatal(err)
	}
	runVerdicts(t, c, "host_xdp", []verdictCase{
		{"injected address, generic", injected, verdictPass, "xdp_passed_injected"},
		{"another address, generic", segment{src: remote4, dst: local4}.frame(), verdictRedirect, "xdp_flow_redirected"},
	})
}

func TestXDPWithoutSocket(t *testing.T) {
	c := hostPrograms(t, 0)
	if err := c.Maps["xsks"].Delete(uint32(0)); err != nil {
		t.Fatal(err)
	}
	runVerdicts(t, c, "host_xdp", []verdictCase{
		{"flow", segment{src: remote4, dst: local4}.frame(), verdictDrop, "xdp_flow_dropped_no_socket"},
		{"SYN", segment{src: client4, dst: server4, flags: flagSYN, options: eno}.frame(), verdictPass, "xdp_syn_passed_no_socket"},
		{"ICMP", segment{src: local4, dst: remote4}.icmp(router4, 3, 28), verdictDrop, "xdp_icmp_dropped_no_socket"},
	})
}

func TestEgressVerdicts(t *testing.T) {
	c := hostPrograms(t, 0)
	runVerdicts(t, c, "nic_egress", []verdictCase{
		{"flow v4", segment{src: local4, dst: remote4}.frame(), tcRedirect, "egress_flow_redirected"},
		{"flow v6", segment{src: local6, dst: remote6}.frame(), tcRedirect, "egress_flow_redirected"},
		{"flow in VLAN", segment{src: local4, dst: remote4, vlans: []uint16{7}}.frame(), tcRedirect, "egress_flow_redirected"},
		{"reverse direction", segment{src: remote4, dst: local4}.frame(), tcNext, "egress_passed"},
		{"fragment", segment{src: local4, dst: remote4, fragment: 0x2000}.frame(), tcShot, "egress_fragment_dropped"},
		{"fragment of others", segment{src: local4, dst: other4, fragment: 0x2000}.frame(), tcNext, "egress_passed"},
		{"SYN to a selected port", segment{src: local4, dst: netip.AddrPortFrom(other4.Addr(), 80), flags: flagSYN}.frame(), tcRedirect, "egress_syn_redirected"},
		{"SYN to an excluded port", segment{src: local4, dst: netip.AddrPortFrom(other4.Addr(), 81), flags: flagSYN}.frame(), tcNext, "egress_passed"},
		{"SYN-ACK from a selected port", segment{src: server4, dst: client4, flags: flagSYN | flagACK}.frame(), tcNext, "egress_passed"},
		{"extension header", segment{src: local6, dst: remote6, extra: []byte{6, 0, 0, 0, 0, 0, 0, 0}}.frame(), tcNext, "egress_passed_extension_header"},
		{"two tags", segment{src: local4, dst: remote4, vlans: []uint16{7, 7}}.frame(), tcNext, "egress_passed_vlan_stacked"},
		{"cut", segment{src: local4, dst: remote4, truncate: 1}.frame(), tcNext, "egress_passed_short"},
	})
	if err := c.Maps["control"].Put(uint32(controlEnabled), uint64(0)); err != nil {
		t.Fatal(err)
	}
	syn := segment{src: local4, dst: netip.AddrPortFrom(other4.Addr(), 80), flags: flagSYN}.frame()
	runVerdicts(t, c, "nic_egress", []verdictCase{
		{"SYN when disabled", syn, tcNext, "egress_passed"},
		{"flow when disabled", segment{src: local4, dst: remote4}.frame(), tcRedirect, "egress_flow_redirected"},
	})
}

func TestTAPIngressVerdicts(t *testing.T) {
	c := hostPrograms(t, 0)
	runVerdicts(t, c, "tap_ingress", []verdictCase{
		{"TCP", segment{src: remote4, dst: local4}.frame(), tcRedirect, "tap_injected"},
		{"TCP v6", segment{src: remote6, dst: local6}.frame(), tcRedirect, "tap_injected"},
		{"ICMP error", segment{src: local4, dst: remote4}.icmp(router4, 3, 28), tcRedirect, "tap_injected"},
		{"fragment", segment{src: remote4, dst: local4, fragment: 0x2000}.frame(), tcShot, "tap_dropped_fragment"},
		{"extension header", segment{src: remote6, dst: local6, extra: []byte{6, 0, 0, 0, 0, 0, 0, 0}}.frame(), tcShot, "tap_dropped_other"},
		{"ARP", append((segment{}).ethernet(0x0806), make([]byte, 28)...), tcShot, "tap_dropped_other"},
	})
}

func TestHeartbeat(t *testing.T) {
	const timeout = 1e9
	c := hostPrograms(t, timeout)
	d := &Diverter{diversion: diversion{collection: c, heartbeat: true}}
	flow, syn := segment{src: remote4, dst: local4}.frame(), segment{src: client4, dst: server4, flags: flagSYN, options: eno}.frame()
	flowOut, synOut := segment{src: local4, dst: remote4}.frame(), segment{src: server4, dst: client4, flags: flagSYN}.frame()
	runVerdicts(t, c, "host_xdp", []verdictCase{
		{"flow without beat", flow, verdictDrop, "xdp_flow_dropped_stale"},
		{"SYN without beat", syn, verdictPass, "xdp_syn_passed_stale"},
	})
	runVerdicts(t, c, "nic_egress", []verdictCase{
		{"flow out without beat", flowOut, tcShot, "egress_flow_dropped_stale"},
		{"SYN out without beat", synOut, tcNext, "egress_syn_passed_stale"},
	})
	// A beat in the future is what the coarse clock's lag looks like.
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	if err := d.control(controlBeat, uint64(now.Nano())+timeout*3600); err != nil {
		t.Fatal(err)
	}
	runVerdicts(t, c, "host_xdp", []verdictCase{
		{"flow with beat", flow, verdictRedirect, "xdp_flow_redirected"},
		{"SYN with beat", syn, verdictRedirect, "xdp_syn_redirected"},
	})
	runVerdicts(t, c, "nic_egress", []verdictCase{
		{"flow out with beat", flowOut, tcRedirect, "egress_flow_redirected"},
		{"SYN out with beat", synOut, tcRedirect, "egress_syn_redirected"},
	})
}
