package bench

import "testing"

// The pipeline's fast path does not allocate per packet, in either direction.
func TestPipeline(t *testing.T) {
	rows, err := Pipeline([]int{1440}, []int{1, 16})
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
