package fastpath

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

func TestRing(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var r ring[int]
	var p ringPool[int]
	var model []int
	for i := range 100_000 {
		if rng.IntN(1000) < 510-i/1000 || len(model) == 0 {
			*r.push(&p) = i
			model = append(model, i)
		} else {
			r.pop(&p)
			model = model[1:]
		}
		if r.len() != len(model) {
			t.Fatalf("step %d: length %d, want %d", i, r.len(), len(model))
		}
		if len(model) > 0 {
			k := rng.IntN(len(model))
			if *r.at(k) != model[k] || *r.at(0) != model[0] || *r.at(len(model) - 1) != model[len(model)-1] {
				t.Fatalf("step %d: other elements", i)
			}
		}
	}
	r.clear(&p)
	if r.len() != 0 {
		t.Error("not empty after clear")
	}
}

// The table is held against a map, with keys that collide because they are
// many for its size and are removed and put back.
func TestTable(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	tab := newTable()
	model := map[packet.Key]*flow{}
	key := func() packet.Key {
		n := rng.IntN(6000)
		return packet.Key{LPort: uint16(n), Local: [16]byte{15: byte(n % 7)}}
	}
	for i := range 200_000 {
		k := key()
		f := tab.find(&k)
		if f != model[k] {
			t.Fatalf("step %d: found %v, want %v", i, f, model[k])
		}
		grow := i%40_000 < 25_000
		switch {
		case f == nil && (grow || rng.IntN(4) == 0):
			f = &flow{key: k}
			tab.insert(f)
			model[k] = f
		case f != nil && (!grow || rng.IntN(4) == 0):
			tab.remove(f)
			delete(model, k)
		}
		if tab.n != len(model) {
			t.Fatalf("step %d: %d flows, want %d", i, tab.n, len(model))
		}
	}
	n := 0
	tab.each(func(f *flow) {
		n++
		if model[f.key] != f {
			t.Error("each shows a flow that is not there")
		}
	})
	if n != len(model) {
		t.Errorf("each shows %d flows of %d", n, len(model))
	}
	tab.remove(&flow{key: packet.Key{VLAN: 9}})
	if tab.n != len(model) {
		t.Error("removing a stranger changes the count")
	}
}

// While a table grows every flow is found once, and can be removed.
func TestTableGrows(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	tab := newTable()
	var fs []*flow
	grown := 0
	for n := range 20_000 {
		f := &flow{key: packet.Key{LPort: uint16(n)}}
		tab.insert(f)
		fs = append(fs, f)
		if tab.old == nil {
			continue
		}
		grown++
		k := rng.IntN(len(fs))
		g := fs[k]
		tab.remove(g)
		if tab.find(&g.key) != nil {
			t.Fatalf("flow %d was removed and is found", n)
		}
		fs[k] = fs[len(fs)-1]
		fs = fs[:len(fs)-1]
		seen := 0
		tab.each(func(*flow) { seen++ })
		if seen != len(fs) || tab.n != len(fs) {
			t.Fatalf("%d flows are shown and %d counted of %d", seen, tab.n, len(fs))
		}
		for range 100 {
			if g := fs[rng.IntN(len(fs))]; tab.find(&g.key) != g {
				t.Fatalf("flow %d is not found", g.key.LPort)
			}
		}
	}
	if grown == 0 {
		t.Error("the table never grew by steps")
	}
}

// Keys whose hashes fall together at the table's end wrap around.
func TestTableWraps(t *testing.T) {
	tab := newTable()
	var fs []*flow
	for n := 0; len(fs) < 12; n++ {
		f := &flow{key: packet.Key{LPort: uint16(n), VLAN: uint16(n >> 16)}}
		if h := slotHash(&f.key) & 1023; h >= 1020 || h == 0 {
			fs = append(fs, f)
			tab.insert(f)
		}
	}
	for i, f := range fs {
		tab.remove(f)
		for j, g := range fs {
			if want := j > i; (tab.find(&g.key) == g) != want {
				t.Fatalf("after removing %d: flow %d there %v", i, j, !want)
			}
		}
	}
}

// Timers are held against the times that each flow should fire at.
func TestTimers(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	e := &Engine{tab: newTable(), buf: &buffers{}}
	var h timerHeap
	fs := make([]*flow, 200)
	for i := range fs {
		fs[i] = &flow{heapIx: -1}
	}
	for i := range 50_000 {
		f := fs[rng.IntN(len(fs))]
		switch rng.IntN(5) {
		case 0, 1, 2:
			e.arm(f, rng.IntN(numTimers), time.Duration(1+rng.IntN(1000)))
		case 3:
			f.disarm(rng.IntN(numTimers))
		case 4:
			e.timers.remove(f)
			f.timers = [numTimers]time.Duration{}
		}
		// Every armed timer is covered by its flow's entry, and the heap's
		// root is the least of all entries.
		h = e.timers
		least := time.Duration(1 << 62)
		n := 0
		for _, g := range fs {
			if g.heapIx >= 0 {
				n++
				if h.h[g.heapIx].f != g || h.h[g.heapIx].at != g.heapAt {
					t.Fatalf("step %d: a flow's place in the heap is wrong", i)
				}
				least = min(least, g.heapAt)
			}
			for _, at := range g.timers {
				if at != 0 && (g.heapIx < 0 || g.heapAt > at) {
					t.Fatalf("step %d: timer at %v would fire at %v", i, at, g.heapAt)
				}
			}
		}
		if n != len(h.h) {
			t.Fatalf("step %d: %d entries for %d flows", i, len(h.h), n)
		}
		if d, ok := e.Deadline(); ok != (n > 0) || ok && d != least {
			t.Fatalf("step %d: deadline %v %v, want %v", i, d, ok, least)
		}
	}
}

// Holds, slabs and budget are held against what the test was given.
func TestBuffers(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: 64, ChunkSize: 2048})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	const budget = 40 * slabSize
	b := newBuffers(u, budget)
	type piece struct {
		mem  []byte
		r    ref
		off  uint32
		mark byte
		addr uint64
	}
	var live []piece
	var cur [3]uint32
	failed := 0
	for i := range 100_000 {
		switch k := rng.IntN(8); {
		case k < 3 && i%20_000 < 15_000:
			n := 1 + rng.IntN(3000)
			if rng.IntN(20) == 0 {
				n = slabSize - 5 + rng.IntN(10)
			}
			if rng.IntN(30) == 0 {
				n = bigSize - rng.IntN(3)
			}
			c := &cur[rng.IntN(len(cur))]
			mem, r, off, ok := b.alloc(n, c, rng.IntN(2) == 0)
			if !ok {
				failed++
				if b.used+slabSize <= budget && n <= slabSize {
					t.Fatalf("step %d: refused %d bytes with %d of %d in use", i, n, b.used, budget)
				}
				break
			}
			if len(mem) != n || cap(mem) != n {
				t.Fatalf("step %d: %d bytes with capacity %d for %d", i, len(mem), cap(mem), n)
			}
			p := piece{mem: mem, r: r, off: off, mark: byte(i)}
			for j := range mem {
				mem[j] = p.mark
			}
			live = append(live, p)
		case k == 3:
			if addr, ok := u.Alloc(); ok {
				p := piece{r: b.hold(addr + 300), off: 300, mark: byte(i), addr: addr}
				p.mem = u.Bytes(addr+300, 100)
				for j := range p.mem {
					p.mem[j] = p.mark
				}
				live = append(live, p)
				if rng.IntN(2) == 0 {
					live = append(live, piece{mem: p.mem, r: b.hold(addr), off: 300, mark: p.mark})
				}
			}
		case k == 4:
			b.leave(&cur[rng.IntN(len(cur))])
		case len(live) > 0:
			j := rng.IntN(len(live))
			p := live[j]
			got := b.bytes(p.r, p.off, len(p.mem))
			for x := range got {
				if got[x] != p.mark {
					t.Fatalf("step %d: byte %d of a live piece was overwritten", i, x)
				}
			}
			b.release(p.r)
			live[j] = live[len(live)-1]
			live = live[:len(live)-1]
		}
		if b.used > budget || b.held < 0 || u.Available()+b.held != u.Chunks() {
			t.Fatalf("step %d: %d of %d bytes, %d chunks held, %d free", i, b.used, budget, b.held, u.Available())
		}
	}
	if failed == 0 {
		t.Error("the budget was never used up")
	}
	for _, p := range live {
		b.release(p.r)
	}
	for i := range cur {
		b.leave(&cur[i])
	}
	if b.used != 0 || b.held != 0 || u.Available() != u.Chunks() {
		t.Errorf("in the end %d bytes and %d chunks", b.used, b.held)
	}
	if b.bytes(ref{}, 0, 5) != nil {
		t.Error("bytes of no reference")
	}
}

// Sequence numbers extend to the nearest offset, across every wrap (T11).
func TestOffsets(t *testing.T) {
	for _, isn := range []uint32{0, 1, 0x7fffffff, 0x80000000, 0xffffffff} {
		for _, near := range []uint64{0, 1, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<40 + 12345} {
			for _, d := range []int64{0, 1, -1, 1000, -1000, 1<<31 - 1, -(1 << 31)} {
				o := int64(near) + d
				if o < 0 {
					continue
				}
				if got := offOf(isn, seqOf(isn, uint64(o)), near); got != o {
					t.Errorf("isn %#x, offset %d near %d: %d", isn, o, near, got)
				}
			}
		}
	}
	if o := offOf(5, 5, 0); o != -1 {
		t.Errorf("the SYN is at %d", o)
	}
}

// The map between the streams is a tiling: floor and ceiling agree with it at
// every byte (T3).
func TestMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	for range 50 {
		f := &flow{}
		type byteOf struct{ s, e uint64 } // image of an inner byte
		var images []byteOf
		var pend uint64
		first := true
		for range 30 {
			n, hdr := rng.IntN(5), uint8(4)
			if rng.IntN(5) == 0 {
				hdr = 6
			}
			total := uint32(int(hdr) + n + 16)
			r := rec{o: f.sealO, i: f.sealI, oLen: total, iLen: uint32(n), hdr: hdr}
			if n == 0 && rng.IntN(2) == 0 {
				r.hdr = 0
			}
			*f.recs.push(nil) = r
			for k := range n {
				im := byteOf{f.sealO + uint64(hdr) + uint64(k), f.sealO + uint64(hdr) + uint64(k) + 1}
				if k == 0 {
					im.s = f.sealO
					if !first {
						im.s = min(im.s, pend)
					}
				}
				if k == n-1 {
					im.e = f.sealO + uint64(total)
				}
				images = append(images, im)
			}
			f.sealO += uint64(total)
			f.sealI += uint64(n)
			if n > 0 {
				pend = f.sealO
			}
			first = false
		}
		name := func(o uint64) string { return fmt.Sprintf("outer %d of %d", o, f.sealO) }
		for o := uint64(0); o <= f.sealO; o++ {
			// Floor: inner bytes whose whole image lies below o.
			want := uint64(0)
			for want < uint64(len(images)) && images[want].e <= o {
				want++
			}
			if got := f.floorI(o); got != want && o < f.sealO {
				t.Fatalf("%s: floor %d, want %d", name(o), got, want)
			}
			// Ceiling: inner bytes whose whole image lies at o or above.
			want = uint64(len(images))
			for want > 0 && images[want-1].s >= o {
				want--
			}
			// Inside control bytes at the very end there is no such byte.
			if got := min(f.ceilI(o), f.sealI); got != want {
				t.Fatalf("%s: ceiling %d, want %d", name(o), got, want)
			}
		}
		for a := range images {
			for b := a + 1; b <= len(images); b++ {
				s, e := f.image(uint64(a), uint64(b))
				if s != images[a].s || e != images[b-1].e {
					t.Fatalf("image of [%d,%d) is [%d,%d), want [%d,%d)", a, b, s, e, images[a].s, images[b-1].e)
				}
			}
		}
	}
}

// A pool of queues' storage counts what there is, keeps it while about so much is
// in use in turn, and lets it go after.
func TestRingPool(t *testing.T) {
	const n, elements = 10_000, 100 // storage of 128 elements each
	var bytes int
	p := ringPool[uint64]{bytes: &bytes}
	rings := make([]ring[uint64], n)
	fill := func(k int) {
		for i := range rings[:k] {
			for range elements {
				*rings[i].push(&p) = uint64(i)
			}
		}
	}
	empty := func(k int) {
		for i := range rings[:k] {
			for range elements {
				rings[i].pop(&p)
			}
		}
	}
	fill(n)
	peak := bytes
	if peak < n*elements*8 {
		t.Errorf("%d bytes are counted for %d rings of %d elements", peak, n, elements)
	}
	empty(n)
	p.trim(false)
	if bytes != peak {
		t.Errorf("%d bytes of %d are left right after all were in use", bytes, peak)
	}
	if allocs := testing.AllocsPerRun(20, func() { fill(n); empty(n); p.trim(false) }); allocs != 0 {
		t.Errorf("%v allocations though storage was there", allocs)
	}
	fill(n / 10)
	p.trim(false) // nothing more was in use than now
	p.trim(false)
	if bytes > peak/2 || bytes < peak/10 {
		t.Errorf("%d bytes of %d are left with a tenth in use", bytes, peak)
	}
	for i := range rings[:n/10] {
		for k := range elements {
			if *rings[i].at(k) != uint64(i) {
				t.Fatalf("ring %d holds %d", i, *rings[i].at(k))
			}
		}
	}
	empty(n / 10)
	p.trim(false)
	p.trim(false)
	spare := 0
	for c := range ringClasses {
		spare += ringSpare * ringMin << c * 8
	}
	if bytes > min(spare, peak/10) {
		t.Errorf("%d bytes of %d are left with nothing in use", bytes, peak)
	}
	// Where memory is short nothing is.
	fill(1)
	lent := len(rings[0].b) * 8
	p.trim(true)
	if bytes != lent {
		t.Errorf("%d bytes are left for want of memory, %d are in use", bytes, lent)
	}
	empty(1)
	p.trim(true)
	if bytes != 0 {
		t.Errorf("%d bytes are left for want of memory, and nothing is in use", bytes)
	}
	// The largest storage is not kept.
	var large ring[uint64]
	before := bytes
	for range ringMin << ringClasses {
		large.push(&p)
	}
	held := bytes - before
	large.clear(&p)
	if held < ringMin<<ringClasses*8 || bytes-before > held {
		t.Errorf("%d bytes were counted for a large ring, %d after", held, bytes-before)
	}
}

// What queues are lent counts against an engine's memory, and comes back.
func TestRingBudget(t *testing.T) {
	b := newBulk(t, 32)
	e := b.r.e
	b.send()
	b.receive()
	if e.buf.rings == 0 || e.buf.room() != e.buf.budget-e.buf.used-e.buf.rings {
		t.Errorf("%d bytes of queues, %d of slabs, %d left of %d", e.buf.rings, e.buf.used, e.buf.room(), e.buf.budget)
	}
	storages := make([][]rec, 50_000)
	for i := range storages {
		storages[i] = e.recs.take(ringMin)
	}
	if e.buf.rings <= trimFloor {
		t.Fatalf("%d bytes of queues", e.buf.rings)
	}
	budget := e.buf.budget
	e.buf.budget = e.buf.rings + e.buf.used
	var cur uint32
	if _, _, _, ok := e.buf.alloc(100, &cur, false); ok || !e.Pressed() {
		t.Error("memory that queues have was handed out once more")
	}
	e.buf.budget = budget
	for _, s := range storages {
		e.recs.give(s)
	}
	for range 3 {
		at, ok := e.Deadline()
		if !ok || at > b.r.now+trimInterval {
			t.Fatalf("the engine wants to wake up at %v, now is %v", at, b.r.now)
		}
		b.r.now = max(b.r.now, at)
		e.Tick(b.r.now)
		b.drop()
		if e.buf.rings <= trimFloor {
			break
		}
	}
	if e.buf.rings > trimFloor {
		t.Errorf("%d bytes of queues are left with one flow", e.buf.rings)
	}
}
