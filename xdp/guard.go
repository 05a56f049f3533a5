package xdp

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// ErrGuardBusy: another process diverts connections of the interface.
var ErrGuardBusy = errors.New("xdp: another process diverts this interface")

// guardFilter is the name of the filters, by which a guard that outlived its
// process is found.
const guardFilter = "tcpcrypt_guard"

// The handle of the guard's filters says whether the guard made the clsact
// qdisc they are on, and so must remove it.
const (
	handleFoundQdisc = 0x7c01
	handleMadeQdisc  = 0x7c02
)

// guardCounters names the counters of bpf/guard.c in the order of its enum.
var guardCounters = []string{
	"guard_in_injected",
	"guard_in_flow_dropped",
	"guard_in_fragment_dropped",
	"guard_in_icmp_dropped",
	"guard_out_flow_dropped",
	"guard_out_fragment_dropped",
	"guard_in_refused",
	"guard_out_refused",
}

var guardHooks = [...]struct {
	parent  uint32
	program string
}{
	{netlink.HANDLE_MIN_INGRESS, "guard_ingress"},
	{netlink.HANDLE_MIN_EGRESS, "guard_egress"},
}

// A Guard drops packets of listed connections, and fragments of TCP between
// their addresses, on one interface: inbound unless they carry the diverter's
// mark, ICMP errors about them included, outbound whenever they get as far as
// the guard. Tags and extension headers do not hide them. When the process dies
// the diversion ends, but the sockets of the connections live on and would send
// and take plaintext; the guard's filters stay on the interface and keep them
// shut until the next process ends them, or a reboot.
//
// In the same way it refuses new connections that its policy requires to be
// encrypted and that nobody diverts, in both directions and at once.
//
// Any goroutine may call Counters, Insert and Delete; the other methods may be
// called by one at a time.
type Guard struct {
	netlink    *netlink.Handle // of the namespace the guard was opened in
	device     netlink.Link
	collection *ebpf.Collection
	handle     uint32
	priority   uint16
	flows      *flowMap
}

// OpenGuard installs the guard on an interface of the calling thread's network
// namespace; mark is Diverter.Mark. A guard that an earlier process left there
// is replaced without a gap, and stays in force for the connections that it
// listed, which are returned (without VLAN): the caller ends their sockets with
// DestroySockets and then deletes them from the guard.
//
// It is called after AttachHost, which two processes cannot have done on one
// interface: if the interface's diverting program is another process's, the
// error is ErrGuardBusy.
func OpenGuard(ifindex int, mark uint32, policy Policy) (_ *Guard, leftovers [][KeySize]byte, err error) {
	if mark == 0 {
		return nil, nil, fmt.Errorf("xdp: guard with mark 0 would let everything in")
	}
	g := &Guard{}
	defer func() {
		if err != nil {
			g.Close()
			err = fmt.Errorf("xdp: guard on interface %d: %w", ifindex, err)
		}
	}()
	if g.netlink, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, nil, err
	}
	if g.device, err = g.netlink.LinkByIndex(ifindex); err != nil {
		return nil, nil, err
	}
	if err := checkDiverter(g.device); err != nil {
		return nil, nil, err
	}
	if err := g.load(mark, policy); err != nil {
		return nil, nil, err
	}
	old, err := g.find()
	if err != nil {
		return nil, nil, err
	}
	// Listed before the old filters go, so that there is no gap.
	for _, id := range old {
		keys, err := listedBy(id)
		if err != nil {
			return nil, nil, err
		}
		for _, key := range keys {
			if err := g.Insert(key); err != nil {
				return nil, nil, err
			}
		}
	}
	for key := range g.each(&err) {
		leftovers = append(leftovers, key)
	}
	if err != nil {
		return nil, nil, err
	}
	if err := g.install(len(old) > 0); err != nil {
		return nil, nil, err
	}
	return g, leftovers, nil
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
	return fmt.Errorf("%w (XDP program %d)", ErrGuardBusy, id)
}

func (g *Guard) load(mark uint32, policy Policy) error {
	spec, err := bpf.LoadGuard()
	if err != nil {
		return fmt.Errorf("read eBPF object: %w", err)
	}
	if err := spec.Variables["mark"].Set(mark); err != nil {
		return fmt.Errorf("set mark: %w", err)
	}
	if g.collection, err = ebpf.NewCollection(spec); err != nil {
		return loadError(err)
	}
	g.flows = newFlowMap(g.collection.Maps["guard_flows"], g.collection.Maps["guard_pairs"])
	return policy.write(g.collection.Maps["policy"])
}

// find returns the programs of the guard's filters on the interface, and sets
// handle and priority to theirs, or to what new ones are to have.
func (g *Guard) find() (programs []ebpf.ProgramID, err error) {
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

// listedBy returns the connections that another guard program has listed.
func listedBy(id ebpf.ProgramID) ([]FlowKey, error) {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open program %d of the earlier guard: %w", id, err)
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return nil, fmt.Errorf("read program %d of the earlier guard: %w", id, err)
	}
	maps, _ := info.MapIDs()
	for _, mapID := range maps {
		m, err := ebpf.NewMapFromID(mapID)
		if err != nil {
			return nil, fmt.Errorf("open map %d of the earlier guard: %w", mapID, err)
		}
		defer m.Close()
		info, err := m.Info()
		if err != nil {
			return nil, fmt.Errorf("read map %d of the earlier guard: %w", mapID, err)
		}
		if info.Name != "guard_flows" {
			continue
		}
		if m.KeySize() != KeySize {
			return nil, fmt.Errorf("map %d of the earlier guard has keys of %d bytes", mapID, m.KeySize())
		}
		var keys []FlowKey
		var key FlowKey
		var value uint32
		entries := m.Iterate()
		for entries.Next(&key, &value) {
			keys = append(keys, key)
		}
		if err := entries.Err(); err != nil {
			return nil, fmt.Errorf("list connections of the earlier guard: %w", err)
		}
		return keys, nil
	}
	return nil, nil
}

func (g *Guard) each(err *error) func(yield func(FlowKey) bool) {
	return func(yield func(FlowKey) bool) {
		var key FlowKey
		var value uint32
		entries := g.flows.flows.Iterate()
		for entries.Next(&key, &value) {
			if !yield(key) {
				return
			}
		}
		*err = entries.Err()
	}
}

// install puts the filters onto the interface, or in the place of existing
// ones: a replacement is atomic per direction.
func (g *Guard) install(replace bool) error {
	if !replace {
		switch err := g.netlink.QdiscAdd(g.qdisc()); {
		case err == nil:
			g.handle = handleMadeQdisc
		case errors.Is(err, unix.EEXIST):
			g.handle = handleFoundQdisc
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
func (g *Guard) Insert(key FlowKey) error { return g.flows.insert(withoutVLAN(key), 0) }

// Delete unlists a connection, of which the socket must be gone. A connection
// that is not listed is no error.
func (g *Guard) Delete(key FlowKey) error { return g.flows.delete(withoutVLAN(key)) }

// Counters returns how many packets met which verdict since OpenGuard. Any
// goroutine may call it.
func (g *Guard) Counters() (map[string]uint64, error) {
	return readCounters(g.collection.Maps["guard_counters"], guardCounters)
}

// Remove takes the guard off the interface. An interface that is gone has
// taken it along and is no error. No other method may be called later.
func (g *Guard) Remove() error {
	err := g.uninstall()
	var notFound netlink.LinkNotFoundError
	if _, gone := g.netlink.LinkByIndex(g.device.Attrs().Index); errors.As(gone, &notFound) {
		err = nil
	}
	g.Close()
	if err != nil {
		return fmt.Errorf("xdp: remove guard from %s: %w", g.device.Attrs().Name, err)
	}
	return nil
}

// RemoveGuard takes the guard that an earlier process left off an interface of
// the calling thread's network namespace, and returns the connections that it
// kept shut (without VLAN); their sockets are ended first by end, and the guard
// stays if that fails. Without a guard it does nothing. The error is ErrGuardBusy
// if a process diverts connections of the interface.
func RemoveGuard(ifindex int, end func([KeySize]byte) error) (found bool, ended int, err error) {
	g := &Guard{}
	defer g.Close()
	if g.netlink, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return false, 0, err
	}
	if g.device, err = g.netlink.LinkByIndex(ifindex); err != nil {
		return false, 0, fmt.Errorf("xdp: interface %d: %w", ifindex, err)
	}
	if err := checkDiverter(g.device); err != nil {
		return false, 0, err
	}
	programs, err := g.find()
	if err != nil || len(programs) == 0 {
		return false, 0, err
	}
	seen := make(map[FlowKey]bool)
	for _, id := range programs {
		keys, err := listedBy(id)
		if err != nil {
			return true, ended, err
		}
		for _, k := range keys {
			if seen[k] {
				continue
			}
			seen[k] = true
			if err := end(k); err != nil {
				return true, ended, fmt.Errorf("xdp: the guard of %s stays: %w", g.device.Attrs().Name, err)
			}
			ended++
		}
	}
	// The filters go by handle and priority; the programs are the kernel's.
	g.collection = &ebpf.Collection{Programs: map[string]*ebpf.Program{}}
	for i, hook := range guardHooks {
		p, err := ebpf.NewProgramFromID(programs[min(i, len(programs)-1)])
		if err != nil {
			return true, ended, fmt.Errorf("xdp: open the guard of %s: %w", g.device.Attrs().Name, err)
		}
		g.collection.Programs[hook.program] = p
	}
	if err := g.uninstall(); err != nil {
		return true, ended, fmt.Errorf("xdp: remove guard from %s: %w", g.device.Attrs().Name, err)
	}
	return true, ended, nil
}

// Close gives up the guard and leaves it in force, as the death of the process
// does. No other method may be called later.
func (g *Guard) Close() {
	if g.collection != nil {
		g.collection.Close()
		g.collection = nil
	}
	if g.netlink != nil {
		g.netlink.Close()
	}
}
