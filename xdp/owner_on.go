//go:build xdpdebug

package xdp

import (
	"fmt"
	"runtime"
	"strings"
)

type owner uint8

const (
	ownerPool owner = iota
	ownerWorker
	ownerFill
	ownerTX
	ownerGone // quarantined: the kernel may still write it
)

func (o owner) String() string {
	switch o {
	case ownerPool:
		return "pool"
	case ownerWorker:
		return "worker"
	case ownerFill:
		return "fill or RX ring"
	case ownerTX:
		return "TX or completion ring"
	default:
		return "quarantine"
	}
}

const historyLen = 8

type transfer struct {
	from, to owner
	pcs      [6]uintptr
}

type chunkHistory struct {
	owner   owner
	n       int
	history [historyLen]transfer
}

// umemDebug records who has each chunk and panics, with the chunk's last
// transfers, when a chunk is taken from somebody who does not have it.
type umemDebug struct{ chunks []chunkHistory }

func (d *umemDebug) init(chunks int) { d.chunks = make([]chunkHistory, chunks) }

func (d *umemDebug) move(chunk uint64, from, to owner) {
	c := &d.chunks[chunk]
	if c.owner != from {
		panic(fmt.Sprintf("xdp: chunk %d moves from %v to %v, but %v has it\n%s", chunk, from, to, c.owner, c.describe()))
	}
	c.record(from, to)
}

// reset records a transfer whatever the owner was: the end of a socket.
func (d *umemDebug) reset(chunk uint64, to owner) {
	c := &d.chunks[chunk]
	c.record(c.owner, to)
}

func (c *chunkHistory) record(from, to owner) {
	t := &c.history[c.n%historyLen]
	*t = transfer{from: from, to: to}
	runtime.Callers(3, t.pcs[:])
	c.owner = to
	c.n++
}

func (c *chunkHistory) describe() string {
	var b strings.Builder
	for i := max(0, c.n-historyLen); i < c.n; i++ {
		t := &c.history[i%historyLen]
		fmt.Fprintf(&b, "transfer %d: %v -> %v\n", i, t.from, t.to)
		frames := runtime.CallersFrames(t.pcs[:])
		for {
			f, more := frames.Next()
			if f.Function != "" {
				fmt.Fprintf(&b, "\t%s\n\t\t%s:%d\n", f.Function, f.File, f.Line)
			}
			if !more {
				break
			}
		}
	}
	return b.String()
}
