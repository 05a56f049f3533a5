//go:build xdpdebug

package fastpath

// simSegmentsDefault is how many segments TestSim has on the wire. With every
// hand-over of a chunk checked it is a second run, over seeds of the first.
const simSegmentsDefault = 1_000_000
