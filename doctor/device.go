package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

func (s Source) interfaces(o Options) ([]Interface, error) {
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return nil, fmt.Errorf("ethtool: %w", err)
	}
	defer tool.Close()
	if o.Interface != "" {
		l, err := xdp.FindLink(o.Interface)
		if err != nil {
			return nil, err
		}
		i, err := s.gatherInterface(l, tool)
		if err != nil {
			return nil, err
		}
		i.try(o.Try)
		return []Interface{i}, nil
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	out := []Interface{}
	for _, l := range links {
		// Only what has a wire of its own behind it.
		if a := l.Attrs(); a.RawFlags&unix.IFF_LOOPBACK != 0 || a.RawFlags&unix.IFF_UP == 0 ||
			!slices.Contains([]string{"device", "veth", "bond", "vlan"}, l.Type()) {
			continue
		}
		i, err := s.gatherInterface(l, tool)
		if err != nil {
			continue // it went away meanwhile
		}
		i.NotTried = "it was not named"
		out = append(out, i)
	}
	return out, nil
}

func (s Source) gatherInterface(l netlink.Link, tool *ethtool.Ethtool) (Interface, error) {
	a := l.Attrs()
	c, err := xdp.Probe(a.Name)
	if err != nil {
		return Interface{}, err
	}
	i := Interface{
		Name: a.Name, Kind: l.Type(), Driver: c.Driver, MTU: c.MTU, Virtual: c.Virtual, NoEthernet: c.NoEthernet,
		Loopback: a.RawFlags&unix.IFF_LOOPBACK != 0, Up: a.RawFlags&unix.IFF_UP != 0,
		Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0,

		NativeXDP: c.NativeXDP, MultiBuffer: c.MultiBuffer, ZeroCopy: c.ZeroCopy,
		ZeroCopySegments: c.ZeroCopySegments, TXChecksum: c.TXChecksum, VLANStripped: c.VLANStripped,
		Channels: Channels{RX: c.RXQueues, TX: c.TXQueues, MaxRX: c.RXQueues},
		RSS:      readRSS(a.Index),
	}
	if info, err := tool.DriverInfo(a.Name); err == nil {
		i.DriverInfo, i.Firmware, i.Bus = info.Version, info.FwVersion, info.BusInfo
	}
	if ch, err := tool.GetChannels(a.Name); err == nil {
		i.Channels.MaxRX = max(i.Channels.RX, int(max(ch.MaxRx, ch.MaxCombined)))
	}
	if r, err := tool.GetRing(a.Name); err == nil {
		i.Rings = Rings{RX: int(r.RxPending), MaxRX: int(r.RxMaxPending), TX: int(r.TxPending), MaxTX: int(r.TxMaxPending)}
	}
	i.Offloads = make(map[string]bool)
	if features, err := tool.Features(a.Name); err == nil {
		for _, name := range offloads {
			if on, ok := features[name]; ok {
				i.Offloads[name] = on
			}
		}
	}
	i.readPrograms(l)
	if sockets, err := netlink.SocketDiagXDP(); err == nil {
		for _, x := range sockets {
			if x.XDPInfo != nil && int(x.XDPInfo.Ifindex) == a.Index {
				i.Sockets = append(i.Sockets, int(x.XDPInfo.QueueID))
			}
		}
		slices.Sort(i.Sockets)
	}
	s.readDevice(&i)
	return i, nil
}

// offloads are the features that are told of, by the kernel's names.
var offloads = []string{"rx-lro", "rx-gro", "rx-gro-hw", "tx-tcp-segmentation", "tx-generic-segmentation", "rx-vlan-hw-parse", "rx-checksum", "rx-ntuple-filter"}

// readDevice reads what sysfs and procfs tell of the hardware.
func (s Source) readDevice(i *Interface) {
	net := s.sys("class/net", i.Name)
	if speed := number(filepath.Join(net, "speed"), 0); speed > 0 {
		i.Speed = speed
	}
	device := filepath.Join(net, "device")
	// A virtio device is a child of the PCI device that has the bus's files.
	if _, err := os.Stat(filepath.Join(device, "msi_irqs")); err != nil {
		if real, err := filepath.EvalSymlinks(device); err == nil {
			if parent := filepath.Dir(real); exists(filepath.Join(parent, "msi_irqs")) {
				device = parent
			}
		}
	}
	i.NUMANode = number(filepath.Join(device, "numa_node"), -1)
	i.LocalCPUs = cpuList(text(filepath.Join(device, "local_cpulist")))
	i.PCIWidth = number(filepath.Join(device, "current_link_width"), 0)
	i.PCIMaxWidth = number(filepath.Join(device, "max_link_width"), 0)
	i.PCISpeed = text(filepath.Join(device, "current_link_speed"))
	i.PCIMaxSpeed = text(filepath.Join(device, "max_link_speed"))
	if i.PCIMaxWidth == 0 || i.PCIMaxWidth == 255 { // not behind a PCI Express port
		i.PCIWidth, i.PCIMaxWidth, i.PCISpeed, i.PCIMaxSpeed = 0, 0, "", ""
	}
	i.IRQs = s.irqs(filepath.Join(device, "msi_irqs"), i.Channels.RX)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// queueNumber finds the queue in the name of an interrupt: "eth0-TxRx-3",
// "virtio0-input.1", "mlx5_comp2@pci:0000:01:00.0".
var queueNumber = regexp.MustCompile(`(?i)(?:rx|input|comp|queue|txrx)[-._]?(\d+)(?:$|@)`)

// irqs lists the message-signalled interrupts of a device.
func (s Source) irqs(dir string, queues int) []IRQ {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	names := make(map[int]string)
	for line := range lines(s.proc("interrupts")) {
		left, right, ok := strings.Cut(line, ":")
		n, err := strconv.Atoi(strings.TrimSpace(left))
		if f := strings.Fields(right); ok && err == nil && len(f) > 0 {
			names[n] = f[len(f)-1]
		}
	}
	var out []IRQ
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || names[n] == "" { // nobody has requested it
			continue
		}
		q := IRQ{Number: n, Name: names[n], Queue: -1, Mask: text(s.proc("irq", e.Name(), "smp_affinity_list"))}
		if m := queueNumber.FindStringSubmatch(q.Name); m != nil {
			if k, err := strconv.Atoi(m[1]); err == nil && k < queues {
				q.Queue = k
			}
		}
		if q.CPUs = cpuList(text(s.proc("irq", e.Name(), "effective_affinity_list"))); len(q.CPUs) == 0 {
			q.CPUs = cpuList(q.Mask)
		}
		out = append(out, q)
	}
	slices.SortFunc(out, func(a, b IRQ) int { return cmp.Compare(a.Number, b.Number) })
	return out
}

// gatewayPrefix is what the names of a gateway's programs begin with.
const gatewayPrefix = "gateway_"

// readPrograms tells which BPF programs are attached.
func (i *Interface) readPrograms(l netlink.Link) {
	if x := l.Attrs().Xdp; x != nil && x.Attached {
		i.XDP = programName(ebpf.ProgramID(x.ProgId))
		i.OwnXDP = strings.HasPrefix(i.XDP, "host_xdp") || strings.HasPrefix(i.XDP, gatewayPrefix)
	}
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		r, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: at})
		if err != nil {
			continue
		}
		for _, p := range r.Programs {
			i.TCX = append(i.TCX, programName(p.ID))
		}
	}
}

func programName(id ebpf.ProgramID) string {
	fallback := fmt.Sprintf("program %d", id)
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fallback
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || info.Name == "" {
		return fallback
	}
	return info.Name
}

// try tries the interface, when that is wanted and can hurt nobody.
func (i *Interface) try(wanted bool) {
	switch {
	case !wanted:
		i.NotTried = "--no-probe"
	case i.Loopback:
		i.NotTried = "it is the loopback interface"
	case i.NoEthernet:
		i.NotTried = "its packets have no Ethernet header"
	case i.XDP != "":
		i.NotTried = "an XDP program is attached"
	case !i.Up:
		i.NotTried = "it is down"
	default:
		t, err := xdp.Try(i.Name)
		if err != nil {
			i.NotTried = err.Error()
			return
		}
		i.Tried = describeTrial(t)
	}
}

func describeTrial(t xdp.Trial) *Tried {
	words := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	out := &Tried{Native: words(t.Native), Generic: words(t.Generic), Fragments: t.Fragments, Queues: []QueueTried{}}
	for _, q := range t.Queues {
		mode := q.Mode.String()
		if q.Mode == xdp.ModeAuto {
			mode = "none"
		}
		out.Queues = append(out.Queues, QueueTried{
			Queue: q.Queue, Mode: mode, ZeroCopy: words(q.ZeroCopy), Copy: words(q.Copy),
			MultiBuffer: words(q.MultiBuffer), TXChecksum: q.TXChecksum,
		})
	}
	return out
}
