package xdp

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
)

// gatewayLab is a namespace with the two cards of a gateway. What the verdicts
// are run on has testMAC as the destination of nothing.
func gatewayLab(t *testing.T) [2]int {
	t.Helper()
	newQuietLab(t, 1, 1500)
	var cards [2]int
	for side, name := range []string{"card0", "card1"} {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		veth := netlink.NewVeth(attrs)
		veth.PeerName = "far" + name
		if err := netlink.LinkAdd(veth); err != nil {
			t.Fatal(err)
		}
		for _, end := range []string{name, veth.PeerName} {
			l, err := netlink.LinkByName(end)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(disableIPv6(l), netlink.LinkSetUp(l)); err != nil {
				t.Fatal(err)
			}
		}
		cards[side] = linkByName(t, name).Attrs().Index
	}
	return cards
}

func linkByName(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// gatewayOf attaches a gateway to the cards. It is removed with their namespace.
func gatewayOf(t *testing.T, cards [2]int, forward bool) (*Gateway, []FlowKey) {
	t.Helper()
	g, left, err := AttachGateway(GatewayConfig{
		Ifindex: cards, Mode: ModeCopy, Forward: forward, Heartbeat: 1e9,
		Policy: Policy{Ports: [][2]uint16{{80, 80}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return g, left
}

// registered gives an AF_XDP socket to queue 0 of the inner card, and returns
// what ends the socket, as the death of its process does.
func registered(t *testing.T, g *Gateway, ifindex int) (closes func()) {
	t.Helper()
	u, err := NewUmem(UmemConfig{Chunks: 64, ChunkSize: 2048})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSocket(u, SocketConfig{Ifindex: ifindex, Mode: ModeCopy, FillSize: 64, CompletionSize: 64, RXSize: 64, TXSize: 64})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.RegisterSocket(Inner, 0, s); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(s.Close(), u.Close()); err != nil {
			t.Error(err)
		}
	}
}

// mapsAgree demands that as many connections are listed as are counted, and as
// many address pairs.
func mapsAgree(t *testing.T, g *Gateway, flows, pairs int) {
	t.Helper()
	listed := func(m *ebpf.Map) (n int) {
		var key []byte
		var value uint32
		for entries := m.Iterate(); entries.Next(&key, &value); n++ {
		}
		return n
	}
	if n, p := listed(g.flows.flows), listed(g.flows.pairs); g.Flows() != flows || n != flows || p != pairs || len(g.flows.users) != pairs {
		t.Errorf("%d flows counted, %d listed, want %d; %d pairs counted, %d listed, want %d", g.Flows(), n, flows, len(g.flows.users), p, pairs)
	}
}

func (g *Gateway) run(t *testing.T, side Side, cases ...verdictCase) {
	t.Helper()
	for i := range cases {
		cases[i].counter = side.String() + "_" + cases[i].counter
	}
	runCounted(t, g.collection, "gateway_"+side.String(), gatewayCounterNames(), cases)
}

var (
	flowOut4 = segment{src: local4, dst: remote4, flags: flagACK}.frame()
	flowIn4  = segment{src: remote4, dst: local4, flags: flagACK}.frame()
	flowSYN4 = segment{src: local4, dst: remote4, flags: flagSYN}.frame()
)

func TestGatewayVerdicts(t *testing.T) {
	cards := gatewayLab(t)
	g, left := gatewayOf(t, cards, true)
	if len(left) > 0 || g.Replaced() {
		t.Errorf("%d connections of an earlier gateway", len(left))
	}
	defer registered(t, g, cards[Inner])()
	if err := errors.Join(g.Insert(NewFlowKey(local4, remote4, 0)), g.Insert(NewFlowKey(local6, remote6, 0)), g.Insert(NewFlowKey(local4, remote4, 7)), g.Enable(true), g.beat()); err != nil {
		t.Fatal(err)
	}
	hop := []byte{6, 0, 0, 0, 0, 0, 0, 0}
	udp := append((segment{}).ethernet(0x0800), segment{src: local4, dst: remote4}.ip(17, make([]byte, 8))...)
	to80 := netip.AddrPortFrom(other4.Addr(), 80)
	mine := func(side Side, frame []byte) []byte {
		copy(frame, linkByName(t, []string{"card0", "card1"}[side]).Attrs().HardwareAddr)
		return frame
	}
	g.run(t, Inner,
		verdictCase{"flow", flowOut4, verdictRedirect, "flow_redirected"},
		verdictCase{"flow v6", segment{src: local6, dst: remote6}.frame(), verdictRedirect, "flow_redirected"},
		verdictCase{"flow in VLAN", segment{src: local4, dst: remote4, vlans: []uint16{0xe007}}.frame(), verdictRedirect, "flow_redirected"},
		verdictCase{"flow in another VLAN", segment{src: local4, dst: remote4, vlans: []uint16{8}}.frame(), verdictRedirect, "forwarded"},
		verdictCase{"reverse direction", flowIn4, verdictRedirect, "forwarded"},
		verdictCase{"UDP", udp, verdictRedirect, "forwarded"},
		verdictCase{"ARP", append((segment{}).ethernet(0x0806), make([]byte, 28)...), verdictRedirect, "forwarded"},
		verdictCase{"another port", segment{src: local4, dst: other4, flags: flagSYN}.frame(), verdictRedirect, "forwarded"},
		verdictCase{"SYN", segment{src: local4, dst: to80, flags: flagSYN}.frame(), verdictRedirect, "syn_redirected"},
		verdictCase{"fragment of a flow's addresses", segment{src: local4, dst: remote4, fragment: 0x2000}.frame(), verdictDrop, "fragment_dropped"},
		verdictCase{"fragment of others", segment{src: local4, dst: other4, fragment: 0x2000}.frame(), verdictRedirect, "forwarded"},
		verdictCase{"extension header", segment{src: local6, dst: remote6, extra: hop}.frame(), verdictDrop, "extension_header_dropped"},
		verdictCase{"two tags", segment{src: local4, dst: remote4, vlans: []uint16{7, 7}}.frame(), verdictRedirect, "forwarded"},
		verdictCase{"ICMP error of an inner router", segment{src: remote4, dst: local4}.icmp(router4, 3, 28), verdictDrop, "icmp_dropped"},
		verdictCase{"to the card itself", mine(Inner, segment{src: local4, dst: other4}.frame()), verdictPass, "local_passed"},
	)
	g.run(t, Outer,
		verdictCase{"flow without socket", flowIn4, verdictDrop, "flow_dropped_no_socket"},
		verdictCase{"SYN without ENO", segment{src: client4, dst: server4, flags: flagSYN}.frame(), verdictRedirect, "forwarded"},
		verdictCase{"SYN with ENO, without socket", segment{src: client4, dst: server4, flags: flagSYN, options: eno}.frame(), verdictRedirect, "syn_forwarded"},
		verdictCase{"ICMP error about a flow, without socket", segment{src: local4, dst: remote4}.icmp(router4, 3, 28), verdictDrop, "icmp_dropped"},
		verdictCase{"ICMP error about others", segment{src: local4, dst: other4}.icmp(router4, 3, 28), verdictRedirect, "forwarded"},
		verdictCase{"to the card itself", mine(Outer, segment{src: other4, dst: local4}.frame()), verdictPass, "local_passed"},
	)
	if err := g.Close(false); err != nil {
		t.Error(err)
	}
}

// hang has the process show no life.
func (g *Gateway) hang(t *testing.T) {
	t.Helper()
	if err := g.control(controlBeat, 0); err != nil {
		t.Fatal(err)
	}
}

// A process that hangs keeps all that it has listed, whatever the hosts send
// meanwhile. Of one that died a connection ends when its inner end begins anew.
func TestGatewayHangsOrDies(t *testing.T) {
	cards := gatewayLab(t)
	g, _ := gatewayOf(t, cards, true)
	dies := registered(t, g, cards[Inner])
	other := NewFlowKey(local4, other4, 0)
	if err := errors.Join(g.Insert(NewFlowKey(local4, remote4, 0)), g.Insert(other)); err != nil {
		t.Fatal(err)
	}
	g.hang(t)
	g.run(t, Inner,
		verdictCase{"segment while it hangs", flowOut4, verdictDrop, "flow_dropped_stale"},
		verdictCase{"SYN while it hangs", flowSYN4, verdictDrop, "flow_dropped_stale"},
		verdictCase{"others while it hangs", segment{src: local4, dst: client4, flags: flagSYN}.frame(), verdictRedirect, "forwarded"},
	)
	g.run(t, Outer, verdictCase{"segment from outside while it hangs", flowIn4, verdictDrop, "flow_dropped_stale"})
	mapsAgree(t, g, 2, 2)

	// Nobody takes its place while it does.
	if _, _, err := AttachGateway(GatewayConfig{Ifindex: cards, Mode: ModeCopy}); !errors.Is(err, ErrXDPBusy) {
		t.Errorf("another gateway: %v", err)
	}
	dies()
	g.run(t, Outer, verdictCase{"SYN from outside when it is dead", segment{src: remote4, dst: local4, flags: flagSYN}.frame(), verdictDrop, "flow_dropped_stale"})
	g.run(t, Inner,
		verdictCase{"segment when it is dead", flowOut4, verdictDrop, "flow_dropped_stale"},
		verdictCase{"SYN when it is dead", flowSYN4, verdictRedirect, "reused_forwarded"},
		verdictCase{"segment after that", flowOut4, verdictRedirect, "forwarded"},
	)

	// What the next one takes over is what is listed then.
	next, left := gatewayOf(t, cards, true)
	if !next.Replaced() || len(left) != 1 || left[0] != other {
		t.Errorf("replaced %v, found %v", next.Replaced(), left)
	}
	if left, err := next.Adopt(); err != nil || len(left) != 1 {
		t.Errorf("adopted %v, %v", left, err)
	}
	mapsAgree(t, next, 1, 1)
	if err := errors.Join(next.Delete(other), next.Close(false), g.Close(false)); err != nil {
		t.Error(err)
	}
}

// What a gateway does without its process is what was chosen last. What an
// earlier one kept shut stays that, also when a start fails.
func TestGatewayChoice(t *testing.T) {
	cards := gatewayLab(t)
	key := NewFlowKey(local4, remote4, 0)
	syn := segment{src: local4, dst: client4, flags: flagSYN}.frame()
	var before *Gateway
	for i, forward := range []bool{true, false, false, true} {
		g, left := gatewayOf(t, cards, forward)
		if i == 0 {
			if err := g.Insert(key); err != nil {
				t.Fatal(err)
			}
		} else if err := before.Close(true); err != nil || len(left) != 1 || left[0] != key {
			t.Fatalf("%v, found %v", err, left)
		}
		g.hang(t)
		other := verdictCase{"others", syn, verdictRedirect, "forwarded"}
		shut := verdictCase{"what was encrypted", flowOut4, verdictDrop, "flow_dropped_stale"}
		if !forward {
			other.verdict, other.counter, shut.counter = verdictDrop, "blocked", "blocked"
		}
		g.run(t, Inner, other, shut)

		// A start that fails after it has found the programs.
		lo := cards
		lo[Outer] = linkByName(t, "lo").Attrs().Index
		if _, left, err := AttachGateway(GatewayConfig{Ifindex: lo, Mode: ModeCopy}); err == nil || len(left) != 1 || left[0] != key {
			t.Errorf("on lo: %v, found %v", err, left)
		}
		for side, index := range cards {
			l, err := netlink.LinkByIndex(index)
			if err != nil {
				t.Fatal(err)
			}
			if x := l.Attrs().Xdp; x == nil || !x.Attached || l.Attrs().Promisc == 0 {
				t.Errorf("%v side: nothing is attached any more", Side(side))
			}
		}
		before = g
	}
	if err := before.Close(true); err != nil {
		t.Error(err)
	}
	found, err := RemoveGateway([2]string{"card0", "card1"})
	if err != nil || !found {
		t.Errorf("removed: %v, %v", found, err)
	}
	for side, index := range cards {
		l, err := netlink.LinkByIndex(index)
		if err != nil {
			t.Fatal(err)
		}
		if x := l.Attrs().Xdp; x != nil && x.Attached || l.Attrs().Promisc != 0 {
			t.Errorf("%v side: something is left", Side(side))
		}
	}
}
