package lab

import (
	"bytes"
	"errors"
	"net/netip"
	"sync"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// crossing holds the SYNs of connections until both hosts have sent one.
type crossing struct {
	mu    sync.Mutex
	f     *Forwarder
	syns  map[[2]netip.AddrPort]*[2][]byte // by endpoint at a and at b
	inner Hook
}

// ForwardCrossing is Forward for simultaneous opens: the SYN of each connection
// waits until the other host has sent one as well, then both go on, past the
// impairments, so that they cross for certain. Copies of a SYN that waits are
// dropped. o.Hook sees what is not held back. A connection that only one host
// opens does not come about.
func (p *Path) ForwardCrossing(o ForwarderOptions) (*Forwarder, error) {
	c := &crossing{syns: map[[2]netip.AddrPort]*[2][]byte{}, inner: o.Hook}
	o.Hook = c.hook
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	c.f, err = p.Forward(o)
	return c.f, err
}

func (c *crossing) hook(d Dir, b []byte) Verdict {
	if c.holds(d, b) {
		return Drop
	}
	if c.inner != nil {
		return c.inner(d, b)
	}
	return Pass
}

func (c *crossing) holds(d Dir, b []byte) bool {
	x, ok := frame.Parse(b)
	if !ok || !x.TCP || kindOf(x.Flags(b)) == NonSYNs {
		return false
	}
	// A SYN-ACK waits here as well: one host may answer before the SYN it sent
	// has been injected, and would have its answer arrive first.
	c.mu.Lock()
	defer c.mu.Unlock()
	if kindOf(x.Flags(b)) == SYNACKs {
		return false
	}
	ends := [2]netip.AddrPort{x.Src(b), x.Dst(b)}
	if d == BtoA {
		ends[0], ends[1] = ends[1], ends[0]
	}
	held := c.syns[ends]
	switch {
	case held == nil:
		held = new([2][]byte)
		c.syns[ends] = held
	case held[AtoB] != nil && held[BtoA] != nil:
		return false // they have crossed
	}
	held[d] = bytes.Clone(b)
	if held[d.Reverse()] == nil {
		return true
	}
	if err := errors.Join(c.f.Inject(AtoB, held[AtoB]), c.f.Inject(BtoA, held[BtoA])); err != nil {
		c.f.fail(err)
	}
	return true
}
