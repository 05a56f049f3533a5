package fastpath

import (
	"slices"
	"testing"
	"time"
)

// A flood is shed at once, for longer each time that it is there again, and for
// the shortest time after two minutes of peace.
func TestShedder(t *testing.T) {
	var s shedder
	var set []bool
	put := func(on bool) error { set = append(set, on); return nil }
	now := time.Unix(1000, 0)
	var held []time.Duration
	flood := func() {
		t.Helper()
		begin := now
		for range 3 { // told again and again
			if err := s.crowded(now, put); err != nil {
				t.Fatal(err)
			}
		}
		for set = set[:1]; len(set) == 1; now = now.Add(100 * time.Millisecond) {
			if err := s.tick(now, put); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(set, []bool{true, false}) {
			t.Fatalf("set to %v", set)
		}
		set = nil
		held = append(held, now.Sub(begin)-100*time.Millisecond)
	}
	for range 6 {
		flood()
	}
	now = now.Add(floodEvery)
	flood()
	want := []time.Duration{8, 16, 32, 64, 64, 64, 8}
	for i := range want {
		want[i] *= time.Second
	}
	if !slices.Equal(held, want) {
		t.Errorf("shed for %v, want %v", held, want)
	}
}
