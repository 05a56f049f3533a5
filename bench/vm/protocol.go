package vm

// Greeting is the line that the agent writes when it is ready for requests.
const Greeting = "agent-ready\n"

// A Request is one line of JSON that the host sends to a guest's agent, which
// answers each with a Response, in order.
type Request struct {
	Op string `json:"op"`

	Cards int `json:"cards,omitempty"` // "hello": how many there must be

	// "exec" runs Args[0] with the others and waits for it; "start" starts the
	// daemon and waits until it is ready; "stop" ends it with SIGTERM, "kill"
	// with SIGKILL.
	Args []string `json:"args,omitempty"`

	// "stack" makes a device over Interface: the first of Args is its kind, bond
	// or vlan, the second its name; others are more ports of a bond. "unstack"
	// removes Interface.
	//
	// "net" sets the interface up: queues (0: leaves them), MTU, addresses in
	// Args. "spread" has the hardware deliver to queue Queues only (-1: as
	// before).
	Interface string `json:"interface,omitempty"`
	Queues    int    `json:"queues,omitempty"`
	MTU       int    `json:"mtu,omitempty"`
	Address   string `json:"address,omitempty"` // with prefix length; "listen" and "open": address and port
	Up        bool   `json:"up,omitempty"`      // "link": up or down; "carrier": which of both to wait for

	// "open" opens Connections and exchanges Bytes in each direction over each
	// of them; with Again it does that over the ones that are open. "close"
	// closes them in order, "abort" in disorder.
	Connections int  `json:"connections,omitempty"`
	Bytes       int  `json:"bytes,omitempty"`
	Again       bool `json:"again,omitempty"`
}

// Response is the answer to a Request.
type Response struct {
	Error string `json:"error,omitempty"`

	Stdout string `json:"stdout,omitempty"` // "exec"
	Stderr string `json:"stderr,omitempty"` // "exec", and what the daemon has logged since the last "start"
	Code   int    `json:"code,omitempty"`   // exit code

	Bytes    int64             `json:"bytes,omitempty"`      // "open": exchanged, both directions together, compared byte by byte
	Sockets  []SocketInfo      `json:"sockets,omitempty"`    // "sockets": AF_XDP sockets of the daemon
	Counters map[string]uint64 `json:"counters,omitempty"`   // "counters": of the driver
	Threads  []ThreadInfo      `json:"threads,omitempty"`    // "threads": of the daemon
	Cards    []CardInfo        `json:"cards,omitempty"`      // "hello": the network cards, by MAC address
	Kernel   string            `json:"kernel,omitempty"`     // "hello"
	CPUs     int               `json:"cpus,omitempty"`       // "hello"
	XDP      bool              `json:"xdp,omitempty"`        // "attached": an XDP program
	Strips   bool              `json:"strips,omitempty"`     // "attached": VLAN tags are taken off by the hardware
	Devices  []string          `json:"devices,omitempty"`    // "attached": all network devices
	Bound    []int             `json:"bound,omitempty"`      // "attached": queues with AF_XDP sockets
	Failed   []string          `json:"not_loaded,omitempty"` // "hello": modules that could not be loaded
}

// CardInfo is a network card, as its driver tells of it.
type CardInfo struct {
	Interface string `json:"interface"`
	Driver    string `json:"driver"`
	Queues    int    `json:"queues"` // for receiving
}

// SocketInfo is an AF_XDP socket, as the kernel tells of it.
type SocketInfo struct {
	Queue    int  `json:"queue"`
	ZeroCopy bool `json:"zero_copy"` // of XDP_OPTIONS
}

// ThreadInfo is a thread that may run on one CPU only.
type ThreadInfo struct {
	CPU int `json:"cpu"`
}
