package xdp

import (
	"sync/atomic"
	"testing"
)

// kernelSide is the other end of a socket's rings, in the kernel's place.
type kernelSide struct {
	fillSeen, completionSeen, rxSeen, txSeen uint32
	s                                        *Socket
}

// fakeSocket makes a socket whose rings nobody but a kernelSide shares. All
// indices start at the given value.
func fakeSocket(u *Umem, size int, start uint32) (*Socket, *kernelSide) {
	s := &Socket{umem: u, fd: -1}
	for _, i := range []*indices{&s.fill.indices, &s.completion.indices, &s.rx.indices, &s.tx.indices} {
		*i = emptyRing()
		*i.producer, *i.consumer = start, start
	}
	mask := uint32(size - 1)
	s.fill.entries, s.fill.mask, s.fill.produced, s.fill.consumed = make([]uint64, size), mask, start, start
	s.completion.entries, s.completion.mask, s.completion.produced, s.completion.consumed = make([]uint64, size), mask, start, start
	s.rx.entries, s.rx.mask, s.rx.produced, s.rx.consumed = make([]Desc, size), mask, start, start
	s.tx.entries, s.tx.mask, s.tx.produced, s.tx.consumed = make([]Desc, size), mask, start, start
	if err := u.adopt(s); err != nil {
		panic(err)
	}
	return s, &kernelSide{start, start, start, start, s}
}

// receive fills up to n posted chunks with packets.
func (k *kernelSide) receive(n int, length uint32) int {
	s, done := k.s, 0
	for ; done < n && k.fillSeen != atomic.LoadUint32(s.fill.producer); done++ {
		if k.rxSeen-atomic.LoadUint32(s.rx.consumer) == uint32(len(s.rx.entries)) {
			break
		}
		s.rx.entries[k.rxSeen&s.rx.mask] = Desc{Addr: s.fill.entries[k.fillSeen&s.fill.mask] + Headroom, Len: length}
		k.fillSeen++
		k.rxSeen++
	}
	atomic.StoreUint32(s.fill.consumer, k.fillSeen)
	atomic.StoreUint32(s.rx.producer, k.rxSeen)
	return done
}

// transmit sends up to n packets.
func (k *kernelSide) transmit(n int) int {
	s, done := k.s, 0
	for ; done < n && k.txSeen != atomic.LoadUint32(s.tx.producer); done++ {
		if k.completionSeen-atomic.LoadUint32(s.completion.consumer) == uint32(len(s.completion.entries)) {
			break
		}
		s.completion.entries[k.completionSeen&s.completion.mask] = s.tx.entries[k.txSeen&s.tx.mask].Addr
		k.completionSeen++
		k.txSeen++
	}
	atomic.StoreUint32(s.tx.consumer, k.txSeen)
	atomic.StoreUint32(s.completion.producer, k.completionSeen)
	return done
}

// Every chunk goes round, in bursts of all lengths, over the wrap of the
// indices.
func TestRingsWrap(t *testing.T) {
	const size, chunks = 8, 20
	for start := uint32(1<<32 - 2*size); start != 2*size; start++ {
		u, err := NewUmem(UmemConfig{Chunks: chunks, ChunkSize: 2048})
		if err != nil {
			t.Fatal(err)
		}
		s, k := fakeSocket(u, size, start)
		s.config.Reserve = 4
		descs := make([]Desc, chunks)
		reaped := make([]uint64, 3)
		for round := range 6 * size {
			want := min(u.Available()-4, size-int(s.fill.produced-k.fillSeen))
			if n := s.Refill(); n != max(0, want) {
				t.Fatalf("start %d, round %d: filled %d, want %d", start, round, n, want)
			}
			burst := k.receive(1+round%(size+1), 60)
			n := s.Receive(descs[:5])
			if n != min(5, burst) {
				t.Fatalf("received %d of %d", n, burst)
			}
			n += s.Receive(descs[n:])
			if n != burst {
				t.Fatalf("received %d of %d", n, burst)
			}
			sent := s.Transmit(descs[:n])
			if free := size - s.Pending() + sent; sent != min(n, free) && sent != n {
				t.Fatalf("sent %d of %d with room for %d", sent, n, free)
			}
			for _, d := range descs[sent:n] {
				u.Free(d.Addr)
			}
			k.transmit(1 + round%3)
			if round%2 == 0 {
				for _, addr := range reaped[:s.Reap(reaped)] {
					u.Free(addr)
				}
			}
			s.Complete()
			if held := int(s.fill.produced-k.fillSeen) + s.Pending(); u.Available()+held != chunks {
				t.Fatalf("start %d, round %d: %d in the pool, %d in the rings", start, round, u.Available(), held)
			}
		}
	}
}

func BenchmarkRings(b *testing.B) {
	for _, batch := range []int{1, 16, 64} {
		b.Run(map[int]string{1: "batch=1", 16: "batch=16", 64: "batch=64"}[batch], func(b *testing.B) {
			u, err := NewUmem(UmemConfig{Chunks: 8192, ChunkSize: 2048, TXMetadata: true})
			if err != nil {
				b.Fatal(err)
			}
			defer u.Close()
			s, k := fakeSocket(u, 4096, 0)
			u.txMetadata, s.offload = true, true
			descs := make([]Desc, batch)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				s.Refill()
				k.receive(batch, 60)
				b.StartTimer()
				n := s.Receive(descs)
				s.Transmit(descs[:n])
				b.StopTimer()
				k.transmit(batch)
				b.StartTimer()
				s.Complete()
				s.Refill()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
			u.sockets[0] = nil
		})
	}
}
