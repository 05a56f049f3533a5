// Package matrix runs transfers over many kinds of paths, each encrypted and as
// plain TCP, between two hosts in network namespaces with kernels' own TCP.
//
// A [Cell] is one combination of congestion control, MTU, host settings, wire
// and network layer. [Cells] lists combinations that cover each pair of values
// early and each triple in the end; [Cell] by cell, [Run] transfers bytes both
// ways over both kinds of connection, and fails unless they arrive exactly.
package matrix

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Axes of the matrix, in the order of a Cell's fields.
var (
	// CongestionControls are those that are tried where the kernel has them.
	CongestionControls = []string{"cubic", "bbr", "reno"}
	MTUs               = []int{1500, 576, 1280, 9000}
	Hosts              = []Host{Default, NoSACK, NoTimestamps, ECN, NoWindowScaling, SmallBuffers, SlowReader}
	Wires              = []Wire{Clean, Loss01, Loss1, Loss5, Reordered, Duplicated}
	Nets               = []Net{IPv4, IPv6, VLAN4, VLAN6}
)

// Host says how both hosts differ from an ordinary one.
type Host uint8

// The hosts.
const (
	Default Host = iota
	NoSACK
	NoTimestamps
	ECN
	NoWindowScaling
	SmallBuffers // receive buffers of 16 KiB
	SlowReader   // the same, read in pieces with pauses
)

// String returns the name in the table.
func (h Host) String() string {
	return [...]string{"default", "no SACK", "no timestamps", "ECN", "no window scaling", "16 KiB buffers", "slow reader"}[h]
}

// Wire says what happens to the segments of both directions.
type Wire uint8

// The wires.
const (
	Clean Wire = iota
	Loss01
	Loss1
	Loss5
	Reordered
	Duplicated
)

// String returns the name in the table.
func (w Wire) String() string {
	return [...]string{"clean", "0.1 % loss", "1 % loss", "5 % loss", "2 % reordered", "2 % duplicated"}[w]
}

// Net is the network layer that carries the connection.
type Net uint8

// The network layers.
const (
	IPv4 Net = iota
	IPv6
	VLAN4 // IPv4 on a VLAN
	VLAN6
)

// String returns the name in the table.
func (n Net) String() string {
	return [...]string{"IPv4", "IPv6", "VLAN, IPv4", "VLAN, IPv6"}[n]
}

func (n Net) v6() bool   { return n == IPv6 || n == VLAN6 }
func (n Net) vlan() bool { return n >= VLAN4 }

// Cell is one combination.
type Cell struct {
	CC   string
	MTU  int
	Host Host
	Wire Wire
	Net  Net
}

// String returns the cell's values, separated by commas.
func (c Cell) String() string {
	return strings.Join([]string{c.CC, fmt.Sprintf("MTU %d", c.MTU), c.Host.String(), c.Wire.String(), c.Net.String()}, ", ")
}

// possible reports whether the combination exists: IPv6 needs an MTU of 1280.
func (c Cell) possible() bool { return c.MTU >= 1280 || !c.Net.v6() }

// impair returns what the cell's wire does to each direction: a link of 200 Mb/s
// with a round trip of 2 ms, and its faults.
func (c Cell) impair() lab.Impair {
	im := lab.Impair{Rate: 200e6, Delay: time.Millisecond, QueueBytes: 256 << 10}
	switch c.Wire {
	case Loss01:
		im.Drop = 0.001
	case Loss1:
		im.Drop = 0.01
	case Loss5:
		im.Drop = 0.05
	case Reordered:
		im.Reorder = 0.02
	case Duplicated:
		im.Duplicate = 0.02
	}
	return im
}

// size returns how many bytes the cell transfers: a number of segments, so that
// cells take about as long as each other.
func (c Cell) size() int {
	n := 600
	if c.Host == SmallBuffers || c.Host == SlowReader {
		n = 150
	}
	return min(n*(c.MTU-40), 1<<20)
}

// values returns the cell as indices into the axes.
func (c Cell) values(ccs []string) [5]int {
	return [5]int{slices.Index(ccs, c.CC), slices.Index(MTUs, c.MTU), int(c.Host), int(c.Wire), int(c.Net)}
}

// Cells returns combinations of the given congestion controls with all values of
// the other axes. Every triple of values occurs in some cell, unless it is
// impossible; the cells are in the order in which they cover pairs first, so
// that a part of the list is a good selection. The list is the same every time.
func Cells(ccs []string) []Cell {
	var all []Cell
	for _, cc := range ccs {
		for _, mtu := range MTUs {
			for _, h := range Hosts {
				for _, w := range Wires {
					for _, n := range Nets {
						if c := (Cell{cc, mtu, h, w, n}); c.possible() {
							all = append(all, c)
						}
					}
				}
			}
		}
	}
	// The greedy choice of the cell that covers the most that is new.
	type tuple [3][2]int // axis and value; the last is {-1, 0} in a pair
	const pairWorth = 1000
	gains := func(c Cell) (pairs, triples []tuple) {
		v := c.values(ccs)
		for i := range v {
			for j := i + 1; j < len(v); j++ {
				pairs = append(pairs, tuple{{i, v[i]}, {j, v[j]}, {-1, 0}})
				for k := j + 1; k < len(v); k++ {
					triples = append(triples, tuple{{i, v[i]}, {j, v[j]}, {k, v[k]}})
				}
			}
		}
		return pairs, triples
	}
	seen := map[tuple]bool{}
	var out []Cell
	for {
		best, at := 0, -1
		for i, c := range all {
			pairs, triples := gains(c)
			gain := 0
			for _, p := range pairs {
				if !seen[p] {
					gain += pairWorth
				}
			}
			for _, p := range triples {
				if !seen[p] {
					gain++
				}
			}
			if gain > best {
				best, at = gain, i
			}
		}
		if at < 0 {
			return out
		}
		c := all[at]
		all = slices.Delete(all, at, at+1)
		pairs, triples := gains(c)
		for _, p := range append(pairs, triples...) {
			seen[p] = true
		}
		out = append(out, c)
	}
}
