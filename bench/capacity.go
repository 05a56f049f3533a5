package bench

import (
	"fmt"
	"math"
)

// Costs are what one packet costs outside of the engine, in ns of one core.
// They depend on NIC and driver and cannot be measured without them; the zero
// value takes DefaultCosts.
type Costs struct {
	CopyRX, CopyTX float64 `json:"-"` // AF_XDP in copy mode, kernel included
	ZeroCopy       float64 `json:"-"` // AF_XDP in zero-copy mode, each direction
	// Inner is the TAP's share of a packet of 1440 bytes. It is a cost per byte:
	// super-segments are copied.
	Inner float64 `json:"-"`
}

// DefaultCosts were measured over a veth and a TAP on an EPYC of the Zen 4
// generation (copy mode, inner path), or are usual for drivers (zero-copy).
var DefaultCosts = Costs{CopyRX: 1200, CopyTX: 1000, ZeroCopy: 60, Inner: 200}

// CapacityRow is what a worker's core carries at one packet size, and how many
// cores a link takes.
type CapacityRow struct {
	Direction   string  `json:"direction"` // seal or open
	Payload     int     `json:"payload"`   // data bytes of a packet
	Mode        string  `json:"mode"`      // zerocopy or copy
	NsPer       float64 `json:"ns_per_packet"`
	EngineNs    float64 `json:"engine_ns_per_packet"` // measured, the AEAD included
	GbpsPerCore float64 `json:"gbps_per_core"`        // of payload
	LinkGbps    float64 `json:"link_gbps"`
	// Cores that carry this direction of the link at line rate.
	Cores int `json:"cores"`
}

// CapacityLinks are the links that Capacity computes, in Gb/s.
var CapacityLinks = []float64{10, 25, 40, 100, 200, 400}

// wireBytes is what a packet with so much data takes on an Ethernet link: the
// frame of tcpcrypt, TCP with timestamps, IPv4, Ethernet with its check sequence,
// preamble and gap.
func wireBytes(payload int) int { return payload + 20 + 32 + 20 + 14 + 4 + 20 }

// Capacity computes from measured rows of Pipeline what cores are needed for a
// link. Assumptions says what it takes for granted.
func Capacity(measured []PipelineRow, c Costs) []CapacityRow {
	if c == (Costs{}) {
		c = DefaultCosts
	}
	var rows []CapacityRow
	for _, m := range measured {
		if m.Workers != 1 {
			continue
		}
		inner := c.Inner * float64(m.Payload) / 1440
		for _, mode := range []string{"zerocopy", "copy"} {
			port := c.ZeroCopy
			if mode == "copy" {
				port = c.CopyTX
				if m.Direction == "open" {
					port = c.CopyRX
				}
			}
			ns := m.NsPer + port + inner
			for _, link := range CapacityLinks {
				pps := link * 1e9 / 8 / float64(wireBytes(m.Payload))
				rows = append(rows, CapacityRow{
					Direction: m.Direction, Payload: m.Payload, Mode: mode, NsPer: ns, EngineNs: m.NsPer,
					GbpsPerCore: float64(m.Payload) * 8 / ns, LinkGbps: link, Cores: int(math.Ceil(pps * ns / 1e9)),
				})
			}
		}
	}
	return rows
}

// Assumptions says in words what Capacity adds to the measured costs.
func Assumptions(c Costs) []string {
	if c == (Costs{}) {
		c = DefaultCosts
	}
	return []string{
		"engine: measured in this run, in memory, on one core of this machine",
		fmt.Sprintf("AF_XDP port, not measured in this run: zero-copy %.0f ns a packet; copy mode %.0f ns receiving, %.0f ns sending", c.ZeroCopy, c.CopyRX, c.CopyTX),
		fmt.Sprintf("inner path (TAP, super-segments), not measured in this run: %.0f ns per 1440 bytes", c.Inner),
		"every packet is full and every worker has the same share of the flows; acknowledgements are in the engine's cost; cores scale without loss",
		"the kernel's TCP and the applications need cores of their own",
	}
}
