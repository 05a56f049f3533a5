package packet

import "testing"

// TestNarrowSums tests what CPUs without vectors of 64 bytes use.
func TestNarrowSums(t *testing.T) {
	if !hasWide {
		t.Skip("the other tests do that on this machine")
	}
	hasWide = false
	defer func() { hasWide = true }()
	t.Run("guard pages", TestSumGuardPages)
	t.Run("copy", TestCopySum)
}
