//go:build xdpdebug

package xdp

import (
	"fmt"
	"strings"
	"testing"
)

func TestOwnerPanics(t *testing.T) {
	u, err := NewUmem(UmemConfig{Chunks: 2, ChunkSize: 2048})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	addr, _ := u.Alloc()
	for range 2 * historyLen {
		u.Free(addr)
		addr, _ = u.Alloc()
	}
	u.Free(addr)
	defer func() {
		p := fmt.Sprint(recover())
		for _, want := range []string{"moves from worker to pool, but pool has it", "transfer 33: worker -> pool", "TestOwnerPanics"} {
			if !strings.Contains(p, want) {
				t.Errorf("panic does not say %q:\n%s", want, p)
			}
		}
	}()
	u.Free(addr)
}
