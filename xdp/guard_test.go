package xdp

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// nothingAttached fails when an interface has programs, filters or a clsact
// qdisc.
func nothingAttached(t *testing.T, ifindex int) {
	t.Helper()
	dev, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		t.Fatal(err)
	}
	if x := dev.Attrs().Xdp; x != nil && x.Attached {
		t.Errorf("XDP program %d is attached", x.ProgId)
	}
	qdiscs, err := netlink.QdiscList(dev)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range qdiscs {
		if q.Type() == "clsact" {
			t.Error("the clsact qdisc is still there")
		}
	}
	for _, f := range guardFilters(t, dev) {
		t.Errorf("filter %v", f)
	}
}

func guardFilters(t *testing.T, dev netlink.Link) (found []*netlink.BpfFilter) {
	t.Helper()
	for _, hook := range guardHooks {
		filters, err := netlink.FilterList(dev, hook.parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok && b.Name == guardFilter {
				found = append(found, b)
			}
		}
	}
	return found
}

// A stream is a connection through a diverter and its guard.
type stream struct {
	host, peer net.Conn
	key        FlowKey
}

// divertedStream makes a connection from the host through the diverter.
func divertedStream(t *testing.T, r *relay, g *Guard, port uint16) stream {
	t.Helper()
	ln := listen(r.lab, peerAddr4, true)
	from := netip.AddrPortFrom(hostAddr4, port)
	s := stream{key: NewFlowKey(from, addrPort(ln.Addr()), 0)}
	if err := errors.Join(r.diverter.Insert(s.key), g.Insert(s.key)); err != nil {
		t.Fatal(err)
	}
	s.host, s.peer = connect(r.lab, from, ln, false)
	if err := exchange(s.host, s.peer, 1000); err != nil {
		t.Fatal(err)
	}
	return s
}

func (r *relay) openGuard(t *testing.T) *Guard {
	t.Helper()
	g, left, err := OpenGuard(guardOf(t, r.nic.Attrs().Index, r.diverter.Mark()))
	if err != nil || len(left) != 0 {
		t.Fatalf("leftovers %v, %v", left, err)
	}
	return g
}

func guardCount(t *testing.T, g *Guard, name string) uint64 {
	t.Helper()
	c, err := g.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c[name]
}

// waitCount waits until a counter has moved on from a value.
func waitCount(t *testing.T, g *Guard, name string, from uint64) {
	t.Helper()
	for deadline := time.Now().Add(testDeadline); guardCount(t, g, name) <= from; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s stays at %d", name, from)
		}
	}
}

// noPlaintext fails if TCP of ours reached the peer's end after the frames
// that were received so far. A sentinel ends the wait.
func noPlaintext(t *testing.T, l *lab, wire *packetSocket) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	sentinel := append(append(append([]byte(nil), peerMAC...), hostMAC...), 8, 0)
	sentinel = append(sentinel, segment{src: netip.AddrPortFrom(hostAddr4, 0), dst: netip.AddrPortFrom(peerAddr4, 0)}.ip(253, []byte("sentinel"))...)
	if err := unix.Sendto(fd, sentinel, 0, &unix.SockaddrLinklayer{Ifindex: l.nic.Attrs().Index}); err != nil {
		t.Fatal(err)
	}
	for {
		f := wire.receive()
		if f[23] == 253 {
			return
		}
		if f[23] == 6 {
			t.Errorf("a segment got out: % x", f[:min(len(f), 80)])
		}
	}
}

func TestGuardOutlivesDiverter(t *testing.T) {
	l := newLab(t, 1, 1500)
	r := newRelay(l, 1, HostAttachConfig{Mode: ModeCopy})
	g := r.openGuard(t)
	s := divertedStream(t, r, g, 45001)
	other := divertedStream(t, r, g, 45002)

	if err := r.diverter.Close(); err != nil {
		t.Fatal(err)
	}
	wire := l.openPacket(0x0800)
	out, in := guardCount(t, g, "guard_out_flow_dropped"), guardCount(t, g, "guard_in_flow_dropped")
	if _, err := s.host.Write(make([]byte, 20_000)); err != nil { // more than one segment: GSO
		t.Fatal(err)
	}
	if _, err := s.peer.Write([]byte("forged")); err != nil {
		t.Fatal(err)
	}
	waitCount(t, g, "guard_out_flow_dropped", out)
	waitCount(t, g, "guard_in_flow_dropped", in)
	noPlaintext(t, l, wire)

	// The process dies; the next one finds the connections.
	g.Close()
	before := guardFilters(t, l.nic)
	if _, err := s.host.Write([]byte("more")); err != nil {
		t.Fatal(err)
	}
	noPlaintext(t, l, wire)
	r.diverter.mark += 2
	g, left, err := OpenGuard(guardOf(t, l.nic.Attrs().Index, r.diverter.mark))
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 2 || !slices.Contains(left, s.key) || !slices.Contains(left, other.key) {
		t.Fatalf("leftovers %v", left)
	}
	after := guardFilters(t, l.nic)
	if len(before) != 2 || len(after) != 2 {
		t.Fatalf("filters before %v, after %v", before, after)
	}
	for i := range after {
		if after[i].Id == before[i].Id || after[i].Priority != before[i].Priority || after[i].Handle != before[i].Handle {
			t.Errorf("filter %v became %v", before[i], after[i])
		}
	}
	if n, err := DestroySockets(left[:1]); n != 1 || err != nil {
		t.Fatalf("%d sockets ended, %v", n, err)
	}
	if err := DestroySocket(left[1]); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{s.host, other.host} {
		c.SetReadDeadline(time.Now().Add(testDeadline))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("read from an ended socket: %v", err)
		}
	}
	noPlaintext(t, l, wire)
	for _, key := range left {
		if err := g.Delete(key); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	nothingAttached(t, l.nic.Attrs().Index)
}

// TestGuardChild is the process that TestGuardKilled kills.
func TestGuardChild(t *testing.T) {
	index := os.Getenv("XDP_TEST_GUARD_IFINDEX")
	if index == "" {
		return
	}
	ifindex, err := strconv.Atoi(index)
	if err != nil {
		t.Fatal(err)
	}
	tap, err := OpenTAP(TAPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := AttachHost(HostAttachConfig{Ifindex: ifindex, TAPIfindex: tap.Ifindex()})
	if err != nil {
		t.Fatal(err)
	}
	g, _, err := OpenGuard(guardOf(t, ifindex, d.Mark()))
	if err != nil {
		t.Fatal(err)
	}
	key := NewFlowKey(local4, remote4, 0)
	if err := errors.Join(d.Insert(key), g.Insert(key)); err != nil {
		t.Fatal(err)
	}
	fmt.Println("\nattached")
	io.Copy(io.Discard, os.Stdin)
	t.Fatal("not killed")
}

func TestGuardKilled(t *testing.T) {
	l := newLab(t, 1, 1500)
	ifindex := l.nic.Attrs().Index
	child := exec.Command("/proc/self/exe", "-test.run=^TestGuardChild$")
	child.Env = append(os.Environ(), "XDP_TEST_GUARD_IFINDEX="+strconv.Itoa(ifindex))
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	said := ""
	for lines := bufio.NewScanner(stdout); !strings.HasSuffix(said, "attached\n") && lines.Scan(); {
		said += lines.Text() + "\n"
	}
	if !strings.HasSuffix(said, "attached\n") {
		child.Process.Kill()
		child.Wait()
		t.Fatalf("child: %s", said)
	}

	// While it lives, there is no second one.
	if _, _, err := OpenGuard(guardOf(t, ifindex, 1)); !errors.Is(err, ErrGuardBusy) {
		t.Errorf("guard beside a live process: %v", err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	child.Wait()

	if dev, err := netlink.LinkByIndex(ifindex); err != nil || dev.Attrs().Xdp != nil && dev.Attrs().Xdp.Attached {
		t.Errorf("XDP outlived the process: %v", err)
	}
	if _, err := netlink.LinkByName("tcpcrypt0"); err == nil {
		t.Error("the TAP device outlived the process")
	}
	g, left, err := OpenGuard(guardOf(t, ifindex, 1))
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 1 || left[0] != NewFlowKey(local4, remote4, 0) {
		t.Errorf("leftovers %v", left)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	nothingAttached(t, ifindex)
}

func TestGuardSharesQdisc(t *testing.T) {
	l := newLab(t, 1, 1500)
	index := l.nic.Attrs().Index
	if _, _, err := OpenGuard(guardOf(t, index, 0)); err == nil {
		t.Error("mark 0 was accepted")
	}
	g, _, err := OpenGuard(guardOf(t, index, 7))
	if err != nil {
		t.Fatal(err)
	}
	// Somebody else puts a filter onto the qdisc that the guard made.
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, 0), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Close()
	foreign := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL,
		},
		Fd: pass.FD(), Name: "foreign", DirectAction: true,
	}
	if err := netlink.FilterAdd(foreign); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	if filters, err := netlink.FilterList(l.nic, netlink.HANDLE_MIN_INGRESS); err != nil || len(filters) == 0 {
		t.Fatalf("the other filter is gone: %v, %v", filters, err)
	}
	// The next guard finds the qdisc and leaves it.
	if g, _, err = OpenGuard(guardOf(t, index, 7)); err != nil {
		t.Fatal(err)
	}
	if err := netlink.FilterDel(foreign); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	qdiscs, err := netlink.QdiscList(l.nic)
	if err != nil || !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" }) {
		t.Errorf("a qdisc that was there is gone: %v, %v", qdiscs, err)
	}

	// A guard whose interface goes.
	if g, _, err = OpenGuard(guardOf(t, index, 7)); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(l.nic); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}

// What others take off the interface is put back: a filter, or the qdisc with both.
func TestGuardMended(t *testing.T) {
	l := newLab(t, 1, 1500)
	index := l.nic.Attrs().Index
	g, _, err := OpenGuard(guardOf(t, index, 7))
	if err != nil {
		t.Fatal(err)
	}
	mend := func(what string, want bool) {
		t.Helper()
		gone, err := g.Mend()
		if n := len(guardFilters(t, l.nic)); err != nil || gone != want || n != len(guardHooks) || !g.Layers()[0].Active {
			t.Errorf("%s: gone %v, %v, %d filters, %+v", what, gone, err, n, g.Layers()[0])
		}
	}
	mend("nothing happened", false)
	for i, hook := range guardHooks {
		if err := netlink.FilterDel(g.filter(hook.parent, hook.program)); err != nil {
			t.Fatal(err)
		}
		mend(fmt.Sprintf("filter %d was deleted", i), true)
	}
	for _, hook := range guardHooks {
		if err := netlink.FilterDel(g.filter(hook.parent, hook.program)); err != nil {
			t.Fatal(err)
		}
	}
	mend("both filters were deleted", true)
	if err := netlink.QdiscDel(g.qdisc()); err != nil {
		t.Fatal(err)
	}
	mend("the qdisc was deleted", true)
	if err := netlink.LinkDel(l.nic); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Mend(); !errors.Is(err, unix.ENODEV) || g.Layers()[0].Active {
		t.Errorf("without an interface: %v, %+v", err, g.Layers()[0])
	}
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}

// The programs look at packets from the first connection that is listed on, until
// the last one is not any more.
func TestGuardListing(t *testing.T) {
	needRoot(t)
	g, c := loadGuard(t, 0x7654321, 0x4320)
	first, second := NewFlowKey(local4, remote4, 0), NewFlowKey(local6, remote6, 7)
	frame := (&segment{src: remote4, dst: local4}).frame()
	for i, step := range []struct {
		do      func(FlowKey) error
		key     FlowKey
		listing uint32
		verdict uint32 // on a packet of the first connection
	}{
		{g.Delete, first, 0, tcNext},
		{g.Insert, first, 1, tcShot},
		{g.Insert, first, 1, tcShot},
		{g.Insert, second, 1, tcShot},
		{g.Delete, first, 1, tcNext},
		{g.Delete, first, 1, tcNext},
		{g.Insert, first, 1, tcShot},
		{g.Delete, second, 1, tcShot},
		{g.Delete, first, 0, tcNext},
		{g.Insert, first, 1, tcShot},
	} {
		if err := step.do(step.key); err != nil {
			t.Fatal(err)
		}
		var listing uint32
		if err := c.Maps["guard_listing"].Lookup(uint32(0), &listing); err != nil {
			t.Fatal(err)
		}
		verdict, err := c.Programs["guard_ingress"].Run(&ebpf.RunOptions{Data: frame})
		if err != nil {
			t.Fatal(err)
		}
		if listing != step.listing || verdict != step.verdict {
			t.Errorf("step %d: listing %d, verdict %d, want %d and %d", i, listing, int32(verdict), step.listing, int32(step.verdict))
		}
	}
}

// loadGuard loads the guard's programs without an interface.
func loadGuard(t *testing.T, mark uint32, tag uint16) (*Guard, *ebpf.Collection) {
	t.Helper()
	spec, err := bpf.LoadGuard()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(spec.Variables["mark"].Set(mark), spec.Variables["tag"].Set(tag)); err != nil {
		t.Fatal(err)
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(c.Close)
	return &Guard{collection: c, flows: guardFlows(c)}, c
}

func TestGuardVerdicts(t *testing.T) {
	needRoot(t)
	const mark, tag = 0x7654321, 0x4320
	g, c := loadGuard(t, mark, tag)
	for _, key := range []FlowKey{NewFlowKey(local4, remote4, 0), NewFlowKey(local6, remote6, 7)} {
		if err := g.Insert(key); err != nil {
			t.Fatal(err)
		}
	}
	const (
		hop, routing, fragment, destination, ah = 0, 43, 44, 60, 51

		none    = ""
		flow    = "_flow_dropped"
		pieces  = "_fragment_dropped"
		through = tcNext
	)
	chain := func(types ...byte) []byte { // extension headers of 8 bytes, then TCP
		var b []byte
		for i := range types {
			next := byte(6)
			if i+1 < len(types) {
				next = types[i+1]
			}
			b = append(b, next, 0, 0, 0, 0, 0, 0, 0)
		}
		return b
	}
	type guardCase struct {
		name    string
		s       segment
		verdict uint32
		counter string
	}
	v6 := func(types ...byte) segment {
		return segment{src: remote6, dst: local6, extra: chain(types...), extType: types[0]}
	}
	first := func(s segment, header int) segment { // more fragments follow
		s.extra[header+3] = 1
		return s
	}
	cases := []guardCase{
		{"flow v4", segment{src: remote4, dst: local4}, tcShot, flow},
		{"flow v4 with IP options", segment{src: remote4, dst: local4, ipOption: make([]byte, 40), options: make([]byte, 40)}, tcShot, flow},
		{"flow v6", segment{src: remote6, dst: local6}, tcShot, flow},
		{"flow in VLAN", segment{src: remote4, dst: local4, vlans: []uint16{7}}, tcShot, flow},
		{"flow v6 in VLAN", segment{src: remote6, dst: local6, vlans: []uint16{7}}, tcShot, flow},
		{"flow behind two tags", segment{src: remote4, dst: local4, vlans: []uint16{8, 9}}, tcShot, flow},
		{"flow v6 behind four tags", segment{src: remote6, dst: local6, vlans: []uint16{8, 9, 10, 11}}, tcShot, flow},
		{"flow behind a service tag", segment{src: remote4, dst: local4, vlans: []uint16{8}, tagType: 0x88a8}, tcShot, flow},
		{"fragment behind two tags", segment{src: remote4, dst: local4, vlans: []uint16{8, 9}, fragment: 7}, tcShot, pieces},
		{"not listed behind two tags", segment{src: other4, dst: local4, vlans: []uint16{8, 9}}, through, none},
		{"not listed", segment{src: other4, dst: local4}, through, none},
		{"fragment v4", segment{src: remote4, dst: local4, fragment: 0x2000}, tcShot, pieces},
		{"fragment v4 of others", segment{src: other4, dst: local4, fragment: 0x2000}, through, none},
		{"hop-by-hop", v6(hop), tcShot, flow},
		{"several extensions", v6(hop, destination, routing, destination), tcShot, flow},
		{"authentication header", segment{src: remote6, dst: local6, extra: append([]byte{6, 1}, make([]byte, 10)...), extType: ah}, tcShot, flow},
		{"too many extensions", v6(slices.Repeat([]byte{destination}, 9)...), tcShot, pieces},
		{"extensions of others", segment{src: other6, dst: local6, extra: chain(hop), extType: hop}, through, none},
		{"fragment v6", v6(fragment), tcShot, pieces},
		{"fragment v6 behind options", first(v6(hop, fragment), 8), tcShot, pieces},
		{"fragment v6 of options", first(v6(fragment, destination), 0), tcShot, pieces},
		{"only fragment v6 behind options", v6(hop, fragment), tcShot, flow},
		{"only fragment v6 of options", v6(fragment, destination), tcShot, flow},
		{"fragment v6 of others", segment{src: other6, dst: local6, extra: chain(fragment), extType: fragment}, through, none},
		{"extension of length 255", segment{src: remote6, dst: local6, extra: []byte{6, 255, 0, 0, 0, 0, 0, 0}, extType: hop}, tcShot, pieces},
	}
	for _, outbound := range []bool{false, true} {
		program, direction := "guard_ingress", "guard_in"
		if outbound {
			program, direction = "guard_egress", "guard_out"
		}
		for _, tc := range cases {
			t.Run(program+"/"+tc.name, func(t *testing.T) {
				if outbound {
					tc.s.src, tc.s.dst = tc.s.dst, tc.s.src
				}
				before, _ := g.Counters()
				got, err := c.Programs[program].Run(&ebpf.RunOptions{Data: tc.s.frame()})
				if err != nil {
					t.Fatal(err)
				}
				if got != tc.verdict {
					t.Errorf("verdict %d, want %d", int32(got), int32(tc.verdict))
				}
				after, err := g.Counters()
				if err != nil {
					t.Fatal(err)
				}
				for _, name := range guardCounters {
					want := before[name]
					if tc.counter != none && name == direction+tc.counter {
						want++
					}
					if after[name] != want {
						t.Errorf("counter %s moved by %d", name, after[name]-before[name])
					}
				}
			})
		}
	}

	// An error quotes a packet that went the other way.
	quoted := func(from, to netip.AddrPort, types ...byte) []byte {
		s := segment{src: from, dst: to}
		router := router4
		if from.Addr().Is6() {
			router = router6
		}
		if len(types) > 0 {
			s.extra, s.extType = chain(types...), types[0]
		}
		kind := byte(3)
		if from.Addr().Is6() {
			kind = 2
		}
		return s.icmp(router, kind, 68)
	}
	wrapped := func(frame []byte, types ...byte) []byte { // ICMPv6 behind extension headers
		headers := chain(types...)
		headers[len(headers)-8] = 58
		b := append(append(append([]byte(nil), frame[:54]...), headers...), frame[54:]...)
		b[20] = types[0]
		return b
	}
	for _, tc := range []struct {
		name    string
		in, out []byte
		listed  bool
	}{
		{"v4", quoted(local4, remote4), quoted(remote4, local4), true},
		{"v4, outwards to itself", quoted(local4, remote4), quoted(local4, remote4), true},
		{"v6, outwards to itself", quoted(local6, remote6), quoted(local6, remote6), true},
		{"v6 about too many, to itself", quoted(local6, remote6, slices.Repeat([]byte{hop}, 9)...), quoted(local6, remote6, slices.Repeat([]byte{hop}, 9)...), true},
		{"v6", quoted(local6, remote6), quoted(remote6, local6), true},
		{"v6 about extension headers", quoted(local6, remote6, hop, destination), quoted(remote6, local6, routing), true},
		{"v6 about a fragment", quoted(local6, remote6, fragment), quoted(remote6, local6, fragment), true},
		{"v6 about too many", quoted(local6, remote6, slices.Repeat([]byte{hop}, 9)...), quoted(remote6, local6, slices.Repeat([]byte{hop}, 9)...), true},
		{"v6 behind extension headers", wrapped(quoted(local6, remote6), hop, destination), wrapped(quoted(remote6, local6), hop), true},
		{"v6 behind and about them", wrapped(quoted(local6, remote6, hop), destination), wrapped(quoted(remote6, local6, hop), hop), true},
		{"v4 of others", quoted(local4, other4), quoted(other4, local4), false},
		{"v6 of others", quoted(local6, other6), quoted(other6, local6, hop), false},
		{"v6 of others about a fragment", quoted(local6, other6, slices.Repeat([]byte{hop}, 9)...), quoted(local6, other6, slices.Repeat([]byte{hop}, 9)...), false},
	} {
		for direction, frame := range map[string][]byte{"ingress": tc.in, "egress": tc.out} {
			counter := map[string]string{"ingress": "guard_in_icmp_dropped", "egress": "guard_out_icmp_dropped"}[direction]
			before := guardCount(t, g, counter)
			got, err := c.Programs["guard_"+direction].Run(&ebpf.RunOptions{Data: frame})
			want, moves := uint32(through), uint64(0)
			if tc.listed {
				want, moves = tcShot, 1
			}
			if err != nil || got != want {
				t.Errorf("ICMP error %s, %s: verdict %d, want %d (%v)", tc.name, direction, int32(got), int32(want), err)
			}
			if moved := guardCount(t, g, counter) - before; moved != moves {
				t.Errorf("ICMP error %s, %s: counter moved by %d", tc.name, direction, moved)
			}
		}
	}

	// The mark opens, and is taken off. struct __sk_buff starts with len,
	// pkt_type, mark.
	for _, m := range []uint32{mark, mark + 1} {
		in, out := make([]byte, 192), make([]byte, 192)
		nativeEndian.PutUint32(in[8:], m)
		got, err := c.Programs["guard_ingress"].Run(&ebpf.RunOptions{Data: segment{src: remote4, dst: local4}.frame(), Context: in, ContextOut: out})
		if err != nil {
			t.Fatal(err)
		}
		want, left := uint32(tcShot), m
		if m == mark {
			want, left = tcNext, 0
		}
		if got != want || nativeEndian.Uint32(out[8:]) != left {
			t.Errorf("mark %x: verdict %d, mark %x", m, int32(got), nativeEndian.Uint32(out[8:]))
		}
	}
}

// A look-up of a connection that is gone finds the listener of its port, which
// must survive.
func TestDestroySpareListener(t *testing.T) {
	for _, tc := range []struct {
		name       string
		host, peer netip.Addr
		network    string
	}{
		{"v4", hostAddr4, peerAddr4, "tcp4"},
		{"v6", hostAddr6, peerAddr6, "tcp6"},
		{"v4 on an IPv6 socket", hostAddr4, peerAddr4, "tcp"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, 1, 1500)
			ln, err := net.Listen(tc.network, ":0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			port := addrPort(ln.Addr()).Port()
			var client net.Conn
			l.inPeer(func() (err error) {
				client, err = net.Dial("tcp", netip.AddrPortFrom(tc.host, port).String())
				return err
			})
			defer client.Close()
			server, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			key := NewFlowKey(netip.AddrPortFrom(tc.host, port), addrPort(client.LocalAddr()), 0)
			wrong := key
			wrong[35]++
			if err := DestroySocket(wrong); err != nil {
				t.Fatal(err)
			}
			if err := exchange(server, client, 10); err != nil {
				t.Fatalf("another connection was ended: %v", err)
			}
			vlan := key
			vlan[36] = 9 // not a socket's matter
			if err := DestroySocket(vlan); err != nil {
				t.Fatal(err)
			}
			server.SetReadDeadline(time.Now().Add(testDeadline))
			if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
				t.Errorf("read: %v", err)
			}
			for range 2 { // now that it is gone
				if err := DestroySocket(key); err != nil {
					t.Fatal(err)
				}
			}
			l.inPeer(func() error {
				c, err := net.DialTimeout("tcp", netip.AddrPortFrom(tc.host, port).String(), testDeadline)
				if err == nil {
					c.Close()
				}
				return err
			})
		})
	}
}

func TestDestroyBoundToDevice(t *testing.T) {
	l := newLab(t, 1, 1500)
	ln := listen(l, peerAddr6, true)
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "nic0") }), err)
	}}
	c, err := dialer.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := DestroySocket(NewFlowKey(addrPort(c.LocalAddr()), addrPort(c.RemoteAddr()), 0)); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(testDeadline))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("read: %v", err)
	}
}

func TestProbe(t *testing.T) {
	l := newLab(t, 2, 1400)
	c, err := Probe("nic0")
	if err != nil {
		t.Fatal(err)
	}
	if c.Driver != "veth" || !c.Virtual || c.MTU != 1400 || c.Ifindex != l.nic.Attrs().Index || c.RXQueues != 2 || c.TXQueues != 2 ||
		!c.NativeXDP || c.ZeroCopy || c.Kernel == "" || len(c.Reasons) == 0 || c.VLANStripped {
		t.Errorf("%+v", c)
	}
	vlan := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "nic0.5", ParentIndex: c.Ifindex}, VlanId: 5}
	switch err := netlink.LinkAdd(vlan); {
	case errors.Is(err, unix.EOPNOTSUPP):
		t.Log("not tried: the kernel has no VLAN devices")
	case err != nil:
		t.Fatal(err)
	default:
		if c, err := Probe("nic0"); err != nil || !c.VLANStripped {
			t.Errorf("with a VLAN: %+v, %v", c, err)
		}
	}
	if c, err = Probe("lo"); err != nil || !c.Virtual || !c.Loopback || c.NativeXDP {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := Probe("none"); err == nil {
		t.Error("a device that is not there")
	}
}

func TestWatchLinkErrors(t *testing.T) {
	newLab(t, 1, 1500)
	if _, err := WatchLink(9999, make(chan error)); err == nil {
		t.Error("a device that is not there")
	}
}
