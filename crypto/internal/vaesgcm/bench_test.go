package vaesgcm

import (
	"fmt"
	"testing"
)

// BenchmarkAEAD compares the forms with the standard library, AES-128, 3 bytes of
// additional data, in place.
func BenchmarkAEAD(b *testing.B) {
	for _, n := range []int{1, 64, 256, 1440, 4096, 16384} {
		key, buf, aad := make([]byte, 16), make([]byte, n+256)[67:], make([]byte, 3)
		var nonce [12]byte
		ref := std(key)
		b.Run(fmt.Sprintf("seal/std/%d", n), func(b *testing.B) {
			for b.Loop() {
				ref.Seal(buf[:0], nonce[:], buf[:n], aad)
			}
		})
		b.Run(fmt.Sprintf("open/std/%d", n), func(b *testing.B) {
			for b.Loop() {
				_, _ = ref.Open(buf[:0], nonce[:], buf[:n+TagLen], aad)
			}
		})
		for form, name := range []string{"wide", "narrow"} {
			if !Supported(Form(form)) {
				continue
			}
			var k Key
			k.Init(Form(form), key)
			b.Run(fmt.Sprintf("seal/%s/%d", name, n), func(b *testing.B) {
				for b.Loop() {
					k.Seal(Nonce{}, ShortAAD(0, 3), buf[:n+TagLen], buf[:n])
				}
			})
			b.Run(fmt.Sprintf("open/%s/%d", name, n), func(b *testing.B) {
				k.Seal(Nonce{}, ShortAAD(0, 3), buf[:n+TagLen], buf[:n])
				for b.Loop() {
					k.Open(Nonce{}, ShortAAD(0, 3), buf[:n+TagLen])
				}
			})
		}
	}
}
