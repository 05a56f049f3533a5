// Package fastpath translates established tcpcrypt flows between the wire and
// the local TCP stack: flow table, translation by the rules T1-T21, the worker
// loop over vectors of packets, and the ports the packets come through.
package fastpath

import (
	"log/slog"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// HostConfig says how a Host is to be run. Flags and configuration keys of the
// command line map onto it one to one.
type HostConfig struct {
	Interface string // outer interface, e.g. eth0
	// Inner is the inner interface of a gateway, whose hosts' connections are
	// encrypted; empty: this host's are.
	Inner string
	// Block stops a gateway from forwarding anything without the daemon. Else
	// what is not encrypted goes on.
	Block   bool
	Mode    string // auto, zerocopy, copy or generic
	Queues  []int  // NIC queues to bind; nil: all
	Workers int    // 0: one a queue, as far as there are CPU cores
	CPUs    []int  // CPUs to pin workers to; nil: chosen, see NUMA
	// NUMA is the node whose CPUs are chosen; -1: that of the NIC, and workers
	// are pinned only where there are CPUs to spare.
	NUMA int
	Poll Poll // what workers without work do
	// BusyPoll is xdp.SocketConfig.BusyPoll.
	BusyPoll bool
	Ports    []PortRange
	Exclude  []PortRange
	TEPs     []crypto.TEP
	AEADs    []crypto.AEAD
	NoResume bool
	// ResumeNonce is slowpath.Config.ResumeNonce; 8 unless the user knows
	// better.
	ResumeNonce int
	// RekeyBytes, RekeyFrames, RekeyEvery and TCPKeepalive are those of
	// EngineConfig.
	RekeyBytes, RekeyFrames uint64
	RekeyEvery              time.Duration
	TCPKeepalive            bool
	Require                 bool
	// KeepGuard leaves the guard on the interface when the Host is closed, so
	// that connections that must not be plain are refused until the next one
	// runs.
	KeepGuard bool
	// Guard is GuardAuto, GuardOn or GuardOff; GuardCgroup and GuardPins are
	// Cgroup and Pins of xdp.GuardConfig.
	Guard                  string
	GuardCgroup, GuardPins string
	Rules                  []Rule // the first that matches wins over Ports, Exclude and Require
	// MaxFlows is the most connections that are encrypted, being opened or kept
	// for late segments, MaxHalfOpen the most of them that are being opened;
	// what is beyond is plain, or refused where it must not be. 0: the defaults.
	MaxFlows, MaxHalfOpen int
	// Memory is the most bytes that wait for acknowledgements of the peers or of
	// the local stack, UmemChunks the packet buffers of each worker. 0: the
	// defaults.
	Memory, UmemChunks int
	Log                *slog.Logger
}

// What HostConfig.Guard may be: as much of the guard as the host allows, all of
// it or an error, or none.
const (
	GuardAuto = "auto"
	GuardOn   = "on"
	GuardOff  = "off"
)

// Bounds of HostConfig.
const (
	MostFlows   = xdp.DefaultFlows // and the default
	LeastChunks = 2048
	MostChunks  = 1 << 20
	LeastMemory = 1 << 20
)

// PortRange is an inclusive range of TCP ports. An empty list of ranges
// selects every port where it includes, and none where it excludes.
type PortRange struct{ First, Last uint16 }

// QueueStatus is the mode that one NIC queue really got.
type QueueStatus struct {
	Interface string `json:"interface"`
	Queue     int    `json:"queue"`
	Worker    int    `json:"worker"`
	CPU       int    `json:"cpu"`                // -1: not pinned
	Mode      string `json:"mode"`               // zerocopy, copy or generic
	Refused   string `json:"refused,omitempty"`  // why a better mode was not had
	Checksum  string `json:"checksum,omitempty"` // software or offload
	// Received and Transmitted count descriptors of its AF_XDP rings: packets, or
	// pieces of those that are larger than a chunk.
	Received    uint64 `json:"received"`
	Transmitted uint64 `json:"transmitted"`
	// HandedOver counts packets of the queue that went on to other workers.
	HandedOver uint64 `json:"handed_over"`
}

// WorkerStatus is how one worker runs.
type WorkerStatus struct {
	Worker   int   `json:"worker"`
	CPU      int   `json:"cpu"` // -1: not pinned
	Queues   []int `json:"queues"`
	Flows    int   `json:"flows"`     // encrypted or closing
	HalfOpen int   `json:"half_open"` // offered or negotiating
	// HandedOver counts packets that went on to other workers, which have their
	// flows: from the NIC's queues and from the local stack.
	HandedOver uint64 `json:"handed_over"`
	// Received counts packets that other workers handed over.
	Received uint64 `json:"received"`
}

// Status is the answer to `tcpcrypt status`.
type Status struct {
	Interface string         `json:"interface"`
	Driver    string         `json:"driver"`
	MTU       int            `json:"mtu"`
	Inner     string         `json:"inner"` // name of the TAP device, or of a gateway's inner interface
	Mode      string         `json:"mode"`  // the weakest mode of any queue
	Queues    []QueueStatus  `json:"queues"`
	Workers   []WorkerStatus `json:"workers"`
	Poll      string         `json:"poll"`             // hybrid, busy or sleep
	Bypass    string         `json:"bypass,omitempty"` // of a gateway without the daemon: forward or block
	Guard     string         `json:"guard"`            // "active", "partial" or "off"
	Layers    []GuardLayer   `json:"guard_layers"`
	Engine    string         `json:"aead_engine"`
	PID       int            `json:"pid"`
	Uptime    float64        `json:"uptime_s"`
	Draining  bool           `json:"draining"`
	Flows     int            `json:"flows"`     // encrypted or closing
	HalfOpen  int            `json:"half_open"` // offered or negotiating
	Ended     int            `json:"ended"`     // aborted at start: left over from a daemon that died
}

// GuardLayer is the state of one layer of the guard.
type GuardLayer struct {
	Layer      string `json:"layer"`
	Active     bool   `json:"active"`
	Persistent bool   `json:"persistent"`       // it outlives the daemon
	Reason     string `json:"reason,omitempty"` // why it does not, or is not active
}

// FlowInfo is one row of `tcpcrypt flows`.
type FlowInfo struct {
	Local     string         `json:"local"`
	Remote    string         `json:"remote"`
	VLAN      uint16         `json:"vlan,omitempty"`
	State     slowpath.State `json:"state"`
	Reason    string         `json:"reason"`
	Role      string         `json:"role"`
	TEP       string         `json:"tep"`
	AEAD      string         `json:"aead"`
	Resumed   bool           `json:"resumed"`
	SessionID string         `json:"session_id"`
	// PeerAware is the a bit of the peer's ENO option (RFC 8547 section 4.2).
	PeerAware   bool    `json:"peer_app_aware"`
	BytesIn     uint64  `json:"bytes_in"`
	BytesOut    uint64  `json:"bytes_out"`
	FramesIn    uint64  `json:"frames_in"`
	FramesOut   uint64  `json:"frames_out"`
	Retransmits uint64  `json:"retransmits"`
	RekeysIn    uint64  `json:"rekeys_in"`
	RekeysOut   uint64  `json:"rekeys_out"`
	Worker      int     `json:"worker"`
	Age         float64 `json:"age_s"`
}

// Stats is the answer to `tcpcrypt stats`: monotonic counters since start.
type Stats struct {
	Counters map[string]uint64 `json:"counters"` // packets, drops and events by name
	Reasons  map[string]uint64 `json:"reasons"`  // ended, plain and failed flows by reason
}

// DefaultDrain is how long Host.Drain lets encrypted flows finish by
// themselves before they are aborted.
const DefaultDrain = 5 * time.Second
