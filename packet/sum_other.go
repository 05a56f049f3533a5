//go:build !amd64

package packet

const (
	vectorMin = 0
	hasVector = false
)

func sumVector(*byte, int) uint64 { panic("packet: no vectors on this architecture") }
