package xdp

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// ErrXDPBusy: the device has an XDP program already.
var ErrXDPBusy = errors.New("xdp: another XDP program is attached")

// DefaultFlows is the number of connections that the flow maps hold if not
// told otherwise.
const DefaultFlows = 262144

// maxPlainMTU is the largest MTU at which drivers with a page per packet take
// an XDP program without fragment support.
const maxPlainMTU = 3506

// hostCounters names the counters of bpf/host.c in the order of its enum.
// Those with "passed" went on to the stack or the wire untouched.
var hostCounters = []string{
	"xdp_passed",
	"xdp_passed_short",
	"xdp_passed_vlan_stacked",
	"xdp_passed_extension_header",
	"xdp_passed_injected",
	"xdp_flow_redirected",
	"xdp_flow_dropped_no_socket",
	"xdp_flow_dropped_stale",
	"xdp_syn_redirected",
	"xdp_syn_passed_no_socket",
	"xdp_syn_passed_stale",
	"xdp_syn_passed_shed",
	"xdp_fragment_dropped",
	"xdp_icmp_redirected",
	"xdp_icmp_dropped_no_socket",
	"egress_passed",
	"egress_passed_short",
	"egress_passed_vlan_stacked",
	"egress_passed_extension_header",
	"egress_passed_injected",
	"egress_flow_redirected",
	"egress_flow_dropped_stale",
	"egress_syn_redirected",
	"egress_syn_passed_stale",
	"egress_fragment_dropped",
	"tap_injected",
	"tap_dropped_fragment",
	"tap_dropped_other",
}

// HostAttachConfig says what a Diverter is attached to.
type HostAttachConfig struct {
	Ifindex    int // the NIC
	TAPIfindex int // the inner device, in the same network namespace

	// Mode chooses how XDP is attached: generic under ModeGeneric; native,
	// else generic, under ModeAuto; natively under the others.
	Mode Mode

	// Frags takes the XDP program that accepts packets of several buffers. It
	// is implied by an MTU above 3506 and goes with SocketConfig.MultiBuffer.
	Frags bool

	// Policy selects the SYNs that are diverted.
	Policy Policy

	Flows int // most connections; 0 means DefaultFlows

	// Heartbeat is how long the programs go on without Beat. Older, they stop
	// to divert new connections and drop the diverted ones. 0 means forever.
	Heartbeat time.Duration
}

// A Diverter is the set of eBPF programs that takes TCP connections of a host
// off its NIC and off its stack:
//
//   - XDP on the NIC redirects segments of inserted connections, ICMP errors
//     about them, and selected SYNs that carry TCP-ENO (RFC 8547, section 4.1)
//     to AF_XDP sockets;
//   - tcx egress on the NIC redirects segments of inserted connections and
//     selected SYNs to the TAP device;
//   - tcx ingress on the TAP device marks what is written there and lets it
//     appear on the NIC's ingress.
//
// All else takes the kernel's path. The programs are held by links that end
// with the process; nothing stays attached.
type Diverter struct {
	diversion
	links    []link.Link // in the order of attachment
	xdp      int         // index in links of the XDP program's
	attached string      // name of that program
	program  ebpf.ProgramID
	mode     Mode
	fallback error
	mark     uint32
	ifindex  int
	undo     func() error // of keepTags, or nil
}

// attached are the XDP programs of this process's diverters, for OpenGuard.
var attached struct {
	sync.Mutex
	programs map[ebpf.ProgramID]bool
}

// AttachHost loads and attaches the programs in the network namespace of the
// calling thread. SYNs are diverted only after Enable(true), and nothing is
// before connections are inserted. It needs CAP_BPF, CAP_NET_ADMIN and Linux
// 6.6.
func AttachHost(cfg HostAttachConfig) (_ *Diverter, err error) {
	if err := checkKernel(); err != nil {
		return nil, err
	}
	nic, err := netlink.LinkByIndex(cfg.Ifindex)
	if err != nil {
		return nil, fmt.Errorf("xdp: interface %d: %w", cfg.Ifindex, err)
	}
	name := nic.Attrs().Name
	d := &Diverter{ifindex: cfg.Ifindex, diversion: diversion{heartbeat: cfg.Heartbeat > 0}}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	frags := cfg.Frags || nic.Attrs().MTU > maxPlainMTU
	xdpName, err := d.load(cfg, frags)
	if err != nil {
		return nil, err
	}
	d.flows = newFlowMap(d.collection.Maps["flows"], d.collection.Maps["pairs"])
	if err := d.SetPolicy(cfg.Policy); err != nil {
		return nil, err
	}
	if err := d.beat(); err != nil {
		return nil, err
	}

	// What is redirected must have a way back before anything is redirected.
	if err := d.attachTCX("tap_ingress", cfg.TAPIfindex, ebpf.AttachTCXIngress); err != nil {
		return nil, fmt.Errorf("xdp: attach to ingress of the inner device: %w", err)
	}
	d.undo = keepTags(nic)
	d.attached = xdpName
	if err := d.attachXDP(d.collection.Programs[xdpName], nic, cfg.Mode); err != nil {
		return nil, fmt.Errorf("xdp: attach to %s: %w", name, err)
	}
	if err := d.attachTCX("nic_egress", cfg.Ifindex, ebpf.AttachTCXEgress); err != nil {
		return nil, fmt.Errorf("xdp: attach to egress of %s: %w", name, err)
	}
	return d, nil
}

// load puts programs and maps into the kernel.
func (d *Diverter) load(cfg HostAttachConfig, frags bool) (xdpName string, err error) {
	spec, err := bpf.LoadHost()
	if err != nil {
		return "", fmt.Errorf("xdp: read eBPF object: %w", err)
	}
	xdpName, unused := "host_xdp", "host_xdp_frags"
	if frags {
		xdpName, unused = unused, xdpName
	}
	delete(spec.Programs, unused)
	if cfg.Flows > 0 {
		spec.Maps["flows"].MaxEntries = uint32(cfg.Flows)
		spec.Maps["pairs"].MaxEntries = uint32(cfg.Flows)
	}

	// A local attacker must guess the mark, and the address, of each start.
	var secret [10]byte
	rand.Read(secret[:])
	d.mark = binary.NativeEndian.Uint32(secret[:]) | 1
	mac := secret[4:]
	mac[0] = mac[0]&^0x01 | 0x02 // locally administered, not a group
	for name, value := range map[string]any{
		"nic_ifindex":       uint32(cfg.Ifindex),
		"tap_ifindex":       uint32(cfg.TAPIfindex),
		"mark":              d.mark,
		"heartbeat_timeout": uint64(cfg.Heartbeat),
		"inject_mac_high":   binary.NativeEndian.Uint32(mac[0:]),
		"inject_mac_low":    binary.NativeEndian.Uint16(mac[4:]),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return "", fmt.Errorf("xdp: set eBPF variable %s: %w", name, err)
		}
	}
	d.collection, err = ebpf.NewCollection(spec)
	if err != nil {
		return "", loadError(err)
	}
	return xdpName, nil
}

func loadError(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("xdp: load eBPF programs: needs CAP_BPF and CAP_NET_ADMIN: %w", err)
	}
	return fmt.Errorf("xdp: load eBPF programs: %w", err)
}

func (d *Diverter) attachTCX(program string, ifindex int, at ebpf.AttachType) error {
	l, err := link.AttachTCX(link.TCXOptions{Program: d.collection.Programs[program], Interface: ifindex, Attach: at})
	if err != nil {
		return attachError(err)
	}
	d.links = append(d.links, l)
	return nil
}

func attachError(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("needs CAP_NET_ADMIN: %w", err)
	}
	return err
}

// errBond is why a bond gets no native XDP. The kernel would take it, but runs it on
// the bond's ports, and sockets of the bond are not given what those receive.
var errBond = errors.New("native XDP of a bond runs on its ports, whose packets sockets of the bond do not get; mode generic works")

// nativeAllowed tells whether native XDP is of use on a device, where its driver
// has it.
func nativeAllowed(nic netlink.Link) error {
	if nic.Type() == "bond" {
		return errBond
	}
	return nil
}

func (d *Diverter) attachXDP(program *ebpf.Program, nic netlink.Link, mode Mode) error {
	attach := func(flags link.XDPAttachFlags, mode Mode) error {
		// Before the attachment: the first packet may come at once.
		if err := d.turn(controlGeneric, mode == ModeGeneric); err != nil {
			return err
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: nic.Attrs().Index, Flags: flags})
		if err != nil {
			return attachError(err)
		}
		d.xdp = len(d.links)
		d.links = append(d.links, l)
		d.mode = mode
		return nil
	}
	var err error
	if mode != ModeGeneric {
		if err = nativeAllowed(nic); err == nil {
			err = attach(link.XDPDriverMode, ModeCopy)
		}
		if err != nil && mode == ModeAuto && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EPERM) {
			d.fallback = fmt.Errorf("native XDP: %w", err)
			mode = ModeGeneric
		}
	}
	if mode == ModeGeneric {
		err = attach(link.XDPGenericMode, ModeGeneric)
	}
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w (%s)", ErrXDPBusy, describeXDP(nic))
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the driver has no native XDP; mode generic works with every driver: %w", err)
	case err != nil:
		return err
	}
	info, err := program.Info()
	if err != nil {
		return fmt.Errorf("read program info: %w", err)
	}
	d.program, _ = info.ID()
	attached.Lock()
	defer attached.Unlock()
	if attached.programs == nil {
		attached.programs = make(map[ebpf.ProgramID]bool)
	}
	attached.programs[d.program] = true
	return nil
}

// describeXDP tells of the XDP program on a device, and what takes it off.
func describeXDP(nic netlink.Link) string {
	id, name := xdpProgram(nic)
	what := strings.TrimSpace(fmt.Sprintf("id %d %s", id, name))
	switch {
	case id == 0:
		return "unknown"
	case strings.HasPrefix(name, hostPrefix):
		return what + ": a tcpcrypt daemon runs on " + nic.Attrs().Name
	case strings.HasPrefix(name, gatewayPrefix):
		return what + ": a tcpcrypt gateway runs, or left its bypass, which run --cleanup with both its interfaces removes"
	}
	return what + ": ip link set dev " + nic.Attrs().Name + " xdp off removes it, if nothing needs it"
}

// What the names of XDP programs of hosts and of gateways begin with.
const (
	hostPrefix    = "host_xdp"
	gatewayPrefix = "gateway_"
)

// GatewayOn reports whether an XDP program of a Gateway is on a device, of a
// process that lives or of an earlier one.
func GatewayOn(ifindex int) bool {
	nic, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return false
	}
	_, name := xdpProgram(nic)
	return strings.HasPrefix(name, gatewayPrefix)
}

func xdpProgram(nic netlink.Link) (ebpf.ProgramID, string) {
	fresh, err := netlink.LinkByIndex(nic.Attrs().Index)
	if err != nil || fresh.Attrs().Xdp == nil || !fresh.Attrs().Xdp.Attached {
		return 0, ""
	}
	id := ebpf.ProgramID(fresh.Attrs().Xdp.ProgId)
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return id, ""
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return id, ""
	}
	return id, info.Name
}

// RegisterSocket gives diverted packets of a receive queue of the NIC to s,
// which must be bound to that queue. It ends when s is closed.
func (d *Diverter) RegisterSocket(queue int, s *Socket) error {
	if err := d.collection.Maps["xsks"].Put(uint32(queue), uint32(s.FD())); err != nil {
		return fmt.Errorf("xdp: register socket for queue %d: %w", queue, err)
	}
	return nil
}

// InsertSteered is Insert for a connection whose outgoing packets are to come
// out of the given TAP queue, with SteeringProgram set on the TAP device. For
// an inserted connection it changes the queue.
func (d *Diverter) InsertSteered(key FlowKey, tapQueue int) error {
	return d.flows.insert(key, uint32(tapQueue)+1)
}

// SteeringProgram returns the program for TAP.SetSteering.
func (d *Diverter) SteeringProgram() *ebpf.Program { return d.collection.Programs["tap_steer"] }

// Counters returns how many packets met which verdict since AttachHost. Any
// goroutine may call it.
func (d *Diverter) Counters() (map[string]uint64, error) {
	return readCounters(d.collection.Maps["counters"], hostCounters)
}

// Runs returns how many packets the XDP program has seen.
func (d *Diverter) Runs() (n uint64, err error) {
	counters, err := d.Counters()
	for name, value := range counters {
		if strings.HasPrefix(name, "xdp_") {
			n += value
		}
	}
	return n, err
}

// Reattach takes the XDP program off the interface and puts it on again, in the
// same mode: for drivers that stopped running it. On error it is not on it any more.
// One goroutine at a time may call it, and not while Close runs.
func (d *Diverter) Reattach() error {
	flags := link.XDPDriverMode
	if d.mode == ModeGeneric {
		flags = link.XDPGenericMode
	}
	program := d.collection.Programs[d.attached]
	if err := d.links[d.xdp].Close(); err != nil {
		return fmt.Errorf("xdp: detach from interface %d: %w", d.ifindex, err)
	}
	l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: d.ifindex, Flags: flags})
	if err != nil {
		return fmt.Errorf("xdp: attach to interface %d again: %w", d.ifindex, attachError(err))
	}
	d.links[d.xdp] = l
	return nil
}

// Mark returns the mark of injected packets (skb->mark), never 0, random for
// each Diverter.
func (d *Diverter) Mark() uint32 { return d.mark }

// Mode returns how XDP is attached: ModeGeneric or, for native, ModeCopy.
func (d *Diverter) Mode() Mode { return d.mode }

// Fallback returns why native XDP was refused under ModeAuto, or nil.
func (d *Diverter) Fallback() error { return d.fallback }

// Close detaches everything, in the reverse order of attachment. No other
// method may be running or called later.
func (d *Diverter) Close() error {
	var errs []error
	for i := len(d.links) - 1; i >= 0; i-- {
		errs = append(errs, d.links[i].Close())
	}
	d.links = nil
	if d.undo != nil {
		errs = append(errs, d.undo())
		d.undo = nil
	}
	if d.program != 0 {
		attached.Lock()
		delete(attached.programs, d.program)
		attached.Unlock()
		d.program = 0
	}
	if d.collection != nil {
		d.collection.Close()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("xdp: detach from interface %d: %w", d.ifindex, err)
	}
	return nil
}
