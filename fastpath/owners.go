package fastpath

import (
	"hash/maphash"
	"sync"
	"sync/atomic"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// maxWorkers bounds the workers of a host: an owner has to fit an entry of the
// owners, and each worker has one bit in another's pending word.
const maxWorkers = 64

// owners tells which worker has a flow, half-open, live, or ended and still
// remembered. It is consulted only for packets of flows that a worker does not
// have itself. find takes no lock; the other methods do, and belong to
// the slow path.
//
// An entry is a keyed hash of the flow's key of 64 bits, of which the shard's
// number takes the lowest eight. A collision makes one flow fail and is not to
// be had by an attacker, who does not know the seed.
type owners struct {
	seed   maphash.Seed
	shards [1 << ownerBits]ownerShard
}

const ownerBits = 8

// ownerShard is a hash table with linear probing. Deletion shifts back, so a
// reader may miss an entry that is being moved, but finds no wrong one.
type ownerShard struct {
	mu    sync.Mutex
	slots atomic.Pointer[[]atomic.Uint64] // length a power of two; the lowest byte is the owner plus one, 0: empty
	n     int
	_     [40]byte // a cache line each
}

func newOwners() *owners {
	o := &owners{seed: maphash.MakeSeed()}
	for i := range o.shards {
		s := make([]atomic.Uint64, 16)
		o.shards[i].slots.Store(&s)
	}
	return o
}

func (o *owners) hash(k *packet.Key) uint64 { return maphash.Comparable(o.seed, *k) }

// at returns the shard of a hash, and the hash without the part that it stands
// for.
func (o *owners) at(h uint64) (*ownerShard, uint64) {
	return &o.shards[h&(1<<ownerBits-1)], h &^ (1<<ownerBits - 1)
}

// find returns the worker that has a flow, or -1. It may miss a flow that is
// there, while another one goes.
func (o *owners) find(k *packet.Key) int {
	s, tag := o.at(o.hash(k))
	_, w := s.look(tag)
	return w
}

// look returns the slot of a tag and its owner, or the first empty slot that it
// would take, and -1.
func (s *ownerShard) look(tag uint64) (slot, owner int) {
	slots := *s.slots.Load()
	m := len(slots) - 1
	for i := home(tag, m); ; i = (i + 1) & m {
		e := slots[i].Load()
		switch {
		case e == 0:
			return i, -1
		case e&^0xff == tag:
			return i, int(e&0xff) - 1
		}
	}
}

func home(tag uint64, mask int) int { return int(tag>>ownerBits) & mask }

// claim makes a worker the owner of a flow that has none, and returns the owner.
func (o *owners) claim(k *packet.Key, worker int) int {
	s, tag := o.at(o.hash(k))
	s.mu.Lock()
	defer s.mu.Unlock()
	i, owner := s.look(tag)
	if owner >= 0 {
		return owner
	}
	slots := *s.slots.Load()
	if 2*(s.n+1) > len(slots) {
		s.grow(slots)
		slots = *s.slots.Load()
		i, _ = s.look(tag)
	}
	slots[i].Store(tag | uint64(worker+1))
	s.n++
	return worker
}

func (s *ownerShard) grow(old []atomic.Uint64) {
	slots := make([]atomic.Uint64, 2*len(old))
	m := len(slots) - 1
	for j := range old {
		e := old[j].Load()
		if e == 0 {
			continue
		}
		i := home(e, m)
		for slots[i].Load() != 0 {
			i = (i + 1) & m
		}
		slots[i].Store(e)
	}
	s.slots.Store(&slots)
}

// owner returns the worker that has a flow, or -1.
func (o *owners) owner(k *packet.Key) int {
	s, tag := o.at(o.hash(k))
	s.mu.Lock()
	defer s.mu.Unlock()
	_, w := s.look(tag)
	return w
}

// move makes another worker the owner of a flow.
func (o *owners) move(k *packet.Key, worker int) {
	s, tag := o.at(o.hash(k))
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, w := s.look(tag); w >= 0 {
		(*s.slots.Load())[i].Store(tag | uint64(worker+1))
	}
}

// release forgets a flow that the given worker has.
func (o *owners) release(k *packet.Key, worker int) {
	s, tag := o.at(o.hash(k))
	s.mu.Lock()
	defer s.mu.Unlock()
	i, w := s.look(tag)
	if w != worker {
		return
	}
	slots := *s.slots.Load()
	m := len(slots) - 1
	s.n--
	for j := (i + 1) & m; ; j = (j + 1) & m {
		e := slots[j].Load()
		if e == 0 {
			break
		}
		// e may fill the hole unless its home lies between hole and e.
		if (j-home(e, m))&m >= (j-i)&m {
			slots[i].Store(e)
			i = j
		}
	}
	slots[i].Store(0)
}

// len returns the number of flows that have an owner.
func (o *owners) len() (n int) {
	for i := range o.shards {
		s := &o.shards[i]
		s.mu.Lock()
		n += s.n
		s.mu.Unlock()
	}
	return n
}
