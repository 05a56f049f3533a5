//go:build !amd64

package packet

const (
	vectorMin = 0
	hasVector = false
)

func sumVector(*byte, int) uint64            { panic("packet: no vectors on this architecture") }
func copySumVector(_, _ *byte, _ int) uint64 { panic("packet: no vectors on this architecture") }
