//go:build !xdpdebug

package fastpath

// simSegmentsDefault is how many segments TestSim has on the wire.
const simSegmentsDefault = 10_000_000
