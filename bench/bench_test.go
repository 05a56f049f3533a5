package bench

import (
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// The pipeline's fast path does not allocate per packet, in either direction.
func TestPipeline(t *testing.T) {
	rows, err := Pipeline(PipelineOptions{Payloads: []int{1440, MaxPayload, IMIX}, Flows: []int{1, 64}, Bursts: []int{1, 16}, Workers: []int{1}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		t.Logf("%+v", r)
		if r.Allocs > 0.01 {
			t.Errorf("%s of %d bytes in %d flows: %.3f allocations per packet", r.Direction, r.Payload, r.Flows, r.Allocs)
		}
	}
}

// Nor does it with so many flows that each has its turn only now and then, in any
// part of the loop.
func TestPipelineManyFlows(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 100000 sessions")
	}
	for _, burst := range []int{1, 16} {
		p, err := newPipe(100_000, []int{1440}, burst)
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		for range 100 { // the first grow what all flows share
			if _, _, _, err := p.round(); err != nil {
				t.Fatal(err)
			}
		}
		packets := 0
		allocs := testing.AllocsPerRun(100, func() {
			_, _, n, e := p.round()
			if e != nil {
				err = e
			}
			packets = n
		})
		if err != nil {
			t.Fatal(err)
		}
		if allocs != 0 {
			t.Errorf("bursts of %d: a vector of %d packets allocates %v times", burst, packets, allocs)
		}
	}
}

// Every engine has a row for every size, and no operation of the hot path
// allocates.
func TestMicro(t *testing.T) {
	engines, was := crypto.Engines(), crypto.EngineName()
	rows, err := Micro(MicroOptions{Keys: []int{1, 70}, Time: time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	seals := map[string]int{}
	for _, r := range rows {
		if r.NsPer <= 0 {
			t.Errorf("%+v", r)
		}
		if r.Engine != "" && r.Bytes > 0 || r.Name == "checksum" {
			if r.Allocs > 0 {
				t.Errorf("%s of %d bytes, %s: %.1f allocations", r.Name, r.Bytes, r.Engine, r.Allocs)
			}
		}
		if r.Name == "seal-aes128gcm" {
			seals[r.Engine]++
		}
	}
	for _, e := range engines {
		if want := 2 * len(microSizes); seals[e] != want {
			t.Errorf("%d rows of %s, want %d", seals[e], e, want)
		}
	}
	if crypto.EngineName() != was {
		t.Errorf("afterwards %s is used", crypto.EngineName())
	}
}
