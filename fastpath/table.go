package fastpath

// This file uses unsafe for addresses to prefetch.

import (
	"unsafe"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// table finds flows by key: open addressing, linear probing, deletion by
// shifting back. Only its worker touches it.
type table struct {
	slots []slot // length a power of two
	n     int
}

type slot struct {
	hash uint64 // 0: empty
	f    *flow
}

// hash returns the hash of a key, never 0.
func (t *table) hash(k *packet.Key) uint64 { return slotHash(k) }

// prefetch has the cache fetch the slot where a look-up begins.
func (t *table) prefetch(h uint64) {
	prefetch(unsafe.Pointer(&t.slots[h&uint64(len(t.slots)-1)]), 1)
}

// guess returns the flow that probably has a key with that hash, or nil. It
// does not look at the flow.
func (t *table) guess(h uint64) *flow {
	m := uint64(len(t.slots) - 1)
	for i := h & m; ; i = (i + 1) & m {
		s := &t.slots[i]
		if s.hash == h || s.hash == 0 {
			return s.f
		}
	}
}

func newTable() *table { return &table{slots: make([]slot, 1024)} }

func slotHash(k *packet.Key) uint64 { return k.Hash() | 1<<63 }

func (t *table) find(k *packet.Key) *flow { return t.findHash(k, slotHash(k)) }

// findHash is find with the key's hash.
func (t *table) findHash(k *packet.Key, h uint64) *flow {
	m := uint64(len(t.slots) - 1)
	for i := h & m; ; i = (i + 1) & m {
		s := &t.slots[i]
		if s.hash == 0 {
			return nil
		}
		if s.hash == h && s.f.key == *k {
			return s.f
		}
	}
}

func (t *table) insert(f *flow) {
	if t.n*2 >= len(t.slots) {
		old := t.slots
		t.slots = make([]slot, 2*len(old))
		for _, s := range old {
			if s.hash != 0 {
				t.place(s)
			}
		}
	}
	t.n++
	t.place(slot{slotHash(&f.key), f})
}

func (t *table) place(s slot) {
	m := uint64(len(t.slots) - 1)
	i := s.hash & m
	for t.slots[i].hash != 0 {
		i = (i + 1) & m
	}
	t.slots[i] = s
}

func (t *table) remove(f *flow) {
	m := uint64(len(t.slots) - 1)
	i := slotHash(&f.key) & m
	for t.slots[i].f != f {
		if t.slots[i].hash == 0 {
			return
		}
		i = (i + 1) & m
	}
	t.n--
	for {
		t.slots[i] = slot{}
		j := i
		for {
			j = (j + 1) & m
			s := t.slots[j]
			if s.hash == 0 {
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

// each calls fn for every flow; fn must not change the table.
func (t *table) each(fn func(*flow)) {
	for i := range t.slots {
		if t.slots[i].hash != 0 {
			fn(t.slots[i].f)
		}
	}
}
