package xdp

import (
	"os"
	"testing"
)

// needRoot skips what takes namespaces, devices and eBPF.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, devices and eBPF programs")
	}
}
