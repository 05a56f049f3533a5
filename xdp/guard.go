package xdp

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// ErrGuardBusy: another process diverts connections of the interface.
var ErrGuardBusy = errors.New("another daemon runs on this interface")

// guardFilter is the name of the filters, by which a guard that outlived its
// process is found.
const guardFilter = "tcpcrypt_guard"

// The handle of the guard's filters says whether the guard made the clsact
// qdisc they are on, and so must remove it.
const (
	handleFoundQdisc = 0x7c01
	handleMadeQdisc  = 0x7c02
)

// guardCounters names the counters of bpf/guard.h in the order of its enum.
var guardCounters = []string{
	"guard_in_injected",
	"guard_in_flow_dropped",
	"guard_in_fragment_dropped",
	"guard_in_icmp_dropped",
	"guard_in_refused",
	"guard_out_flow_dropped",
	"guard_out_fragment_dropped",
	"guard_out_icmp_dropped",
	"guard_out_injected_dropped",
	"guard_out_refused",
	"guard_netfilter_in_flow_dropped",
	"guard_netfilter_in_fragment_dropped",
	"guard_netfilter_in_icmp_dropped",
	"guard_netfilter_out_flow_dropped",
	"guard_netfilter_out_fragment_dropped",
	"guard_netfilter_out_icmp_dropped",
	"guard_cgroup_in_flow_dropped",
	"guard_cgroup_in_fragment_dropped",
	"guard_cgroup_out_flow_dropped",
	"guard_cgroup_out_fragment_dropped",
}

var guardHooks = [...]struct {
	parent  uint32
	program string
}{
	{netlink.HANDLE_MIN_INGRESS, "guard_ingress"},
	{netlink.HANDLE_MIN_EGRESS, "guard_egress"},
}

// A Guard keeps listed connections shut except for what the diverter injects
// and takes. It has three layers:
//
//   - filters on the guarded interface drop what comes in without the
//     diverter's mark, and whatever gets as far as the filter on its way out.
//     Tags and extension headers do not hide a segment. Fragments of TCP between
//     the addresses of listed connections are dropped, too;
//   - hooks of the network namespace, behind reassembly, drop what comes in by
//     any other way, and what leaves by another interface;
//   - programs at a cgroup do the same for the sockets in it.
//
// ICMP errors about listed connections are dropped as well: inwards they could
// shrink segments or end the connection, outwards they quote plaintext.
//
// When the process dies the diversion ends, but the sockets of the connections
// live on and would send and take plaintext. The guard stays, and keeps them shut
// until the next process ends them, or a reboot: filters live on the device, the
// other layers in a BPF file system.
//
// In the same way it refuses new connections that its policy requires to be
// encrypted and that nobody diverts, on the interface, in both directions and at
// once.
//
// A nil Guard guards nothing. Any goroutine may call Counters, Layers, Insert and
// Delete; the other methods may be called by one at a time.
type Guard struct {
	netlink    *netlink.Handle // of the namespace the guard was opened in
	device     netlink.Link
	collection *ebpf.Collection
	handle     uint32
	priority   uint16
	flows      *flowMap
	inner      innerLayers
	exits      *exitWatch
	missing    atomic.Pointer[string] // why the filters are not on the interface, nil if they are
}

// GuardConfig says what is guarded, and how.
type GuardConfig struct {
	Ifindex int
	Mark    uint32 // Diverter.Mark
	Policy  Policy // what is refused

	// Cgroup is the directory of the cgroup (version 2) whose sockets are
	// guarded; "" is the root, for all sockets. Those of other network
	// namespaces are passed before anything else.
	Cgroup string
	// Pins is a directory in a BPF file system, "" is where the system has one.
	Pins string
	// Complete makes anything less than all layers, and their outliving the
	// process, an error: ErrGuardIncomplete.
	Complete bool
}

// OpenGuard installs the guard on an interface of the calling thread's network
// namespace. A guard that an earlier process left there, or on an interface of
// the namespace that is gone, is replaced without a gap, and stays in force for
// the connections that it listed, which are returned (without VLAN): the caller
// ends their sockets with DestroySockets and then deletes them from the guard.
//
// It is called after AttachHost, which two processes cannot have done on one
// interface: if the interface's diverting program is another process's, the
// error is ErrGuardBusy.
func OpenGuard(cfg GuardConfig) (_ *Guard, leftovers [][KeySize]byte, err error) {
	if cfg.Mark == 0 {
		return nil, nil, fmt.Errorf("xdp: guard with mark 0 would let everything in")
	}
	g := &Guard{}
	defer func() {
		if err != nil {
			_ = g.inner.remove()
			g.Close()
			err = fmt.Errorf("xdp: guard on interface %d: %w", cfg.Ifindex, err)
		}
	}()
	if err := g.find(cfg.Ifindex); err != nil {
		return nil, nil, err
	}
	tag := newTag()
	if err := g.load(cfg, tag); err != nil {
		return nil, nil, err
	}
	old, err := g.earlier(cfg.Pins)
	if err != nil {
		return nil, nil, err
	}
	// Listed before the old filters go, so that there is no gap.
	if leftovers, err = old.flows(); err != nil {
		return nil, nil, err
	}
	for _, key := range leftovers {
		if err := g.Insert(key); err != nil {
			return nil, nil, err
		}
	}
	if g.exits, err = watchExits(g.netlink, g.collection.Maps["guard_exits"], cfg.Ifindex); err != nil {
		return nil, nil, err
	}
	pins, pinsErr := g.newPins(cfg.Pins)
	if pinsErr != nil && cfg.Pins != "" {
		return nil, nil, pinsErr
	}
	g.inner.open(g.collection.Maps, tag, cfg.Cgroup, pins, pinsErr)
	for _, l := range g.inner.layers {
		if l.Reason != "" && cfg.Complete {
			return nil, nil, fmt.Errorf("%w: %s layer: %s", ErrGuardIncomplete, l.Name, l.Reason)
		}
	}
	if err := g.install(len(old.filters) > 0); err != nil {
		return nil, nil, err
	}
	if err := old.unpin(); err != nil {
		return nil, nil, errors.Join(err, g.uninstall())
	}
	return g, leftovers, nil
}

// newTag returns the tag of injected packets, even and never 0.
func newTag() uint16 {
	var b [2]byte
	rand.Read(b[:])
	return max(2, binary.NativeEndian.Uint16(b[:])&^1)
}

// find looks the interface up.
func (g *Guard) find(ifindex int) (err error) {
	if g.netlink, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	if g.device, err = g.netlink.LinkByIndex(ifindex); err != nil {
		return err
	}
	return checkDiverter(g.device)
}

// newPins returns the directory for the guard's pins.
func (g *Guard) newPins(dir string) (string, error) {
	base, err := findBPFFS(dir)
	if err != nil {
		return "", err
	}
	space, err := pinsOfNamespace(base)
	if err != nil {
		return "", err
	}
	info, err := g.collection.Maps["guard_flows"].Info()
	if err != nil {
		return "", fmt.Errorf("read eBPF map: %w", err)
	}
	id, _ := info.ID()
	return filepath.Join(space, fmt.Sprintf("%d_%d", g.device.Attrs().Index, id)), nil
}

// checkDiverter refuses an interface that is diverted by another process.
func checkDiverter(device netlink.Link) error {
	id, name := xdpProgram(device)
	if name != "host_xdp" && name != "host_xdp_frags" {
		return nil
	}
	attached.Lock()
	defer attached.Unlock()
	if attached.programs[id] {
		return nil
	}
	return fmt.Errorf("%w: end it first (XDP program %d on %s)", ErrGuardBusy, id, device.Attrs().Name)
}

func (g *Guard) load(cfg GuardConfig, tag uint16) error {
	spec, err := bpf.LoadGuard()
	if err != nil {
		return fmt.Errorf("read eBPF object: %w", err)
	}
	if err := errors.Join(spec.Variables["mark"].Set(cfg.Mark), spec.Variables["tag"].Set(tag),
		spec.Variables["refusing"].Set(cfg.Policy.requires())); err != nil {
		return fmt.Errorf("set eBPF variables: %w", err)
	}
	if g.collection, err = ebpf.NewCollection(spec); err != nil {
		return loadError(err)
	}
	g.flows = guardFlows(g.collection)
	return cfg.Policy.write(g.collection.Maps["policy"])
}

// guardFlows returns the connections that a guard's programs have listed.
func guardFlows(c *ebpf.Collection) *flowMap {
	m := newFlowMap(c.Maps["guard_flows"], c.Maps["guard_pairs"])
	m.listing = c.Maps["guard_listing"]
	return m
}

// A leftGuard is what an earlier process left.
type leftGuard struct {
	filters  []ebpf.ProgramID // of the filters on the interface
	programs []ebpf.ProgramID // of the pinned links
	pins     []string         // the directories of these
}

// earlier returns what an earlier process left of the guard, and sets handle and
// priority to those of its filters, or to what new ones are to have.
func (g *Guard) earlier(pins string) (left leftGuard, err error) {
	if left.filters, err = g.findFilters(); err != nil {
		return left, err
	}
	base, err := findBPFFS(pins)
	if err != nil {
		return left, nil // then nothing is pinned
	}
	space, err := pinsOfNamespace(base)
	if err != nil {
		return left, err
	}
	left.pins, err = oldPins(space, g.device.Attrs().Index, func(ifindex int) bool {
		var notFound netlink.LinkNotFoundError
		_, err := g.netlink.LinkByIndex(ifindex)
		return !errors.As(err, &notFound)
	})
	for _, dir := range left.pins {
		programs, err := pinnedPrograms(dir)
		if err != nil {
			return left, err
		}
		left.programs = append(left.programs, programs...)
	}
	return left, err
}

func (l *leftGuard) found() bool { return len(l.filters)+len(l.pins) > 0 }

// flows returns the connections that are listed.
func (l *leftGuard) flows() (keys []FlowKey, err error) {
	seen := make(map[ebpf.MapID]bool)
	listed := make(map[FlowKey]bool)
	for _, id := range slices.Concat(l.filters, l.programs) {
		if err := listedBy(id, seen, listed); err != nil {
			return nil, err
		}
	}
	return slices.Collect(maps.Keys(listed)), nil
}

// unpin removes the layers that are pinned.
func (l *leftGuard) unpin() error {
	var errs []error
	for _, dir := range l.pins {
		errs = append(errs, removePins(dir))
	}
	return errors.Join(errs...)
}

// findFilters returns the programs of the guard's filters on the interface.
func (g *Guard) findFilters() (programs []ebpf.ProgramID, err error) {
	// The guard goes first, for another filter may end the classification. A
	// priority holds filters of one kind and protocol, of which the last one
	// added comes first.
	taken := make(map[uint16]bool)
	for _, hook := range guardHooks {
		filters, err := g.netlink.FilterList(g.device, hook.parent)
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("list filters: %w", err)
		}
		for _, f := range filters {
			a := f.Attrs()
			b, isBPF := f.(*netlink.BpfFilter)
			if isBPF && b.Name == guardFilter {
				programs = append(programs, ebpf.ProgramID(b.Id))
				g.handle, g.priority = a.Handle, a.Priority
			}
			if !isBPF || a.Protocol != unix.ETH_P_ALL {
				taken[a.Priority] = true
			}
		}
	}
	if g.handle == 0 {
		for g.priority = 1; taken[g.priority]; {
			g.priority++
		}
	}
	return programs, nil
}

// listedBy adds the connections that another guard program has listed, unless
// its map was seen.
func listedBy(id ebpf.ProgramID, seen map[ebpf.MapID]bool, listed map[FlowKey]bool) error {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Errorf("open program %d of the earlier guard: %w", id, err)
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return fmt.Errorf("read program %d of the earlier guard: %w", id, err)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		if seen[id] {
			continue
		}
		seen[id] = true
		if err := listedIn(id, listed); err != nil {
			return err
		}
	}
	return nil
}

func listedIn(id ebpf.MapID, listed map[FlowKey]bool) error {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return fmt.Errorf("open map %d of the earlier guard: %w", id, err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return fmt.Errorf("read map %d of the earlier guard: %w", id, err)
	}
	if info.Name != "guard_flows" {
		return nil
	}
	if m.KeySize() != KeySize {
		return fmt.Errorf("map %d of the earlier guard has keys of %d bytes", id, m.KeySize())
	}
	var key FlowKey
	var value uint32
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		listed[key] = true
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("list connections of the earlier guard: %w", err)
	}
	return nil
}

// install puts the filters onto the interface, or in the place of existing
// ones: a replacement is atomic per direction.
func (g *Guard) install(replace bool) error {
	if !replace {
		switch err := g.netlink.QdiscAdd(g.qdisc()); {
		case err == nil:
			g.handle = handleMadeQdisc
		case errors.Is(err, unix.EEXIST):
			if g.handle == 0 {
				g.handle = handleFoundQdisc
			}
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
			return fmt.Errorf("the kernel has no clsact qdisc (CONFIG_NET_SCH_INGRESS): %w", err)
		default:
			return fmt.Errorf("add clsact qdisc: %w", err)
		}
	}
	for _, hook := range guardHooks {
		if err := g.netlink.FilterReplace(g.filter(hook.parent, hook.program)); err != nil {
			if !replace {
				err = errors.Join(err, g.uninstall())
			}
			return fmt.Errorf("add filter %s: %w", hook.program, err)
		}
	}
	return nil
}

func (g *Guard) qdisc() netlink.Qdisc {
	return &netlink.GenericQdisc{
		QdiscType: "clsact",
		QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: g.device.Attrs().Index,
			Handle:    netlink.MakeHandle(0xffff, 0),
			Parent:    netlink.HANDLE_CLSACT,
		},
	}
}

func (g *Guard) filter(parent uint32, program string) *netlink.BpfFilter {
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: g.device.Attrs().Index,
			Parent:    parent,
			Handle:    g.handle,
			Priority:  g.priority,
			Protocol:  unix.ETH_P_ALL,
		},
		Name:         guardFilter,
		DirectAction: true,
	}
	f.Fd = g.collection.Programs[program].FD()
	return f
}

// uninstall removes the filters, and the qdisc if the guard made it and nobody
// else uses it.
func (g *Guard) uninstall() error {
	var errs []error
	others := 0
	for _, hook := range guardHooks {
		filters, err := g.netlink.FilterList(g.device, hook.parent)
		if err != nil {
			errs = append(errs, err)
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok && b.Name == guardFilter {
				errs = append(errs, g.netlink.FilterDel(g.filter(hook.parent, hook.program)))
			} else if f.Attrs().Handle != 0 {
				others++
			}
		}
	}
	if g.handle == handleMadeQdisc && others == 0 && errors.Join(errs...) == nil {
		errs = append(errs, g.netlink.QdiscDel(g.qdisc()))
	}
	return errors.Join(errs...)
}

// Insert lists a connection: from now on only injected packets of it come in,
// and none goes out but through the diversion. The VLAN of the key is ignored,
// as a socket ignores it.
func (g *Guard) Insert(key FlowKey) error {
	if g == nil {
		return nil
	}
	return g.flows.insert(withoutVLAN(key), 0)
}

// Delete unlists a connection, of which the socket must be gone. A connection
// that is not listed is no error.
func (g *Guard) Delete(key FlowKey) error {
	if g == nil {
		return nil
	}
	return g.flows.delete(withoutVLAN(key))
}

// Counters returns how many packets met which verdict since OpenGuard. Any
// goroutine may call it.
func (g *Guard) Counters() (map[string]uint64, error) {
	if g == nil {
		return nil, nil
	}
	return readCounters(g.collection.Maps["guard_counters"], guardCounters)
}

// Layers tells which parts of the guard are in force. Any goroutine may call it.
func (g *Guard) Layers() []GuardLayer {
	if g == nil {
		return nil
	}
	first := GuardLayer{Name: LayerInterface, Active: true, Persistent: true}
	if why := g.missing.Load(); why != nil {
		first = GuardLayer{Name: LayerInterface, Reason: *why}
	}
	return append([]GuardLayer{first}, g.inner.layers...)
}

// Mend looks whether the filters are on the interface still, and puts them back if
// somebody took them off, or the qdisc that they are on. It reports whether they
// were gone; an error means that they are, and Layers tells of it until they are
// back.
func (g *Guard) Mend() (gone bool, err error) {
	if g == nil {
		return false, nil
	}
	found, err := g.findFilters()
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		return false, nil // somebody is at work: the next look tells
	}
	if err == nil && len(found) < len(guardHooks) {
		gone = true
		err = g.install(len(found) > 0)
	}
	if err != nil {
		why := err.Error()
		g.missing.Store(&why)
		return gone, fmt.Errorf("xdp: guard on %s: %w", g.device.Attrs().Name, err)
	}
	g.missing.Store(nil)
	return gone, nil
}

// Remove ends the guard. An interface that is gone has taken its filters along
// and is no error. No other method may be called later.
func (g *Guard) Remove() error {
	if g == nil {
		return nil
	}
	err := g.uninstall()
	var notFound netlink.LinkNotFoundError
	if _, gone := g.netlink.LinkByIndex(g.device.Attrs().Index); errors.As(gone, &notFound) {
		err = nil
	}
	err = errors.Join(err, g.inner.remove())
	g.Close()
	if err != nil {
		return fmt.Errorf("xdp: remove guard from %s: %w", g.device.Attrs().Name, err)
	}
	return nil
}

// RemoveGuard ends the guard that an earlier process left on an interface of the
// calling thread's network namespace, or on one that is gone, and returns how
// many connections it kept shut; their sockets are ended first by end, and the
// guard stays if that fails. pins is GuardConfig.Pins. Without a guard it does
// nothing. The error is ErrGuardBusy if a process diverts connections of the
// interface.
func RemoveGuard(ifindex int, pins string, end func([KeySize]byte) error) (found bool, ended int, err error) {
	g := &Guard{}
	defer g.Close()
	if err := g.find(ifindex); err != nil {
		return false, 0, fmt.Errorf("xdp: interface %d: %w", ifindex, err)
	}
	left, err := g.earlier(pins)
	if err != nil || !left.found() {
		return false, 0, err
	}
	keys, err := left.flows()
	if err != nil {
		return true, 0, err
	}
	for _, k := range keys {
		if err := end(k); err != nil {
			return true, ended, fmt.Errorf("xdp: the guard of %s stays: %w", g.device.Attrs().Name, err)
		}
		ended++
	}
	if len(left.filters) > 0 {
		// The filters go by handle and priority; the programs are the kernel's.
		g.collection = &ebpf.Collection{Programs: map[string]*ebpf.Program{}}
		for i, hook := range guardHooks {
			p, err := ebpf.NewProgramFromID(left.filters[min(i, len(left.filters)-1)])
			if err != nil {
				return true, ended, fmt.Errorf("xdp: open the guard of %s: %w", g.device.Attrs().Name, err)
			}
			g.collection.Programs[hook.program] = p
		}
		err = g.uninstall()
	}
	if err := errors.Join(err, left.unpin()); err != nil {
		return true, ended, fmt.Errorf("xdp: remove guard from %s: %w", g.device.Attrs().Name, err)
	}
	return true, ended, nil
}

// Close gives up the guard and leaves in force what outlives the process, as
// the death of the process does. No other method may be called later.
func (g *Guard) Close() {
	if g == nil {
		return
	}
	g.inner.close()
	if g.exits != nil {
		g.exits.stop()
		g.exits = nil
	}
	if g.collection != nil {
		g.collection.Close()
		g.collection = nil
	}
	if g.netlink != nil {
		g.netlink.Close()
	}
}
