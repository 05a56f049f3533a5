package fastpath

// This file uses unsafe for addresses to prefetch.

import (
	"unsafe"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// table finds flows by key: open addressing, linear probing, deletion by
// shifting back. It grows by moving some slots with each insertion, so that no
// packet waits for all of them. Only its worker touches it.
type table struct {
	slots []slot // length a power of two
	old   []slot // while the table grows: what it is moved from; nil otherwise
	moved int    // slots of old that were moved
	n     int
}

type slot struct {
	hash uint64 // slotEmpty, slotGone, or a flow's
	f    *flow
}

// What a slot without a flow has for a hash. A flow's has its highest bit set.
const (
	slotEmpty = 0
	slotGone  = 1 // in table.old only: look-ups go on behind it
)

// moveStep is the number of slots moved with an insertion: enough for the move to
// end long before the table must grow again.
const moveStep = 32

// hash returns the hash of a key, never 0.
func (t *table) hash(k *packet.Key) uint64 { return slotHash(k) }

// prefetch has the cache fetch the slot where a look-up begins.
func (t *table) prefetch(h uint64) {
	prefetch(unsafe.Pointer(&t.slots[h&uint64(len(t.slots)-1)]), 1)
}

// guess returns the flow that probably has a key with that hash, or nil. It
// does not look at the flow.
func (t *table) guess(h uint64) *flow {
	f := guess(t.slots, h)
	if f == nil && t.old != nil {
		f = guess(t.old, h)
	}
	return f
}

func guess(slots []slot, h uint64) *flow {
	m := uint64(len(slots) - 1)
	for i := h & m; ; i = (i + 1) & m {
		s := &slots[i]
		if s.hash == h || s.hash == slotEmpty {
			return s.f
		}
	}
}

func newTable() *table { return &table{slots: make([]slot, 1024)} }

func slotHash(k *packet.Key) uint64 { return k.Hash() | 1<<63 }

func (t *table) find(k *packet.Key) *flow { return t.findHash(k, slotHash(k)) }

// findHash is find with the key's hash.
func (t *table) findHash(k *packet.Key, h uint64) *flow {
	f := find(t.slots, k, h)
	if f == nil && t.old != nil {
		f = find(t.old, k, h)
	}
	return f
}

func find(slots []slot, k *packet.Key, h uint64) *flow {
	m := uint64(len(slots) - 1)
	for i := h & m; ; i = (i + 1) & m {
		s := &slots[i]
		if s.hash == slotEmpty {
			return nil
		}
		if s.hash == h && s.f.key == *k {
			return s.f
		}
	}
}

func (t *table) insert(f *flow) {
	if t.n*2 >= len(t.slots) && t.old == nil {
		t.old, t.moved = t.slots, 0
		t.slots = make([]slot, 2*len(t.old))
	}
	if t.old != nil {
		t.move()
	}
	t.n++
	t.place(slot{slotHash(&f.key), f})
}

// move moves some slots of a growing table.
func (t *table) move() {
	end := min(t.moved+moveStep, len(t.old))
	for i := t.moved; i < end; i++ {
		s := &t.old[i]
		if s.f != nil {
			t.place(*s)
			*s = slot{hash: slotGone}
		}
	}
	t.moved = end
	if end == len(t.old) {
		t.old = nil
	}
}

func (t *table) place(s slot) {
	m := uint64(len(t.slots) - 1)
	i := s.hash & m
	for t.slots[i].hash != slotEmpty {
		i = (i + 1) & m
	}
	t.slots[i] = s
}

// index returns where slots have f, whose key has the hash h, or -1.
func index(slots []slot, f *flow, h uint64) int {
	m := uint64(len(slots) - 1)
	for i := h & m; slots[i].hash != slotEmpty; i = (i + 1) & m {
		if slots[i].f == f {
			return int(i)
		}
	}
	return -1
}

func (t *table) remove(f *flow) {
	h := slotHash(&f.key)
	k := index(t.slots, f, h)
	if k < 0 && t.old != nil {
		if k = index(t.old, f, h); k >= 0 {
			t.old[k] = slot{hash: slotGone}
			t.n--
		}
		return
	}
	if k < 0 {
		return
	}
	t.n--
	m, i := uint64(len(t.slots)-1), uint64(k)
	for {
		t.slots[i] = slot{}
		j := i
		for {
			j = (j + 1) & m
			s := t.slots[j]
			if s.hash == slotEmpty {
				return
			}
			// s may fill the hole unless its home lies between hole and s.
			if (j-s.hash&m)&m >= (j-i)&m {
				t.slots[i] = s
				i = j
				break
			}
		}
	}
}

// size returns the number of slots.
func (t *table) size() int { return len(t.slots) + len(t.old) }

// at returns the flow in slot i, which counts on from the first slot again behind
// the last one, or nil.
func (t *table) at(i int) *flow {
	if i %= t.size(); i < len(t.slots) {
		return t.slots[i].f
	}
	return t.old[i-len(t.slots)].f
}

// each calls fn for every flow; fn must not change the table.
func (t *table) each(fn func(*flow)) {
	for _, slots := range [...][]slot{t.slots, t.old} {
		for i := range slots {
			if slots[i].f != nil {
				fn(slots[i].f)
			}
		}
	}
}
