package slowpath

import (
	"container/heap"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// timerHeap orders the half-open flows by the time at which each needs
// attention.
type timerHeap []*flow

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].due < h[j].due }
func (h timerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].slot, h[j].slot = i, j
}
func (h *timerHeap) Push(x any) {
	f := x.(*flow)
	f.slot = len(*h)
	*h = append(*h, f)
}
func (h *timerHeap) Pop() any {
	old := *h
	f := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return f
}

// schedule sets the flow's next timer event.
func (h *timerHeap) schedule(f *flow) {
	f.due = f.expires
	if f.rtoAt != 0 {
		f.due = min(f.due, f.rtoAt)
	}
	heap.Fix(h, f.slot)
}

// fate is what stragglers of a decided flow meet.
type fate uint8

const (
	fatePlain  fate = iota // passed on unmodified
	fateHanded             // given to the fast path
	fateDead               // answered by a reset; the flow is still diverted
)

// tomb remembers a decided flow for a while (T17).
type tomb struct {
	key            packet.Key
	fate           fate
	hasISS, hasIRS bool
	iss, irs       uint32
	unanswered     bool // copies of its SYN may follow for long
	born, expires  time.Duration
	prev, next     *tomb
}

// graveyard holds tombs, in one list for each of the two lifetimes.
type graveyard struct {
	byKey map[packet.Key]*tomb
	// Sentinels: next is the first to expire.
	answered, unanswered tomb
}

func (g *graveyard) init() {
	g.byKey = make(map[packet.Key]*tomb)
	for _, root := range []*tomb{&g.answered, &g.unanswered} {
		root.next, root.prev = root, root
	}
}

// first returns the tomb that expires next, nil when there is none.
func (g *graveyard) first() *tomb {
	a, u := g.answered.next, g.unanswered.next
	switch {
	case u != &g.unanswered && (a == &g.answered || u.expires < a.expires):
		return u
	case a != &g.answered:
		return a
	}
	return nil
}

// least returns the tomb that matters least.
func (g *graveyard) least() *tomb {
	if u := g.unanswered.next; u != &g.unanswered {
		return u
	}
	return g.first()
}

// add puts t behind all others of its list.
func (g *graveyard) add(t *tomb) {
	root := &g.answered
	if t.unanswered {
		root = &g.unanswered
	}
	g.byKey[t.key] = t
	t.prev, t.next = root.prev, root
	t.prev.next, t.next.prev = t, t
}

func (g *graveyard) remove(t *tomb) {
	delete(g.byKey, t.key)
	t.prev.next, t.next.prev = t.next, t.prev
}

// maxPeers bounds the memory of failing peers.
const maxPeers = 8192

// peer is a listening endpoint.
type peer struct {
	addr [16]byte
	port uint16
}

// peerMemory remembers endpoints that are not offered ENO for a while.
type peerMemory struct {
	known map[peer]standing
	order []peer // oldest first
}

// standing is what is held against an endpoint.
type standing struct {
	until   time.Duration // no offer before
	suspect time.Duration // an offer that comes to nothing before this is the second in a row
}

func (p *peerMemory) set(k *packet.Key, s standing) {
	e := peer{k.Remote, k.RPort}
	if _, known := p.known[e]; !known {
		if len(p.order) == maxPeers {
			delete(p.known, p.order[0])
			p.order = p.order[1:]
		}
		p.order = append(p.order, e)
	}
	p.known[e] = s
}

func (p *peerMemory) add(k *packet.Key, until time.Duration) { p.set(k, standing{until: until}) }

// suspect notes that only a SYN without ENO was answered. Once that may have been
// chance; when it happens again within the time of d, it is held against the
// endpoint for as long.
func (p *peerMemory) suspect(k *packet.Key, now, d time.Duration) {
	if now < p.known[peer{k.Remote, k.RPort}].suspect {
		p.add(k, now+d)
		return
	}
	p.set(k, standing{suspect: now + d})
}

// trust notes that an answer with ENO came.
func (p *peerMemory) trust(k *packet.Key) {
	if e := (peer{k.Remote, k.RPort}); p.known[e].suspect != 0 {
		p.known[e] = standing{}
	}
}

func (p *peerMemory) has(k *packet.Key, now time.Duration) bool {
	return now < p.known[peer{k.Remote, k.RPort}].until
}
