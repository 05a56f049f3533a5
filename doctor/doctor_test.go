package doctor

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// good is a machine and a card with nothing to complain of.
func good() Facts {
	return Facts{
		Machine: Machine{
			Kernel: "6.18.1", Major: 6, Minor: 18, CPUs: []int{0, 1, 2, 3}, CPUFlags: []string{"aes", "pclmulqdq"},
			Capabilities: ^uint64(0), MemlockSoft: 8 << 20, MemlockHard: 8 << 20, THP: "madvise",
			Cgroup2: "/sys/fs/cgroup", BPFFS: "/sys/fs/bpf", JIT: "1", BTF: true, BPF: map[string]string{"XDP programs": ""},
		},
		Interfaces: []Interface{{
			Name: "nic0", Kind: "device", Driver: "ice", Up: true, Carrier: true, MTU: 1500, Speed: 100000,
			NativeXDP: true, MultiBuffer: true, ZeroCopy: true, ZeroCopySegments: 18, TXChecksum: true,
			Tried: &Tried{Queues: []QueueTried{
				{Queue: 0, Mode: "zerocopy", TXChecksum: true},
				{Queue: 1, Mode: "zerocopy", TXChecksum: true},
			}},
			Channels: Channels{RX: 2, TX: 2, MaxRX: 8}, Rings: Rings{RX: 2048, MaxRX: 8160, TX: 2048, MaxTX: 8160},
			RSS: RSS{Known: true, Queues: []int{0, 1}}, NUMANode: 0, LocalCPUs: []int{0, 1},
			PCIWidth: 16, PCIMaxWidth: 16, PCISpeed: "16.0 GT/s PCIe", PCIMaxSpeed: "16.0 GT/s PCIe",
			IRQs: []IRQ{
				{Number: 30, Name: "ice-nic0-TxRx-0", Queue: 0, CPUs: []int{0}, Mask: "0"},
				{Number: 31, Name: "ice-nic0-TxRx-1", Queue: 1, CPUs: []int{1}, Mask: "1"},
			},
			Offloads: map[string]bool{"rx-gro": true},
		}},
		WorkerCPUs: []int{0, 1},
	}
}

func TestExamineGood(t *testing.T) {
	fs := Examine(good())
	for _, f := range fs {
		if f.Status != OK || f.Why != "" || f.Mend != "" || f.Safe {
			t.Errorf("%+v", f)
		}
	}
	if Worst(fs) != OK {
		t.Errorf("the worst is %s", Worst(fs))
	}
}

func TestExamine(t *testing.T) {
	nic := func(change func(*Interface)) func(*Facts) {
		return func(f *Facts) { change(&f.Interfaces[0]) }
	}
	machine := func(change func(*Machine)) func(*Facts) {
		return func(f *Facts) { change(&f.Machine) }
	}
	untried := func(n *Interface) { n.Tried, n.NotTried = nil, "it was not named" }
	for _, c := range []struct {
		name   string
		change func(*Facts)
		check  string
		status Status
		found  string // part of
		mend   string // all of; "-": there is none
		safe   bool
	}{
		{"kernel without tcx links", machine(func(m *Machine) { m.Kernel, m.Minor = "6.5.0", 5 }), "kernel", Fail, "6.5.0", "-", false},
		{"kernel without metadata", machine(func(m *Machine) { m.Minor = 8 }), "kernel", Warn, "6.18.1", "-", false},
		{"later major kernel", machine(func(m *Machine) { m.Kernel, m.Major, m.Minor = "7.0.1", 7, 0 }), "kernel", OK, "7.0.1", "-", false},
		{"no privilege", machine(func(m *Machine) { m.Capabilities = 0; m.MemlockSoft = Unlimited }), "privileges", Fail, "without CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN", "sudo tcpcrypt doctor", false},
		{"root of a user namespace", machine(func(m *Machine) { m.OtherUsers = true }), "privileges", Fail, "user namespace", "sudo tcpcrypt doctor", false},
		{"no BPF feature", machine(func(m *Machine) { m.BPF["XSKMAP"] = "the kernel does not have it" }), "bpf", Fail, "XSKMAP: the kernel", "-", false},
		{"no JIT", machine(func(m *Machine) { m.JIT = "0" }), "bpf-jit", Warn, "off", "sysctl -w net.core.bpf_jit_enable=1", true},
		{"no cgroup2", machine(func(m *Machine) { m.Cgroup2 = "" }), "cgroup2", Warn, "not mounted", "mount -t cgroup2 none /sys/fs/cgroup", false},
		{"no AF_XDP", machine(func(m *Machine) { m.AFXDP = "address family not supported" }), "af-xdp", Fail, "not supported", "-", false},
		{"no TUN", machine(func(m *Machine) { m.TUN = "/dev/net/tun: no such file" }), "tun", Fail, "no such file", "modprobe tun", true},
		{"no right to TUN", machine(func(m *Machine) { m.TUN = "/dev/net/tun: permission denied" }), "tun", Fail, "permission denied", "-", false},
		{"little locked memory", machine(func(m *Machine) { m.Capabilities &^= 1 << 14 }), "memlock", Fail, "8192 KiB", "ulimit -l unlimited   # for a service: LimitMEMLOCK=infinity", false},
		{"enough locked memory", machine(func(m *Machine) { m.Capabilities &^= 1 << 14; m.MemlockSoft = 1 << 30 }), "memlock", OK, "1024 MiB", "-", false},
		{"no huge pages", machine(func(m *Machine) { m.THP = "never" }), "huge-pages", Warn, "none reserved", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled", true},
		{"reserved huge pages", machine(func(m *Machine) { m.THP, m.HugeTotal, m.HugeFree, m.HugePageSize = "never", 8, 6, 2<<20 }), "huge-pages", OK, "6 of 8 pages of 2 MiB", "-", false},
		{"no AES", machine(func(m *Machine) { m.CPUFlags = nil }), "aes", Warn, "no AES", "tcpcrypt run --aeads chacha20poly1305 ...", false},

		{"loopback", nic(func(n *Interface) { n.Loopback = true }), "device", Fail, "loopback", "-", false},
		{"tunnel", nic(func(n *Interface) { n.NoEthernet, n.Driver = true, "tun" }), "device", Fail, "without Ethernet header (tun)", "-", false},
		{"down", nic(func(n *Interface) { n.Up, n.Carrier = false, false }), "device", Fail, "down", "ip link set nic0 up", false},
		{"no carrier", nic(func(n *Interface) { n.Carrier = false }), "device", Warn, "no carrier", "-", false},
		{"native refused", nic(func(n *Interface) { n.Tried = &Tried{Native: "operation not supported"} }), "native-xdp", Warn, "operation not supported", "-", false},
		{"no XDP at all", nic(func(n *Interface) { n.Tried = &Tried{Native: "a", Generic: "b"} }), "native-xdp", Fail, "neither native nor generic: b", "-", false},
		{"no native announced", nic(func(n *Interface) { untried(n); n.NativeXDP, n.ZeroCopy = false, false }), "native-xdp", Warn, "driver ice announces none", "-", false},
		{"announced only", nic(untried), "zero-copy", OK, "announced, not tried: it was not named", "-", false},
		{"hardware GRO in the way", nic(func(n *Interface) { n.Tried = &Tried{Native: "invalid argument"}; n.Offloads["rx-gro-hw"] = true }), "native-xdp", Warn, "invalid argument", "ethtool -K nic0 rx-gro-hw off", true},
		{"MTU too large for XDP", nic(func(n *Interface) { n.Tried = &Tried{Native: "invalid argument"}; n.MTU, n.MultiBuffer = 9000, false }), "native-xdp", Warn, "invalid argument", "ip link set nic0 mtu 1500", false},
		{"one queue without zero-copy", nic(func(n *Interface) {
			n.Tried.Queues[1] = QueueTried{Queue: 1, Mode: "copy", ZeroCopy: "no room", TXChecksum: true}
		}), "zero-copy", Warn, "1 of 2 queues (tried): no room", "-", false},
		{"a queue that cannot be bound", nic(func(n *Interface) { n.Tried.Queues[1] = QueueTried{Queue: 1, Mode: "none", Copy: "busy"} }), "af-xdp-queue", Fail, "queue 1 cannot be bound: busy", "-", false},
		{"no checksum", nic(func(n *Interface) { n.Tried.Queues[0].TXChecksum = false }), "tx-checksum", Warn, "none on request", "-", false},
		{"copy mode checksums", nic(func(n *Interface) { untried(n); n.ZeroCopy, n.TXChecksum = false, false }), "tx-checksum", OK, "on request", "-", false},
		{"jumbo without multi-buffer zero-copy", nic(func(n *Interface) { n.MTU, n.ZeroCopySegments = 9000, 1 }), "mtu", Warn, "9000", "ip link set nic0 mtu 3054", false},
		{"jumbo", nic(func(n *Interface) { n.MTU = 9000 }), "mtu", OK, "packets of several buffers", "-", false},
		{"tiny MTU", nic(func(n *Interface) { n.MTU = 576 }), "mtu", Warn, "576", "-", false},
		{"other program", nic(func(n *Interface) { n.XDP = "xdp_dispatcher" }), "xdp-program", Fail, "xdp_dispatcher", "ip link set dev nic0 xdp off", false},
		{"a program that only root can name", func(f *Facts) { f.Machine.Capabilities, f.Interfaces[0].XDP = 0, "program 7" }, "xdp-program", Fail, "program 7 is attached", "sudo tcpcrypt doctor nic0", false},
		{"own program", nic(func(n *Interface) {
			n.XDP, n.OwnXDP, n.Sockets = "host_xdp", true, []int{0, 1}
			n.TCX = []string{"nic_egress"}
		}), "xdp-program", OK, "it runs", "-", false},
		{"tcx program", nic(func(n *Interface) { n.TCX = []string{"cil_from_netdev"} }), "tcx-programs", Warn, "cil_from_netdev", "bpftool net show dev nic0", false},
		{"bound queues", nic(func(n *Interface) { n.Sockets = []int{1} }), "af-xdp-queues", Fail, "[1]", "ss --xdp -ep", false},
		{"too many queues", nic(func(n *Interface) { n.Channels = Channels{RX: 128, TX: 128, MaxRX: 128} }), "queues", Fail, "128", "ethtool -L nic0 combined 4", false},
		{"more queues than CPUs", nic(func(n *Interface) { n.Channels.RX = 8; n.RSS.Queues = []int{0, 1, 2, 3, 4, 5, 6, 7} }), "queues", Warn, "8 receive queues, 4 CPUs", "ethtool -L nic0 combined 4", false},
		{"one queue of many", nic(func(n *Interface) { n.Channels.RX = 1 }), "queues", Warn, "1 receive queue of 8", "ethtool -L nic0 combined 4", false},
		{"gateway", nic(func(n *Interface) { n.XDP, n.OwnXDP = "gateway_outer", true }), "xdp-program", OK, "a gateway's (gateway_outer)", "-", false},
		{"spread over fewer", nic(func(n *Interface) { n.RSS.Queues = []int{1} }), "rss", Warn, "[1] of 2", "ethtool -X nic0 default", false},
		{"symmetric", nic(func(n *Interface) { n.RSS.Symmetric = true }), "rss", OK, "symmetric, over 2", "-", false},
		{"short rings", nic(func(n *Interface) { n.Rings.RX = 256 }), "rings", Warn, "receive 256 of 8160", "ethtool -G nic0 rx 4096 tx 4096", false},
		{"short rings, no longer ones", nic(func(n *Interface) { n.Rings = Rings{256, 256, 256, 256} }), "rings", OK, "256 of 256", "-", false},
		{"narrow slot", nic(func(n *Interface) { n.PCIWidth = 4 }), "pcie", Warn, "x4 16.0 GT/s PCIe, the card can x16", "-", false},
		{"slow slot", nic(func(n *Interface) { n.PCISpeed = "8.0 GT/s PCIe" }), "pcie", Warn, "x16 8.0 GT/s", "-", false},
		{"workers on another node", func(f *Facts) { f.WorkerCPUs = []int{2, 3} }, "numa", Warn, "CPUs 2, 3 are of another one", "tcpcrypt run --cpus 0,1", false},
		{"interrupt at another's worker", nic(func(n *Interface) { n.IRQs[1].CPUs, n.IRQs[1].Mask = []int{0}, "0-3" }), "irq", Warn, "interrupt 31", "echo 1 > /proc/irq/31/smp_affinity_list", true},
		{"interrupt on another node", nic(func(n *Interface) { n.IRQs[0].CPUs = []int{3} }), "irq", Warn, "delivered to CPU 3", "echo 0 > /proc/irq/30/smp_affinity_list", true},
		{"all interrupts on one CPU", func(f *Facts) { f.WorkerCPUs = nil; f.Interfaces[0].IRQs[1].CPUs = []int{0} }, "irq", Warn, "all queues are on CPU 0", "tcpcrypt doctor nic0 --cpus LIST --fix", false},
		{"not pinned", func(f *Facts) { f.WorkerCPUs = nil }, "irq", OK, "queue 0 on 0, 1 on 1", "-", false},
		{"irqbalance", machine(func(m *Machine) { m.IRQBalance = true }), "irqbalance", Warn, "runs", "systemctl stop irqbalance", false},
		{"LRO", nic(func(n *Interface) { n.Offloads["rx-lro"] = true }), "lro", Warn, "on", "ethtool -K nic0 lro off", true},
		{"tags lost", nic(func(n *Interface) { n.VLANStripped = true }), "rx-vlan", Fail, "takes VLAN tags off", "run on the VLAN devices instead, or, for a veth device, ethtool -K PEER txvlan off at its other end", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := good()
			c.change(&f)
			found := Examine(f)
			i := slices.IndexFunc(found, func(x Finding) bool {
				return x.Check == c.check && x.Status == c.status && strings.Contains(x.Found, c.found)
			})
			if i < 0 {
				t.Fatalf("no finding %s %s %q in %+v", c.check, c.status, c.found, found)
			}
			x := found[i]
			mend := c.mend
			if mend == "-" {
				mend = ""
			}
			if x.Mend != mend || x.Safe != c.safe || (x.Undo != "") != c.safe || (x.Why == "") != (c.status == OK) {
				t.Errorf("%+v", x)
			}
			if (Worst(found) == Fail) != (c.status == Fail) {
				t.Errorf("the worst is %s", Worst(found))
			}
			if _, err := json.Marshal(found); err != nil {
				t.Error(err)
			}
		})
	}
}

// tree makes files under a new directory.
func tree(t *testing.T, files map[string]string) Source {
	t.Helper()
	s := Source{Proc: filepath.Join(t.TempDir(), "proc"), Sys: filepath.Join(t.TempDir(), "sys")}
	for path, content := range files {
		if rest, ok := strings.CutPrefix(path, "/proc"); ok {
			path = s.Proc + rest
		} else {
			path = s.Sys + strings.TrimPrefix(path, "/sys")
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func TestMachine(t *testing.T) {
	s := tree(t, map[string]string{
		"/proc/sys/kernel/osrelease":                  "6.12.3-test\n",
		"/proc/self/mounts":                           "none / ext4 rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n",
		"/proc/self/status":                           "Name:\tx\nCapEff:\t0000000000001000\n",
		"/proc/self/limits":                           "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         65536                unlimited            bytes\n",
		"/proc/meminfo":                               "MemTotal: 1 kB\nHugePages_Total:      10\nHugePages_Free:        7\nHugepagesize:       2048 kB\n",
		"/proc/cpuinfo":                               "processor\t: 0\nflags\t\t: fpu vaes aes sse\n",
		"/proc/77/comm":                               "irqbalance\n",
		"/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
		"/sys/devices/system/cpu/online":              "0-2,7\n",
		"/sys/kernel/btf/vmlinux":                     "x",
	})
	m := s.machine()
	if m.Kernel != "6.12.3-test" || m.Major != 6 || m.Minor != 12 || !slices.Equal(m.CPUs, []int{0, 1, 2, 7}) ||
		!slices.Equal(m.CPUFlags, []string{"aes", "vaes"}) || m.Capabilities != 1<<12 || m.MemlockSoft != 65536 || m.MemlockHard != Unlimited ||
		m.HugeTotal != 10 || m.HugeFree != 7 || m.HugePageSize != 2<<20 || m.THP != "madvise" || m.Cgroup2 != "/sys/fs/cgroup/unified" ||
		m.BPFFS != "/sys/fs/bpf" || !m.BTF || !m.IRQBalance || m.JIT != "" {
		t.Errorf("%+v", m)
	}
	if m := tree(t, nil).machine(); m.Major != 0 || len(m.CPUs) != 0 {
		t.Errorf("of nothing: %+v", m)
	}
}

func TestDevice(t *testing.T) {
	const interrupts = "            CPU0       CPU1\n  40:  1  2  PCI-MSIX  0-edge  nic0\n  41:  1  2  PCI-MSIX  1-edge  nic0-TxRx-0\n" +
		"  42:  1  2  PCI-MSIX  2-edge  nic0-TxRx-1\n  43:  0 0 PCI-MSIX 3-edge mlx5_comp1@pci:0000:01:00.0\n NMI: 0 0\n"
	files := map[string]string{"/proc/interrupts": interrupts}
	for _, n := range []string{"40", "41", "42", "43", "44"} {
		files["/sys/class/net/nic0/device/msi_irqs/"+n] = "msix"
	}
	for path, content := range map[string]string{
		"/proc/irq/41/effective_affinity_list": "1\n", "/proc/irq/41/smp_affinity_list": "0-1\n", "/proc/irq/42/smp_affinity_list": "0\n",
		"/sys/class/net/nic0/speed": "25000\n", "/sys/class/net/nic0/device/numa_node": "1\n", "/sys/class/net/nic0/device/local_cpulist": "8-9\n",
		"/sys/class/net/nic0/device/current_link_width": "8\n", "/sys/class/net/nic0/device/max_link_width": "16\n",
		"/sys/class/net/nic0/device/current_link_speed": "8.0 GT/s PCIe\n", "/sys/class/net/nic0/device/max_link_speed": "16.0 GT/s PCIe\n",
	} {
		files[path] = content
	}
	s := tree(t, files)
	i := Interface{Name: "nic0", Channels: Channels{RX: 2}}
	s.readDevice(&i)
	if i.Speed != 25000 || i.NUMANode != 1 || !slices.Equal(i.LocalCPUs, []int{8, 9}) || i.PCIWidth != 8 || i.PCIMaxWidth != 16 || i.PCISpeed != "8.0 GT/s PCIe" {
		t.Errorf("%+v", i)
	}
	want := []IRQ{
		{40, "nic0", -1, nil, ""}, {41, "nic0-TxRx-0", 0, []int{1}, "0-1"},
		{42, "nic0-TxRx-1", 1, []int{0}, "0"}, {43, "mlx5_comp1@pci:0000:01:00.0", 1, nil, ""},
	}
	if !slices.EqualFunc(i.IRQs, want, func(a, b IRQ) bool {
		return a.Number == b.Number && a.Name == b.Name && a.Queue == b.Queue && slices.Equal(a.CPUs, b.CPUs) && a.Mask == b.Mask
	}) {
		t.Errorf("interrupts %+v", i.IRQs)
	}

	// A virtio device's interrupts are its parent's.
	s = tree(t, map[string]string{
		"/sys/devices/pci/virtio0/x": "", "/sys/devices/pci/msi_irqs/50": "msix", "/sys/devices/pci/numa_node": "-1\n",
		"/proc/interrupts": " 50: 1 PCI-MSIX 1-edge virtio0-input.0\n",
	})
	if err := os.MkdirAll(s.sys("class/net/eth9"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(s.sys("devices/pci/virtio0"), s.sys("class/net/eth9/device")); err != nil {
		t.Fatal(err)
	}
	i = Interface{Name: "eth9", Channels: Channels{RX: 1}}
	s.readDevice(&i)
	if len(i.IRQs) != 1 || i.IRQs[0].Queue != 0 || i.NUMANode != -1 {
		t.Errorf("virtio: %+v", i)
	}
}

func TestRSS(t *testing.T) {
	r := describeRSS([]uint32{0, 1, 0, 3}, []byte{1, 2, 3, 4}, ^uint32(0))
	if !r.Known || r.Symmetric || !slices.Equal(r.Queues, []int{0, 1, 3}) {
		t.Errorf("%+v", r)
	}
	if r := describeRSS([]uint32{0}, []byte{0x6d, 0x5a, 0x6d, 0x5a, 0x6d}, 0); !r.Symmetric {
		t.Error("a key that repeats every two bytes is not symmetric")
	}
	if r := describeRSS([]uint32{0}, []byte{1, 2, 3, 4}, 1); !r.Symmetric {
		t.Error("symmetric XOR is not symmetric")
	}
	if r := describeRSS(nil, nil, 0); r.Known || r.Symmetric {
		t.Errorf("of nothing: %+v", r)
	}
}

// What --fix writes, its undo command takes back.
func TestChanges(t *testing.T) {
	files := map[string]string{
		"/proc/sys/net/core/bpf_jit_enable": "0\n", "/proc/irq/31/smp_affinity_list": "0-3\n",
		"/sys/kernel/mm/transparent_hugepage/enabled": "never",
	}
	s := tree(t, files)
	for _, c := range []struct {
		c          *change
		path, want string
		undo       string
	}{
		{sysctl("net.core.bpf_jit_enable", "0", "1"), s.proc("sys/net/core/bpf_jit_enable"), "1", "sysctl -w net.core.bpf_jit_enable=0"},
		{affinity(31, "0-3", "1"), s.proc("irq/31/smp_affinity_list"), "1", "echo 0-3 > /proc/irq/31/smp_affinity_list"},
		{sysfs("kernel/mm/transparent_hugepage/enabled", "never", "madvise"), s.sys("kernel/mm/transparent_hugepage/enabled"), "madvise", "echo never > /sys/kernel/mm/transparent_hugepage/enabled"},
	} {
		if err := c.c.apply(s); err != nil {
			t.Error(err)
		}
		if got, _, _ := strings.Cut(text(c.path), "\n"); got != c.want || c.c.undo != c.undo {
			t.Errorf("%s: wrote %q, undo %q", c.c.command, got, c.c.undo)
		}
	}
	if err := sysctl("net.core.nothing", "0", "1").apply(s); err == nil {
		t.Error("a file that does not exist was written")
	}
	f := Finding{Check: "rings", Subject: "nic0", Mend: "ethtool -G nic0 rx 4096"}
	if err := f.Apply(); err == nil {
		t.Error("an unsafe change was applied")
	}
}
