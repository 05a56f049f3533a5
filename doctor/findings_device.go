package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Sizes of host mode, in bytes, against which MTUs are judged.
const (
	headers      = 18   // Ethernet and one VLAN tag
	largestChunk = 3840 // of a packet in one chunk of packet memory
	largestZero  = 3072 // and in zero-copy mode, where drivers count in KiB
	plainMTU     = 3506 // above it drivers want a program that accepts several buffers
)

func (e *examiner) device(n *Interface) {
	about := n.Driver
	if n.DriverInfo != "" {
		about += " " + n.DriverInfo
	}
	if n.Firmware != "" && n.Firmware != "N/A" {
		about += ", firmware " + n.Firmware
	}
	if n.Speed > 0 {
		about += fmt.Sprintf(", %d Mb/s", n.Speed)
	}
	switch {
	case !n.Up:
		e.add("device", Fail, about+", down", "sockets cannot be bound to a device that is down", "ip link set "+n.Name+" up")
	case !n.Carrier:
		e.add("device", Warn, about+", no carrier", "nothing is connected, or the link is being set up again", "")
	default:
		e.ok("device", "%s", about)
	}
}

// modes judges native XDP, zero-copy and what belongs to them: by what the
// interface did when it was tried, else by what the driver announces.
func (e *examiner) modes(n *Interface) {
	native, nativeWhy := n.NativeXDP, "driver "+n.Driver+" announces none"
	how := "announced, not tried: " + n.NotTried
	if n.Tried != nil {
		native, nativeWhy = n.Tried.Native == "", n.Tried.Native
		how = "tried"
	}
	tooLarge := n.MTU > plainMTU && !n.MultiBuffer
	switch {
	case n.Tried != nil && !native && n.Tried.Generic != "":
		e.add("native-xdp", Fail, "neither native nor generic: "+n.Tried.Generic, "packets are taken off the interface by XDP", "")
	case !native && tooLarge && n.NativeXDP:
		e.add("native-xdp", Warn, nativeWhy, fmt.Sprintf("the driver takes XDP up to an MTU of about %d only; generic XDP, which works, copies every packet", plainMTU),
			fmt.Sprintf("ip link set %s mtu 1500", n.Name))
	case !native && n.Offloads["rx-gro-hw"]:
		e.add("native-xdp", Warn, nativeWhy, "the device merges packets, which excludes native XDP with some drivers; generic XDP, which works, copies every packet", "").
			propose(feature(n.Name, "rx-gro-hw", true, false))
	case !native:
		e.add("native-xdp", Warn, nativeWhy, "generic XDP, which works, copies every packet, after the kernel has made a socket buffer of it", "")
	default:
		e.ok("native-xdp", "yes (%s)", how)
	}
	e.zeroCopy(n, how)
	e.mtu(n)

	checksum := n.TXChecksum || !n.ZeroCopy
	if n.Tried != nil {
		checksum = len(n.Tried.Queues) > 0 && !slices.ContainsFunc(n.Tried.Queues, func(q QueueTried) bool { return !q.TXChecksum })
	}
	if checksum {
		e.ok("tx-checksum", "on request (%s)", how)
	} else {
		e.add("tx-checksum", Warn, "none on request", "the worker computes the checksums of what it sends: about 0.2 us for a packet of 1500 bytes", "")
	}
}

func (e *examiner) zeroCopy(n *Interface, how string) {
	if n.Tried == nil {
		if n.ZeroCopy {
			e.ok("zero-copy", "yes (%s)", how)
		} else {
			e.add("zero-copy", Warn, fmt.Sprintf("driver %s announces none", n.Driver), whyZeroCopy, "")
		}
		return
	}
	got := make(map[string][]string)
	refused := make(map[string]bool)
	var reasons []string
	for _, q := range n.Tried.Queues {
		got[q.Mode] = append(got[q.Mode], fmt.Sprint(q.Queue))
		if why := q.ZeroCopy; why != "" && !refused[why] {
			refused[why] = true
			reasons = append(reasons, why)
		}
		if q.Mode == "none" {
			e.add("af-xdp-queue", Fail, fmt.Sprintf("queue %d cannot be bound: %s", q.Queue, q.Copy), "all queues must be the daemon's, or the connections of the others could not be decrypted", "")
		}
	}
	queues := len(n.Tried.Queues)
	switch {
	case queues == 0:
		e.add("zero-copy", Warn, "no: no XDP program could be attached", whyZeroCopy, "")
	case len(got["zerocopy"]) == queues:
		e.ok("zero-copy", "%d of %d queues (tried)", queues, queues)
	default:
		e.add("zero-copy", Warn, fmt.Sprintf("%d of %d queues (tried): %s", len(got["zerocopy"]), queues, strings.Join(reasons, "; ")), whyZeroCopy, "")
	}
}

const whyZeroCopy = "the kernel copies each packet twice, about 1 us on either way"

func (e *examiner) mtu(n *Interface) {
	large := n.MTU+headers > largestChunk
	switch {
	case n.ZeroCopy && n.ZeroCopySegments < 2 && n.MTU+headers > largestZero:
		e.add("mtu", Warn, fmt.Sprintf("%d", n.MTU), "a packet does not fit one chunk of packet memory, and the driver's zero-copy takes no packets of several: copy mode is used",
			fmt.Sprintf("ip link set %s mtu %d", n.Name, largestZero-headers))
	case n.MTU < 1280:
		e.add("mtu", Warn, fmt.Sprintf("%d", n.MTU), "encryption takes 20 bytes of each segment, a large part of such small ones", "")
	case large:
		e.ok("mtu", "%d: packets of several buffers", n.MTU)
	default:
		e.ok("mtu", "%d: one buffer holds a packet", n.MTU)
	}
}

func (e *examiner) programs(n *Interface, m *Machine) {
	switch {
	case n.OwnXDP && strings.HasPrefix(n.XDP, gatewayPrefix):
		e.ok("xdp-program", "a gateway's (%s): it runs, or has left its bypass, which tcpcrypt run --cleanup with --interface and --inner-interface removes", n.XDP)
	case n.OwnXDP:
		e.ok("xdp-program", "the daemon's (%s): it runs", n.XDP)
	case n.XDP != "" && m.Capabilities&(1<<unix.CAP_SYS_ADMIN) == 0:
		e.add("xdp-program", Fail, n.XDP+" is attached", "it may be the daemon's, or another one, beside which the daemon does not start: only root can tell", "sudo tcpcrypt doctor "+n.Name)
	case n.XDP != "":
		e.add("xdp-program", Fail, n.XDP+" is attached", "an interface has one XDP program; the daemon does not replace another one", "ip link set dev "+n.Name+" xdp off")
	default:
		e.ok("xdp-program", "none")
	}
	var foreign []string
	for _, p := range n.TCX {
		if p != "nic_egress" && p != "tap_ingress" {
			foreign = append(foreign, p)
		}
	}
	if len(foreign) > 0 {
		e.add("tcx-programs", Warn, strings.Join(foreign, ", "), "they see connections of this host before they are encrypted, and packets that they redirect are not", "bpftool net show dev "+n.Name)
	} else {
		e.ok("tcx-programs", "none of others")
	}
	if len(n.Sockets) > 0 && !n.OwnXDP {
		e.add("af-xdp-queues", Fail, fmt.Sprintf("AF_XDP sockets of another program on queues %v", n.Sockets), "a queue has one AF_XDP socket", "ss --xdp -ep")
	}
}

func (e *examiner) queues(n *Interface, m *Machine) {
	c := n.Channels
	switch {
	case c.RX > maxQueues:
		e.add("queues", Fail, fmt.Sprintf("%d receive queues", c.RX), fmt.Sprintf("the daemon serves up to %d", maxQueues), fmt.Sprintf("ethtool -L %s combined %d", n.Name, min(maxQueues, len(m.CPUs))))
	case c.RX > len(m.CPUs):
		e.add("queues", Warn, fmt.Sprintf("%d receive queues, %d CPUs", c.RX, len(m.CPUs)), "queues that share a CPU cost interrupts and memory and gain nothing", fmt.Sprintf("ethtool -L %s combined %d", n.Name, len(m.CPUs)))
	case c.RX == 1 && c.MaxRX > 1 && len(m.CPUs) > 1:
		e.add("queues", Warn, fmt.Sprintf("1 receive queue of %d", c.MaxRX), "one queue is served by one CPU", fmt.Sprintf("ethtool -L %s combined %d", n.Name, min(c.MaxRX, len(m.CPUs))))
	default:
		e.ok("queues", "%d receive (of %d), %d transmit", c.RX, c.MaxRX, c.TX)
	}
	switch {
	case c.RX == 1:
		e.ok("rss", "one queue: nothing to spread")
	case !n.RSS.Known:
		e.ok("rss", "not known; only a gateway gains from symmetric spreading")
	case len(n.RSS.Queues) < c.RX:
		e.add("rss", Warn, fmt.Sprintf("packets are spread over queues %v of %d", n.RSS.Queues, c.RX), "the other queues' CPUs have nothing to do", fmt.Sprintf("ethtool -X %s default", n.Name))
	case n.RSS.Symmetric:
		e.ok("rss", "symmetric, over %d queues; a gateway gains from it if its other card has the same key", c.RX)
	default:
		e.ok("rss", "over %d queues, not symmetric: host mode steers what the host sends by the queue on which it receives; a gateway copies what its cards spread differently to the worker that has it", c.RX)
	}
	r := n.Rings
	const enough = 1024
	switch {
	case r.RX == 0:
		e.ok("rings", "not known")
	case r.RX < enough && r.MaxRX > r.RX:
		e.add("rings", Warn, fmt.Sprintf("receive %d of %d, transmit %d of %d", r.RX, r.MaxRX, r.TX, r.MaxTX), "a worker that is not scheduled for some milliseconds loses what a short ring does not hold (changing it resets the link)",
			fmt.Sprintf("ethtool -G %s rx %d tx %d", n.Name, min(r.MaxRX, 4096), max(r.TX, min(r.MaxTX, 4096))))
	default:
		e.ok("rings", "receive %d of %d, transmit %d of %d", r.RX, r.MaxRX, r.TX, r.MaxTX)
	}
}

// maxQueues is how many the daemon serves.
const maxQueues = 64

// placement judges where the hardware, its interrupts and the workers are.
func (e *examiner) placement(n *Interface, m *Machine, workers []int) {
	if n.PCIMaxWidth > 0 {
		found := fmt.Sprintf("x%d %s", n.PCIWidth, n.PCISpeed)
		if n.PCIWidth < n.PCIMaxWidth || n.PCISpeed != n.PCIMaxSpeed {
			e.add("pcie", Warn, fmt.Sprintf("%s, the card can x%d %s", found, n.PCIMaxWidth, n.PCIMaxSpeed), "a narrower slot may be slower than the link", "")
		} else {
			e.ok("pcie", "%s", found)
		}
	}
	var far []string
	for _, cpu := range workers {
		if len(n.LocalCPUs) > 0 && !slices.Contains(n.LocalCPUs, cpu) {
			far = append(far, fmt.Sprint(cpu))
		}
	}
	switch {
	case n.NUMANode < 0:
		e.ok("numa", "no node")
	case len(far) > 0:
		e.add("numa", Warn, fmt.Sprintf("node %d; CPUs %s are of another one", n.NUMANode, strings.Join(far, ", ")), "each packet crosses the interconnect", "tcpcrypt run --cpus "+joinCPUs(n.LocalCPUs, n.Channels.RX))
	default:
		e.ok("numa", "node %d, CPUs %s", n.NUMANode, joinCPUs(n.LocalCPUs, len(n.LocalCPUs)))
	}
	e.interrupts(n, m, workers)
}

func joinCPUs(cpus []int, most int) string {
	var out []string
	for _, c := range cpus[:min(most, len(cpus))] {
		out = append(out, fmt.Sprint(c))
	}
	return strings.Join(out, ",")
}

// interrupts compares where the queues' interrupts are delivered with where
// their workers run.
func (e *examiner) interrupts(n *Interface, m *Machine, workers []int) {
	where := make(map[int][]int) // queue to CPUs
	for _, q := range n.IRQs {
		if q.Queue >= 0 {
			where[q.Queue] = q.CPUs
		}
	}
	if len(where) == 0 {
		e.ok("irq", "no interrupts of queues")
		return
	}
	if len(workers) == 0 {
		var parts []string
		cpus := make(map[string]bool)
		for q := range n.Channels.RX {
			if on, ok := where[q]; ok {
				text := joinCPUs(on, len(on))
				cpus[text] = true
				parts = append(parts, fmt.Sprintf("%d on %s", q, text))
			}
		}
		if len(parts) > 1 && len(cpus) == 1 && len(m.CPUs) > 1 {
			e.add("irq", Warn, "interrupts of all queues are on CPU "+slices.Sorted(maps.Keys(cpus))[0], "one CPU does the receiving of all queues", "tcpcrypt doctor "+n.Name+" --cpus LIST --fix")
			return
		}
		e.ok("irq", "queue %s; no --cpus: workers are not pinned", strings.Join(parts, ", "))
		return
	}
	fine := 0
	for _, q := range n.IRQs {
		if q.Queue < 0 {
			continue
		}
		own := workers[q.Queue%len(workers)]
		other := slices.ContainsFunc(q.CPUs, func(cpu int) bool { return cpu != own && slices.Contains(workers, cpu) })
		far := len(n.LocalCPUs) > 0 && !slices.ContainsFunc(q.CPUs, func(cpu int) bool { return slices.Contains(n.LocalCPUs, cpu) })
		if !other && !far {
			fine++
			continue
		}
		why := "it takes time from another queue's worker there, and moves the packets between caches"
		if far {
			why = "that CPU is far from the card"
		}
		e.add("irq", Warn, fmt.Sprintf("interrupt %d (%s) is delivered to CPU %s, the worker of queue %d runs on %d", q.Number, q.Name, joinCPUs(q.CPUs, len(q.CPUs)), q.Queue, own), why, "").
			propose(affinity(q.Number, q.Mask, fmt.Sprint(own)))
	}
	if fine > 0 {
		e.ok("irq", "%d interrupts of queues are where their workers are, or on CPUs of none", fine)
	}
	if m.IRQBalance {
		e.add("irqbalance", Warn, "runs", "it moves interrupts away from where they were put", "systemctl stop irqbalance")
	}
}

func (e *examiner) features(n *Interface) {
	state := func(name string) string {
		if n.Offloads[name] {
			return "on"
		}
		return "off"
	}
	if n.Offloads["rx-lro"] {
		e.add("lro", Warn, "on", "segments that the hardware merged cannot be told apart, and many drivers refuse XDP with it", "").
			propose(feature(n.Name, "rx-lro", true, false))
	} else {
		e.ok("lro", "off")
	}
	if n.VLANStripped {
		e.add("rx-vlan", Fail, "the device takes VLAN tags off, cannot be kept from it, and there are VLAN devices", "XDP cannot tell the packets of VLANs from untagged ones: their connections are not encrypted rightly", "run on the VLAN devices instead, or, for a veth device, ethtool -K PEER txvlan off at its other end")
	} else {
		e.ok("rx-vlan", "no tags are lost")
	}
	e.ok("offloads", "TSO %s, GSO %s, GRO %s: of use to connections that stay plain", state("tx-tcp-segmentation"), state("tx-generic-segmentation"), state("rx-gro"))
}
