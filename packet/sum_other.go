//go:build !amd64

package packet

const (
	vectorMin = 0
	hasVector = false
	hasWide   = false
)

const noVector = "packet: no vectors on this architecture"

func sumVector(*byte, int) uint64            { panic(noVector) }
func copySumVector(_, _ *byte, _ int) uint64 { panic(noVector) }
func sumWide(*byte, int) uint64              { panic(noVector) }
func copySumWide(_, _ *byte, _ int) uint64   { panic(noVector) }
