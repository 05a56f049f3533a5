package packet

import (
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
