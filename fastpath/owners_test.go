package fastpath

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

func numbered(i int) (k packet.Key) {
	binary.BigEndian.PutUint64(k.Local[8:], uint64(i))
	return k
}

// The owners agree with a map over random operations.
func TestOwners(t *testing.T) {
	o, model := newOwners(), make(map[int]int)
	r := rand.New(rand.NewPCG(1, 2))
	for range 200000 {
		i, w := r.IntN(5000), r.IntN(maxWorkers)
		k := numbered(i)
		have, known := model[i]
		switch r.IntN(4) {
		case 0, 1:
			if !known {
				have = w
				model[i] = w
			}
			if got := o.claim(&k, w); got != have {
				t.Fatalf("claim gave it to %d, want %d", got, have)
			}
		case 2:
			o.release(&k, w)
			if known && have == w {
				delete(model, i)
			}
		case 3:
			o.move(&k, w)
			if known {
				model[i] = w
			}
		}
		want := -1
		if have, known := model[i]; known {
			want = have
		}
		if f, l := o.find(&k), o.owner(&k); f != want || l != want {
			t.Fatalf("found at %d and %d, want %d", f, l, want)
		}
	}
	if o.len() != len(model) {
		t.Errorf("%d entries, want %d", o.len(), len(model))
	}
	for i, w := range model {
		k := numbered(i)
		o.release(&k, w)
	}
	if o.len() != 0 {
		t.Errorf("%d entries are left", o.len())
	}
}

// While flows come and go, those that stay are found with their owner, or for a
// moment not at all.
func TestOwnersConcurrent(t *testing.T) {
	const stay, churn = 2000, 4000
	o := newOwners()
	for i := range stay {
		k := numbered(i)
		o.claim(&k, i%maxWorkers)
	}
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 3))
			for range 20000 {
				k := numbered(stay + r.IntN(churn))
				if o.claim(&k, g) == g {
					o.release(&k, g)
				}
			}
		})
	}
	for range 20 {
		for i := range stay {
			k := numbered(i)
			if w := o.find(&k); w != -1 && w != i%maxWorkers {
				t.Errorf("found at %d, want %d", w, i%maxWorkers)
			}
			if w := o.owner(&k); w != i%maxWorkers {
				t.Errorf("owner %d, want %d", w, i%maxWorkers)
			}
		}
	}
	wg.Wait()
	if o.len() != stay {
		t.Errorf("%d entries, want %d", o.len(), stay)
	}
}

func BenchmarkOwnersFind(b *testing.B) {
	o := newOwners()
	k := numbered(7)
	o.claim(&k, 1)
	b.ReportAllocs()
	for b.Loop() {
		o.find(&k)
	}
}
