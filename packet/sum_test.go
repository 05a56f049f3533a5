package packet

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSumGuardPages sums pieces of every length at both edges of memory that may
// be read, with and without vectors.
func TestSumGuardPages(t *testing.T) {
	page := unix.Getpagesize()
	m, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	for _, at := range []int{0, 2 * page} {
		if err := unix.Mprotect(m[at:at+page], unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	mem := m[page : 2*page]
	rng := rand.New(rand.NewPCG(3, 4))
	for n := range 2000 {
		for _, b := range [][]byte{mem[:n], mem[len(mem)-n:]} {
			for i := range b {
				b[i] = byte(rng.Uint32()) | byte(-(n & 1)) // all ones in every other round
			}
			for _, start := range []uint64{0, 0x1234, ^uint64(0)} {
				if got, want := Fold(Sum(b, start)), Fold(sumWords(b, start)); got != want {
					t.Fatalf("sum of %d bytes from %#x: %#x with vectors, %#x without", n, start, got, want)
				}
			}
		}
	}
}

// TestCopySum copies pieces between the edges of memory that may be touched.
func TestCopySum(t *testing.T) {
	page := unix.Getpagesize()
	m, err := unix.Mmap(-1, 0, 5*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	for _, at := range []int{0, 2 * page, 4 * page} {
		if err := unix.Mprotect(m[at:at+page], unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	from, to := m[page:2*page], m[3*page:4*page]
	rng := rand.New(rand.NewPCG(5, 6))
	for n := range 2000 {
		for _, at := range []int{0, page - n} {
			src, dst := from[page-n-at:][:n], to[at:][:n]
			for i := range src {
				src[i] = byte(rng.Uint32())
			}
			clear(to)
			if got, want := Fold(CopySum(dst, src, 7)), Fold(Sum(src, 7)); got != want {
				t.Fatalf("%d bytes: sum %#x, want %#x", n, got, want)
			}
			if !bytes.Equal(dst, src) {
				t.Fatalf("%d bytes are not copied", n)
			}
			if s := bytes.Count(to, []byte{0}) - bytes.Count(dst, []byte{0}); s != page-n {
				t.Fatalf("%d bytes: others were written", n)
			}
			// The same in three pieces at any offsets.
			a := rng.IntN(n + 1)
			b := a + rng.IntN(n+1-a)
			sum := uint64(0)
			for _, p := range [][2]int{{0, a}, {a, b}, {b, n}} {
				sum += uint64(Fold(SumAt(CopySum(dst[p[0]:], src[p[0]:p[1]], 0), p[0])))
			}
			if Fold(sum) != Fold(Sum(src, 0)) {
				t.Fatalf("%d bytes cut at %d and %d: sum %#x, want %#x", n, a, b, Fold(sum), Fold(Sum(src, 0)))
			}
		}
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint64(1))
	f.Add(make([]byte, 1481), ^uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, start uint64) {
		want := naiveSum(b)
		if got := Fold(Sum(b, 0)); got>>8|got<<8 != want && (got != 0xffff || want != 0) {
			t.Errorf("%#x, want %#x", got, want)
		}
		if Fold(Sum(b, start)) != Fold(sumWords(b, start)) {
			t.Error("vectors disagree")
		}
	})
}
