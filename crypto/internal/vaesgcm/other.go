//go:build !amd64

package vaesgcm

// Supported reports whether this machine has what a form needs.
func Supported(Form) bool { return false }

const noCode = "vaesgcm: not on this architecture"

func expand128(_, _ *byte, _ uint64)                 { panic(noCode) }
func expand256(_, _ *byte, _ uint64)                 { panic(noCode) }
func fetch(_ *byte)                                  { panic(noCode) }
func ghash(_ *byte, _ *[2]uint64, _ *byte, _ uint64) { panic(noCode) }

func seal128Wide(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64)   { panic(noCode) }
func seal256Wide(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64)   { panic(noCode) }
func seal128Narrow(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64) { panic(noCode) }
func seal256Narrow(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64) { panic(noCode) }

func open128Wide(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64) uint64   { panic(noCode) }
func open256Wide(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64) uint64   { panic(noCode) }
func open128Narrow(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64) uint64 { panic(noCode) }
func open256Narrow(_ *byte, _, _, _, _, _ uint64, _, _ *byte, _ uint64) uint64 { panic(noCode) }
