package doctor

// Facts is what is known of a machine and of network interfaces.
type Facts struct {
	Machine    Machine     `json:"machine"`
	Interfaces []Interface `json:"interfaces"`
	// WorkerCPUs are those that the daemon's workers are to be pinned to, in
	// the order of the queues; empty: they are not pinned.
	WorkerCPUs []int `json:"worker_cpus"`
}

// Unlimited is the value of a resource limit that limits nothing.
const Unlimited = ^uint64(0)

// Machine is what does not depend on an interface. An error text is empty where
// the thing works.
type Machine struct {
	Kernel       string            `json:"kernel"` // release
	Major        int               `json:"major"`
	Minor        int               `json:"minor"`
	CPUs         []int             `json:"cpus"`           // online
	CPUFlags     []string          `json:"cpu_flags"`      // those of interest
	Capabilities uint64            `json:"capabilities"`   // effective ones of this process, as a bit set
	OtherUsers   bool              `json:"user_namespace"` // the process is root of a user namespace at most
	MemlockSoft  uint64            `json:"memlock_soft"`   // bytes
	MemlockHard  uint64            `json:"memlock_hard"`
	HugePageSize uint64            `json:"huge_page_size"`  // bytes
	HugeTotal    int               `json:"huge_pages"`      // reserved pages
	HugeFree     int               `json:"huge_pages_free"` // of these, free
	THP          string            `json:"transparent_huge_pages"`
	Cgroup2      string            `json:"cgroup2"` // where it is mounted
	BPFFS        string            `json:"bpffs"`
	JIT          string            `json:"bpf_jit"` // net.core.bpf_jit_enable; empty: not known
	BTF          bool              `json:"btf"`
	TUN          string            `json:"tun_error"`
	AFXDP        string            `json:"af_xdp_error"`
	BPF          map[string]string `json:"bpf"` // feature to why it is missing
	IRQBalance   bool              `json:"irqbalance"`
}

// Interface is one network interface.
type Interface struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"` // of link, as `ip -d link` tells; "device" for hardware
	Driver     string `json:"driver"`
	DriverInfo string `json:"driver_version"`
	Firmware   string `json:"firmware"`
	Bus        string `json:"bus"`
	Loopback   bool   `json:"loopback"`
	NoEthernet bool   `json:"no_ethernet"` // packets without Ethernet header, as on tunnels
	Virtual    bool   `json:"virtual"`
	Up         bool   `json:"up"`
	Carrier    bool   `json:"carrier"`
	MTU        int    `json:"mtu"`
	Speed      int    `json:"speed_mbps"` // 0: not known

	// What the driver announces.
	NativeXDP        bool `json:"native_xdp"`
	MultiBuffer      bool `json:"multi_buffer"`
	ZeroCopy         bool `json:"zero_copy"`
	ZeroCopySegments int  `json:"zero_copy_segments"`
	TXChecksum       bool `json:"tx_checksum"`
	VLANStripped     bool `json:"vlan_stripped"`

	Tried    *Tried `json:"tried,omitempty"`
	NotTried string `json:"not_tried,omitempty"` // why Tried is nil

	XDP     string   `json:"xdp_program"` // name or id of the attached program, empty: none
	OwnXDP  bool     `json:"xdp_own"`     // it is the daemon's
	TCX     []string `json:"tcx_programs"`
	Sockets []int    `json:"af_xdp_queues"` // queues that AF_XDP sockets are bound to

	Channels Channels `json:"channels"`
	Rings    Rings    `json:"rings"`
	RSS      RSS      `json:"rss"`

	NUMANode    int    `json:"numa_node"` // -1: none
	LocalCPUs   []int  `json:"local_cpus"`
	PCIWidth    int    `json:"pcie_width"` // lanes, 0: not PCI Express
	PCIMaxWidth int    `json:"pcie_max_width"`
	PCISpeed    string `json:"pcie_speed"`
	PCIMaxSpeed string `json:"pcie_max_speed"`

	IRQs     []IRQ           `json:"irqs"`
	Offloads map[string]bool `json:"offloads"` // features by the names of ethtool -k's kernel side
}

// Tried is what the interface did when it was tried, xdp.Trial in words.
type Tried struct {
	Native    string       `json:"native_error"`
	Generic   string       `json:"generic_error"`
	Fragments bool         `json:"fragments"`
	Queues    []QueueTried `json:"queues"`
}

// QueueTried is what one queue did. An empty text means that it worked.
type QueueTried struct {
	Queue       int    `json:"queue"`
	Mode        string `json:"mode"` // zerocopy, copy, generic or none
	ZeroCopy    string `json:"zero_copy_error"`
	Copy        string `json:"copy_error"`
	MultiBuffer string `json:"multi_buffer_error"`
	TXChecksum  bool   `json:"tx_checksum"`
}

// Channels are queue numbers, in use and at most; receive queues count combined
// ones.
type Channels struct {
	RX    int `json:"rx"`
	TX    int `json:"tx"`
	MaxRX int `json:"max_rx"`
}

// Rings are the lengths of the hardware's rings; 0 where there are none.
type Rings struct {
	RX    int `json:"rx"`
	MaxRX int `json:"max_rx"`
	TX    int `json:"tx"`
	MaxTX int `json:"max_tx"`
}

// RSS is how the hardware spreads received packets over queues.
type RSS struct {
	Known     bool  `json:"known"`
	Symmetric bool  `json:"symmetric"` // both directions of a connection have the same hash
	Queues    []int `json:"queues"`    // that packets are spread over
}

// IRQ is an interrupt of an interface.
type IRQ struct {
	Number int    `json:"number"`
	Name   string `json:"name"`
	Queue  int    `json:"queue"` // -1: of no receive queue
	CPUs   []int  `json:"cpus"`  // where it is delivered
	Mask   string `json:"mask"`  // smp_affinity_list
}
