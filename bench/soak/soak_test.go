package main

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// A stream is the same however it is cut, and every wrong byte is found.
func TestStream(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	s := stream{id: 12345, back: true}
	whole := make([]byte, 10000)
	s.fill(whole, 0)
	scratch := make([]byte, len(whole))
	for range 1000 {
		off := rng.IntN(len(whole))
		part := bytes.Clone(whole[off : off+rng.IntN(len(whole)-off)])
		if err := s.check(part, scratch, int64(off)); err != nil {
			t.Fatal(err)
		}
		if len(part) == 0 {
			continue
		}
		part[rng.IntN(len(part))] ^= 1 << rng.IntN(8)
		if err := s.check(part, scratch, int64(off)); !errors.Is(err, errCorrupt) {
			t.Fatalf("a wrong byte was not found: %v", err)
		}
	}
	for _, other := range []stream{{12345, false}, {12346, true}} {
		if err := other.check(whole, scratch, 0); err == nil {
			t.Errorf("the streams of %+v and %+v are the same", s, other)
		}
	}
}

// A short soak, of the length that a test can take.
func TestSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("the daemons are for tests that are not short")
	}
	l, err := lab.New()
	if errors.Is(err, lab.ErrPrivilege) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	binary, err := daemon.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	if err := run(ctx, config{duration: 12 * time.Second, seed: 1, binary: binary, workers: 8, log: t.Logf}); err != nil {
		t.Error(err)
	}
}
