package slowpath

import (
	"container/heap"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Moved is a half-open flow on its way from one Machine to another. It belongs
// to whoever has it, and has to be given to Adopt.
type Moved struct{ f *flow }

// Detach takes a flow out of the Machine that opened it and that the peer has
// not answered yet, so that another Machine can go on with it; nil when there
// is no such flow. Only the peer's answer tells on which queue of the NIC the
// flow's packets arrive. The flow stays diverted.
func (m *Machine) Detach(k packet.Key) *Moved {
	f := m.flows[k]
	if f == nil || !f.active || f.phase != phaseOffered || f.job != nil {
		return nil
	}
	delete(m.flows, k)
	heap.Remove(&m.timers, f.slot)
	return &Moved{f}
}

// Adopt goes on with a flow that another Machine with the same configuration,
// cache and clock has detached. When this one has a flow of that key already,
// the moved one is forgotten, and Adopt returns false.
func (m *Machine) Adopt(mv *Moved, now time.Duration) bool {
	m.now = max(m.now, now)
	f := mv.f
	if m.flows[f.key] != nil {
		m.wipe(f)
		return false
	}
	if t := m.tombs.byKey[f.key]; t != nil {
		m.tombs.remove(t)
	}
	m.flows[f.key] = f
	f.due = f.expires
	heap.Push(&m.timers, f)
	return true
}

// Knows reports whether the Machine has the flow k or remembers what became of
// it.
func (m *Machine) Knows(k packet.Key) bool {
	return m.flows[k] != nil || m.tombs.byKey[k] != nil
}
