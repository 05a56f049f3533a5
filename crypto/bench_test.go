package crypto

import (
	"fmt"
	"testing"
)

// benchSizes are lengths of frame data in bytes.
var benchSizes = []int{1, 64, 1440, 65000}

func BenchmarkSeal(b *testing.B) {
	for _, aead := range AllAEADs {
		for _, size := range benchSizes {
			b.Run(fmt.Sprintf("%v/%d", aead, size), func(b *testing.B) {
				s, _ := testSessions(aead)
				k := s.SendKey(0)
				src := make([]byte, 1+size)
				dst := make([]byte, size+Overhead)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				offset := uint64(0)
				for b.Loop() {
					offset += uint64(k.Seal(dst, src, 0, offset))
				}
			})
		}
	}
}

// BenchmarkOpen copies the frame before each Open, which works in place.
func BenchmarkOpen(b *testing.B) {
	for _, aead := range AllAEADs {
		for _, size := range benchSizes {
			b.Run(fmt.Sprintf("%v/%d", aead, size), func(b *testing.B) {
				s, r := testSessions(aead)
				sealed := make([]byte, size+Overhead)
				s.SendKey(0).Seal(sealed, make([]byte, 1+size), 0, 9)
				k := r.RecvKey(0)
				frame := make([]byte, len(sealed))
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					copy(frame, sealed)
					if _, ok := k.Open(frame, 9); !ok {
						b.Fatal("does not open")
					}
				}
			})
		}
	}
}

// BenchmarkKeyAgreement is one host's share: its key and the shared secret.
func BenchmarkKeyAgreement(b *testing.B) {
	for _, tep := range AllTEPs {
		b.Run(tep.String(), func(b *testing.B) {
			peer, err := GenerateKey(tep, nil)
			if err != nil {
				b.Fatal(err)
			}
			wire := peer.Public(false)
			b.ReportAllocs()
			for b.Loop() {
				key, err := GenerateKey(tep, nil)
				if err != nil {
					b.Fatal(err)
				}
				key.Public(false)
				if _, _, err := key.Shared(wire); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkKeySchedule goes from ES to the session and its first two keys.
func BenchmarkKeySchedule(b *testing.B) {
	for _, aead := range AllAEADs {
		b.Run(aead.String(), func(b *testing.B) {
			transcript, init, es := make([]byte, 8), make([]byte, 100), make([]byte, 32)
			b.ReportAllocs()
			for b.Loop() {
				s := NewSession(RoleA, aead, byte(TEPX25519), transcript, init, init, es, es)
				s.SendKey(0)
				s.RecvKey(0)
			}
		})
	}
}
