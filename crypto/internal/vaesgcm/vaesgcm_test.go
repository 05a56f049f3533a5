package vaesgcm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

var cases = flag.Int("cases", 60_000, "number of random cases that the engines are compared on")

// forms runs f for what this CPU supports; the standard library is what other
// CPUs use.
func forms(t *testing.T, f func(t *testing.T, form Form)) {
	for form, name := range map[Form]string{Wide: "Wide", Narrow: "Narrow"} {
		t.Run(name, func(t *testing.T) {
			if !Supported(form) {
				t.Skip("not supported by this CPU")
			}
			f(t, form)
		})
	}
}

func std(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return a
}

// check compares one message. buf is len(plain)+TagLen bytes; when apart is not
// nil the message is sealed from it.
func check(k *Key, ref cipher.AEAD, nonce *[12]byte, aad, plain, buf, apart []byte) error {
	want := ref.Seal(nil, nonce[:], plain, aad)
	copy(buf, plain)
	src := buf[:len(plain)]
	if apart != nil {
		copy(apart, plain)
		src = apart
		clear(buf)
	}
	n := NonceOf(nonce)
	k.Seal(n, k.AAD(aad), buf, src)
	if !bytes.Equal(buf, want) {
		return fmt.Errorf("sealed\n%x, want\n%x", buf, want)
	}
	if apart != nil && !bytes.Equal(apart, plain) {
		return fmt.Errorf("source changed")
	}
	if !k.Open(n, k.AAD(aad), buf) {
		return fmt.Errorf("does not open")
	}
	if !bytes.Equal(buf[:len(plain)], plain) {
		return fmt.Errorf("opened\n%x, want\n%x", buf[:len(plain)], plain)
	}
	if !bytes.Equal(buf[len(plain):], want[len(plain):]) {
		return fmt.Errorf("the tag was overwritten")
	}
	return nil
}

// forge flips one bit of a sealed message, or of its nonce or additional data.
func forge(k *Key, nonce [12]byte, aad, sealed []byte, bit int) error {
	total := 8 * (len(sealed) + len(nonce) + len(aad))
	bit %= total
	aad = bytes.Clone(aad)
	buf := bytes.Clone(sealed)
	for _, p := range [][]byte{buf, nonce[:], aad} {
		if bit < 8*len(p) {
			p[bit/8] ^= 1 << (bit % 8)
			break
		}
		bit -= 8 * len(p)
	}
	if k.Open(NonceOf(&nonce), k.AAD(aad), buf) {
		return fmt.Errorf("a forged message opens")
	}
	for i, b := range buf[:len(buf)-TagLen] {
		if b != 0 {
			return fmt.Errorf("byte %d of a forged message is left", i)
		}
	}
	return nil
}

func fill(r *rand.Rand, b []byte) {
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, r.Uint64())
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}

// TestRandom compares random messages with the standard library: -cases of them.
func TestRandom(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 1))
		var k Key
		var ref cipher.AEAD
		var nonce [12]byte
		mem := make([]byte, 3*70000)
		for i := range *cases {
			if i%16 == 0 {
				key := make([]byte, 16+16*(i/16%2))
				fill(r, key)
				k.Init(form, key)
				ref = std(key)
			}
			n := r.IntN(600)
			switch r.IntN(64) {
			case 0:
				n = r.IntN(65520)
			case 1, 2, 3, 4, 5, 6, 7:
				n = r.IntN(1600)
			}
			fill(r, nonce[:])
			aad := make([]byte, [...]int{3, 3, r.IntN(17), r.IntN(80)}[r.IntN(4)])
			fill(r, aad)
			plain := mem[:n]
			fill(r, plain)
			buf := mem[70000+r.IntN(64):][:n+TagLen]
			var apart []byte
			if r.IntN(2) == 0 {
				apart = mem[140000+r.IntN(64):][:n]
			}
			err := check(&k, ref, &nonce, aad, plain, buf, apart)
			if err == nil && i%4 == 0 {
				copy(buf, ref.Seal(nil, nonce[:], plain, aad))
				err = forge(&k, nonce, aad, buf, int(r.Uint32()>>1))
			}
			if err != nil {
				t.Fatalf("case %d, %d bytes, %d of additional data: %v", i, n, len(aad), err)
			}
		}
	})
}

// TestLengths takes every length of a packet and every alignment.
func TestLengths(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		r := rand.New(rand.NewPCG(1, 2))
		for _, size := range []int{16, 32} {
			key := make([]byte, size)
			fill(r, key)
			var k Key
			k.Init(form, key)
			ref := std(key)
			mem, plain := make([]byte, 2100), make([]byte, 2000)
			fill(r, plain)
			var nonce [12]byte
			fill(r, nonce[:])
			for n := range len(plain) {
				if err := check(&k, ref, &nonce, plain[:n%70], plain[:n], mem[n%64:][:n+TagLen], nil); err != nil {
					t.Fatalf("%d bytes: %v", n, err)
				}
			}
		}
	})
}

// TestGuardPages puts messages, additional data, keys and nonces at the edges of
// memory that may be touched.
func TestGuardPages(t *testing.T) {
	page := unix.Getpagesize()
	guarded := func(size int) []byte {
		size = (size + page - 1) / page * page
		m, err := unix.Mmap(-1, 0, size+2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(m) })
		for _, at := range []int{0, page + size} {
			if err := unix.Mprotect(m[at:at+page], unix.PROT_NONE); err != nil {
				t.Fatal(err)
			}
		}
		return m[page : page+size]
	}
	out, in, add := guarded(3000), guarded(3000), guarded(100)
	forms(t, func(t *testing.T, form Form) {
		r := rand.New(rand.NewPCG(3, 4))
		plain := make([]byte, 2200)
		fill(r, plain)
		var nonce [12]byte
		for _, size := range []int{16, 32} {
			key := make([]byte, size)
			fill(r, key)
			raw := guarded(size)
			copy(raw[len(raw)-size:], key)
			var k Key
			k.Init(form, raw[len(raw)-size:])
			ref := std(key)
			for n := range len(plain) {
				fill(r, nonce[:])
				aad := add[len(add)-n%90:]
				fill(r, aad)
				// Both ends of the message touch a forbidden page in turn, and
				// so does what it is sealed from.
				bufs := [][]byte{out[:n+TagLen], out[len(out)-n-TagLen:]}
				srcs := [][]byte{in[len(in)-n:], in[:n]}
				for i, buf := range bufs {
					if err := check(&k, ref, &nonce, aad, plain[:n], buf, nil); err != nil {
						t.Fatalf("%d bytes: %v", n, err)
					}
					if err := check(&k, ref, &nonce, add[:n%90], plain[:n], buf, srcs[i]); err != nil {
						t.Fatalf("%d bytes apart: %v", n, err)
					}
				}
			}
		}
	})
}

// TestNothingBeyond sees that the bytes around a message stay as they are.
func TestNothingBeyond(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		var k Key
		k.Init(form, make([]byte, 16))
		mem := make([]byte, 1024)
		for n := range 600 {
			for i := range mem {
				mem[i] = 0xa5
			}
			b := mem[128:][:n+TagLen]
			k.Seal(Nonce{}, k.AAD(nil), b, b[:n])
			k.Open(Nonce{}, k.AAD(nil), b)
			for i, v := range mem {
				if (i < 128 || i >= 128+len(b)) && v != 0xa5 {
					t.Fatalf("%d bytes: byte %d was written", n, i-128)
				}
			}
		}
	})
}

func TestErase(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		var k Key
		k.Init(form, []byte("0123456789abcdef0123456789abcdef"))
		if k == (Key{}) {
			t.Fatal("Init does nothing")
		}
		k.Erase()
		if k != (Key{}) {
			t.Error("something of the key is left")
		}
	})
}

func FuzzDifferential(f *testing.F) {
	f.Add([]byte("0123456789abcdef"), []byte("nonce......."), []byte{0, 1, 2}, []byte("a message"), uint(0))
	f.Add(make([]byte, 32), make([]byte, 12), make([]byte, 40), make([]byte, 300), uint(77))
	f.Fuzz(func(t *testing.T, key, nonce, aad, plain []byte, bit uint) {
		var raw [32]byte
		copy(raw[:], key)
		size := 16 + len(key)/17%2*16
		var n [12]byte
		copy(n[:], nonce)
		ref := std(raw[:size])
		for form := range Forms {
			if !Supported(form) {
				continue
			}
			var k Key
			k.Init(form, raw[:size])
			buf := make([]byte, len(plain)+TagLen)
			if err := check(&k, ref, &n, aad, plain, buf, nil); err != nil {
				t.Fatal(err)
			}
			if err := forge(&k, n, aad, ref.Seal(nil, n[:], plain, aad), int(bit>>1)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
