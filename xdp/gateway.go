package xdp

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// gatewayCounters names the counters of bpf/gateway.c of each side, in the order
// of its enum.
var gatewayCounters = []string{
	"forwarded",
	"local_passed",
	"flow_redirected",
	"flow_dropped_no_socket",
	"flow_dropped_stale",
	"syn_redirected",
	"syn_forwarded",
	"syn_refused",
	"fragment_dropped",
	"extension_header_dropped",
	"icmp_redirected",
	"icmp_dropped",
	"reused_forwarded",
	"blocked",
}

// A Side is one of the two network cards of a Gateway.
type Side int

const (
	// Outer is the card on whose wire connections are encrypted.
	Outer Side = iota
	// Inner is the card of the hosts whose connections they are.
	Inner
)

// String returns the name.
func (s Side) String() string {
	if s == Inner {
		return "inner"
	}
	return "outer"
}

// GatewayConfig says what a Gateway is attached to.
type GatewayConfig struct {
	Ifindex [2]int // by Side

	// Mode, Frags, Policy, Flows and Heartbeat are those of HostAttachConfig.
	Mode      Mode
	Frags     bool
	Policy    Policy
	Flows     int
	Heartbeat time.Duration

	// Forward says what the programs do when the process hangs or dies, or closes
	// the Gateway with keep set: they go on to forward what is not encrypted, and
	// keep what was encrypted shut. Otherwise they forward nothing then.
	Forward bool

	// Shut are connections that an earlier attempt returned: they are inserted
	// before anything is forwarded.
	Shut []FlowKey
}

// A Gateway is the pair of eBPF programs that makes two network cards a wire:
// segments of inserted connections, ICMP errors about them that come from
// outside, and SYNs that are to be negotiated go to AF_XDP sockets, everything
// else from card to card. Packets to a card's own address are the kernel's.
//
// An inserted connection is named by the host on the inner side as local.
type Gateway struct {
	diversion
	cards    [2]netlink.Link
	mode     Mode
	fallback error
	replaced bool           // an earlier Gateway's programs
	undo     []func() error // what Close puts back, last first
}

// AttachGateway loads and attaches the programs in the network namespace of the
// calling thread, makes the cards receive what is for others, and leaves VLAN
// tags in the packets. Programs that an earlier Gateway left are replaced without
// a gap, and stay when it fails, those that were replaced before it did as well;
// the connections that they kept shut stay inserted and are returned, with an
// error too: the next attempt has to name them. It fails with ErrXDPBusy when the
// process of that Gateway lives or hangs. The programs outlive this process. It
// needs CAP_BPF, CAP_NET_ADMIN and Linux 6.6.
func AttachGateway(cfg GatewayConfig) (_ *Gateway, leftovers []FlowKey, err error) {
	if err := checkKernel(); err != nil {
		return nil, nil, err
	}
	g := &Gateway{diversion: diversion{heartbeat: cfg.Heartbeat > 0}}
	defer func() {
		if err != nil {
			_ = g.Close(g.replaced)
		}
	}()
	frags := cfg.Frags
	for side, index := range cfg.Ifindex {
		if g.cards[side], err = netlink.LinkByIndex(index); err != nil {
			return nil, nil, fmt.Errorf("xdp: interface %d: %w", index, err)
		}
		frags = frags || g.cards[side].Attrs().MTU > maxPlainMTU
	}
	old, err := findGateway(g.cards)
	if err != nil {
		return nil, nil, err
	}
	defer old.close()
	g.replaced = old.has[Outer] || old.has[Inner]
	if err := g.load(cfg, frags, old); err != nil {
		return nil, nil, err
	}
	if leftovers, err = g.flows.keys(); err != nil {
		return nil, nil, err
	}
	for _, key := range cfg.Shut {
		if err := g.Insert(key); err != nil {
			return nil, leftovers, err
		}
		if !slices.Contains(leftovers, key) {
			leftovers = append(leftovers, key)
		}
	}
	if err := errors.Join(g.SetPolicy(cfg.Policy), g.beat()); err != nil {
		return nil, leftovers, err
	}
	for side, card := range g.cards {
		if err := g.collection.Maps["cards"].Put(uint32(side), uint32(card.Attrs().Index)); err != nil {
			return nil, leftovers, fmt.Errorf("xdp: write eBPF map of devices: %w", err)
		}
		if err := g.prepare(card); err != nil {
			return nil, leftovers, err
		}
	}
	if err := g.attach(cfg, frags, old); err != nil {
		return nil, leftovers, err
	}
	return g, leftovers, nil
}

func (g *Gateway) load(cfg GatewayConfig, frags bool, old *oldGateway) error {
	spec, err := bpf.LoadGateway()
	if err != nil {
		return fmt.Errorf("xdp: read eBPF object: %w", err)
	}
	// Both kinds cannot share a map of devices.
	for name := range spec.Programs {
		if strings.HasSuffix(name, "_frags") != frags {
			delete(spec.Programs, name)
		}
	}
	if cfg.Flows > 0 {
		spec.Maps["flows"].MaxEntries = uint32(cfg.Flows)
		spec.Maps["pairs"].MaxEntries = uint32(cfg.Flows)
	}
	var high [2]uint32
	var low [2]uint16
	for side, card := range g.cards {
		if mac := card.Attrs().HardwareAddr; len(mac) == 6 {
			high[side], low[side] = nativeEndian.Uint32(mac), nativeEndian.Uint16(mac[4:])
		}
	}
	for name, value := range map[string]any{
		"heartbeat_timeout": uint64(cfg.Heartbeat), "mac_high": high, "mac_low": low, "block": !cfg.Forward,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("xdp: set eBPF variable %s: %w", name, err)
		}
	}
	var options ebpf.CollectionOptions
	if old.flows != nil && old.pairs != nil {
		// What they list stays shut without a gap.
		spec.Maps["flows"].MaxEntries = old.flows.MaxEntries()
		spec.Maps["pairs"].MaxEntries = old.pairs.MaxEntries()
		options.MapReplacements = map[string]*ebpf.Map{"flows": old.flows, "pairs": old.pairs}
	}
	if g.collection, err = ebpf.NewCollectionWithOptions(spec, options); err != nil {
		return loadError(err)
	}
	g.flows = newFlowMap(g.collection.Maps["flows"], g.collection.Maps["pairs"])
	return nil
}

// Adopt returns the connections that are inserted, those that an earlier Gateway
// kept shut, and counts them as Flows from now on. It is to be called when all
// sockets are registered: before, the programs may take this process for dead,
// and let go of connections whose inner end begins anew.
func (g *Gateway) Adopt() ([]FlowKey, error) { return g.flows.adopt() }

// prepare makes a card receive the packets of others, with their VLAN tags.
func (g *Gateway) prepare(card netlink.Link) error {
	name := card.Attrs().Name
	if card.Attrs().Promisc == 0 {
		if err := netlink.SetPromiscOn(card); err != nil {
			return fmt.Errorf("xdp: make %s promiscuous: %w", name, err)
		}
	}
	if card.Attrs().Promisc == 0 || g.replaced {
		g.undo = append(g.undo, func() error { return netlink.SetPromiscOff(card) })
	}
	if undo := keepTags(card); undo != nil {
		g.undo = append(g.undo, undo)
	}
	return nil
}

// attach puts the programs onto both cards in the same mode.
func (g *Gateway) attach(cfg GatewayConfig, frags bool, old *oldGateway) error {
	modes := []Mode{cfg.Mode}
	if cfg.Mode == ModeAuto {
		modes = []Mode{ModeCopy, ModeGeneric}
	}
	var err error
	for i, mode := range modes {
		if err = g.attachBoth(frags, mode, old); err == nil {
			g.mode = ModeCopy
			if mode == ModeGeneric {
				g.mode = ModeGeneric
			}
			return nil
		}
		if errors.Is(err, ErrXDPBusy) || errors.Is(err, unix.EPERM) {
			break
		}
		if i+1 < len(modes) {
			g.fallback = fmt.Errorf("native XDP: %w", err)
		}
	}
	return err
}

func (g *Gateway) attachBoth(frags bool, mode Mode, old *oldGateway) error {
	for side := range g.cards {
		name := gatewayPrefix + Side(side).String()
		if frags {
			name += "_frags"
		}
		if err := g.attachOne(Side(side), g.collection.Programs[name], mode == ModeGeneric, old); err != nil {
			return fmt.Errorf("xdp: attach to %s: %w", g.cards[side].Attrs().Name, err)
		}
	}
	return nil
}

// attachOne attaches by netlink, not by a link, which would end with the process.
func (g *Gateway) attachOne(side Side, program *ebpf.Program, generic bool, old *oldGateway) error {
	card := g.cards[side]
	if !generic {
		if err := nativeAllowed(card); err != nil {
			return err
		}
	}
	flags := xdpFlags(generic)
	if old.has[side] && old.generic[side] != generic {
		old.detach(side)
	}
	if !old.has[side] {
		flags |= unix.XDP_FLAGS_UPDATE_IF_NOEXIST
	}
	err := netlink.LinkSetXdpFdWithFlags(card, program.FD(), flags)
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w (%s)", ErrXDPBusy, describeXDP(card))
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the driver has no native XDP; mode generic works with every driver: %w", err)
	case err != nil:
		return attachError(err)
	}
	old.has[side] = true
	old.generic[side] = generic
	g.undo = append(g.undo, func() error { return detachXDP(card, generic) })
	return nil
}

func xdpFlags(generic bool) int {
	if generic {
		return unix.XDP_FLAGS_SKB_MODE
	}
	return unix.XDP_FLAGS_DRV_MODE
}

func detachXDP(card netlink.Link, generic bool) error {
	return netlink.LinkSetXdpFdWithFlags(card, -1, xdpFlags(generic))
}

// RegisterSocket gives diverted packets of a receive queue of one card to s,
// which must be bound to that queue. It ends when s is closed.
func (g *Gateway) RegisterSocket(side Side, queue int, s *Socket) error {
	if err := g.collection.Maps[side.String()+"_xsks"].Put(uint32(queue), uint32(s.FD())); err != nil {
		return fmt.Errorf("xdp: register socket for %s queue %d: %w", side, queue, err)
	}
	return nil
}

// Counters returns how many packets met which verdict since AttachGateway, with
// the side that they came from. Any goroutine may call it.
func (g *Gateway) Counters() (map[string]uint64, error) {
	return readCounters(g.collection.Maps["counters"], gatewayCounterNames())
}

func gatewayCounterNames() (names []string) {
	for _, side := range []Side{Outer, Inner} {
		for _, name := range gatewayCounters {
			names = append(names, side.String()+"_"+name)
		}
	}
	return names
}

// Mode returns how XDP is attached: ModeGeneric or, for native, ModeCopy.
func (g *Gateway) Mode() Mode { return g.mode }

// Replaced reports whether an earlier Gateway had left its programs.
func (g *Gateway) Replaced() bool { return g.replaced }

// Fallback returns why native XDP was refused under ModeAuto, or nil.
func (g *Gateway) Fallback() error { return g.fallback }

// Close detaches everything and puts the cards' settings back; with keep
// everything stays as for a process that dies. No other method may be running or
// called later.
func (g *Gateway) Close(keep bool) error {
	var errs []error
	if keep {
		if g.collection != nil {
			// The programs shall not wait for a process that is gone.
			errs = append(errs, g.control(controlBeat, 0))
		}
	} else {
		for i := len(g.undo) - 1; i >= 0; i-- {
			errs = append(errs, g.undo[i]())
		}
	}
	g.undo = nil
	if g.collection != nil {
		g.collection.Close()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("xdp: detach gateway: %w", err)
	}
	return nil
}

// RemoveGateway detaches the programs that a Gateway left on two cards, whose
// names are given by Side, and reports whether there were any.
func RemoveGateway(names [2]string) (found bool, err error) {
	var cards [2]netlink.Link
	for side, name := range names {
		if cards[side], err = FindLink(name); err != nil {
			return false, err
		}
	}
	old, err := findGateway(cards)
	if err != nil {
		return false, err
	}
	defer old.close()
	for side, card := range cards {
		if !old.has[side] {
			continue
		}
		found = true
		if err := errors.Join(detachXDP(card, old.generic[side]), netlink.SetPromiscOff(card)); err != nil {
			return true, fmt.Errorf("xdp: detach from %s: %w", card.Attrs().Name, err)
		}
	}
	return found, nil
}

// oldGateway is what an earlier process left.
type oldGateway struct {
	cards        [2]netlink.Link
	has, generic [2]bool
	flows, pairs *ebpf.Map
}

// findGateway looks for the programs of a Gateway on two cards. It fails with
// ErrXDPBusy when their process lives or hangs.
func findGateway(cards [2]netlink.Link) (*oldGateway, error) {
	old := &oldGateway{cards: cards}
	for side, card := range cards {
		fresh, err := netlink.LinkByIndex(card.Attrs().Index)
		if err != nil {
			old.close()
			return nil, fmt.Errorf("xdp: interface %s: %w", card.Attrs().Name, err)
		}
		x := fresh.Attrs().Xdp
		if x == nil || !x.Attached {
			continue
		}
		program, err := ebpf.NewProgramFromID(ebpf.ProgramID(x.ProgId))
		if err != nil {
			continue
		}
		ours, err := old.adopt(program)
		program.Close()
		if err != nil {
			old.close()
			return nil, err
		}
		old.has[side] = ours
		old.generic[side] = x.AttachMode == xdpAttachedSKB
	}
	return old, nil
}

// served reports whether a process has a socket in a map of sockets: one that was
// killed a moment ago does not any more. Only a program can look there.
func served(sockets *ebpf.Map) (bool, error) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word), // a gateway has all queues, so this one
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, sockets.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "none"),
		asm.Mov.Imm(asm.R0, 1),
		asm.Return().WithSymbol("none"),
	}})
	if err != nil {
		return false, fmt.Errorf("xdp: look for the sockets of an earlier gateway: %w", loadError(err))
	}
	defer program.Close()
	for end := time.Now().Add(beatWait); ; time.Sleep(beatWait / 20) {
		found, err := program.Run(&ebpf.RunOptions{Data: make([]byte, 14)})
		if err != nil || found == 0 || time.Now().After(end) {
			return found != 0, err
		}
	}
}

// xdpAttachedSKB is XDP_ATTACHED_SKB of linux/if_link.h.
const xdpAttachedSKB = 2

// adopt takes the maps of a program if it is a Gateway's.
func (o *oldGateway) adopt(program *ebpf.Program) (ours bool, err error) {
	info, err := program.Info()
	if err != nil || !strings.HasPrefix(info.Name, gatewayPrefix) {
		return false, nil
	}
	ids, _ := info.MapIDs()
	var lives, hangs bool
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return false, fmt.Errorf("xdp: open map %d of the earlier gateway: %w", id, err)
		}
		name := ""
		if info, err := m.Info(); err == nil {
			name = info.Name
		}
		switch {
		case name == "flows" && o.flows == nil && m.KeySize() == KeySize:
			o.flows = m
			continue
		case name == "pairs" && o.pairs == nil:
			o.pairs = m
			continue
		case name == "control":
			lives = beats(m)
		case strings.HasSuffix(name, "_xsks"):
			hangs, err = served(m)
		}
		m.Close()
		if err != nil {
			return false, err
		}
	}
	switch {
	case lives:
		return false, fmt.Errorf("%w: that of another gateway, whose process lives", ErrXDPBusy)
	case hangs:
		return false, fmt.Errorf("%w: that of another gateway, whose process hangs", ErrXDPBusy)
	}
	return true, nil
}

// beatWait is several times as long as a process waits between two beats.
const beatWait = 500 * time.Millisecond

// beats reports whether the process of a control map shows life: one that was
// killed a moment ago does not any more.
func beats(control *ebpf.Map) bool {
	var first, at uint64
	if control.Lookup(uint32(controlBeat), &first) != nil || first == 0 {
		return false
	}
	for end := time.Now().Add(beatWait); time.Now().Before(end); time.Sleep(beatWait / 20) {
		if control.Lookup(uint32(controlBeat), &at) == nil && at != first {
			return true
		}
	}
	return false
}

func (o *oldGateway) detach(side Side) {
	if o.has[side] {
		_ = detachXDP(o.cards[side], o.generic[side])
		o.has[side] = false
	}
}

func (o *oldGateway) close() {
	for _, m := range []*ebpf.Map{o.flows, o.pairs} {
		if m != nil {
			m.Close()
		}
	}
}
