//go:build !xdpdebug

package xdp

type owner uint8

const (
	ownerPool owner = iota
	ownerWorker
	ownerFill
	ownerTX
	ownerGone
)

// umemDebug is empty unless built with the tag xdpdebug, which checks the
// owner of every chunk.
type umemDebug struct{}

func (umemDebug) init(int)                  {}
func (umemDebug) move(uint64, owner, owner) {}
func (umemDebug) reset(uint64, owner)       {}
