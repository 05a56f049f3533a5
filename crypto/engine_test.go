package crypto

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// TestMain runs the tests once for every AEAD engine that this machine has. With
// EngineEnv set, and for benchmarks and fuzzing, it is one engine.
func TestMain(m *testing.M) {
	flag.Parse()
	names := Engines()
	for _, f := range []string{"test.bench", "test.fuzz"} {
		if flag.Lookup(f).Value.String() != "" {
			names = names[:1]
		}
	}
	if env := os.Getenv(EngineEnv); env != "" {
		names = []string{env}
	}
	code := 0
	for _, name := range names {
		if err := SetEngine(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("AEAD engine", name)
		code = max(code, m.Run())
	}
	os.Exit(code)
}

func TestSetEngine(t *testing.T) {
	was := EngineName()
	defer func() {
		if err := SetEngine(was); err != nil {
			t.Error(err)
		}
	}()
	if names := Engines(); names[len(names)-1] != "std" {
		t.Errorf("engines %v", names)
	}
	for i := range engines {
		e := &engines[i]
		err := SetEngine(e.name)
		if e.available() != (err == nil) || err != nil && !errors.Is(err, ErrNoEngine) {
			t.Errorf("%s: %v", e.name, err)
		}
		if slices.Contains(Engines(), e.name) != e.available() {
			t.Errorf("%s in %v", e.name, Engines())
		}
		if err == nil && EngineName() != e.name {
			t.Errorf("%s is used instead of %s", EngineName(), e.name)
		}
	}
	if err := SetEngine("std"); err != nil {
		t.Fatal(err)
	}
	err := SetEngine("des")
	if !errors.Is(err, ErrUnknownEngine) || strings.Contains(err.Error(), "\n") || EngineName() != "std" {
		t.Errorf("%v, and %s is used", err, EngineName())
	}
	t.Setenv(EngineEnv, "rot13")
	if err := SetEngine(""); !errors.Is(err, ErrUnknownEngine) || !strings.HasPrefix(err.Error(), EngineEnv) {
		t.Error(err)
	}
	t.Setenv(EngineEnv, "std")
	if err := SetEngine(""); err != nil || EngineName() != "std" {
		t.Errorf("%v, and %s is used", err, EngineName())
	}
	t.Setenv(EngineEnv, "")
	if err := SetEngine(""); err != nil || EngineName() != Engines()[0] {
		t.Errorf("%v, and %s is used", err, EngineName())
	}
}

// A key that straddled one cache line more would cost a miss more.
func TestKeyLayout(t *testing.T) {
	var k Key
	if size := unsafe.Sizeof(k); size != 6*64 {
		t.Errorf("a key has %d bytes", size)
	}
	if at := unsafe.Offsetof(k.vec); at != 28 {
		t.Errorf("vec is at %d", at)
	}
	for _, aead := range []AEAD{AES128GCM, AES256GCM} {
		k := newKey(aead, make([]byte, aead.KeyLen()), [nonceLen]byte{})
		if at := uintptr(unsafe.Pointer(k)); at%64 != 0 {
			t.Errorf("a key is at %#x", at)
		}
		b := unsafe.Slice((*byte)(unsafe.Pointer(k)), unsafe.Sizeof(*k))
		if k.vec.Live() && aead == AES128GCM && !bytes.Equal(b[5*64:], make([]byte, 64)) {
			t.Error("a key of AES-128 has a sixth line")
		}
	}
}

// sealAll seals one frame with the keys of every engine, and opens it.
func sealAll(t *testing.T, aead AEAD, raw []byte, src []byte, control byte, offset uint64) {
	was := current.Load()
	defer current.Store(was)
	var want []byte
	for i := range engines {
		e := &engines[len(engines)-1-i] // std comes first
		if !e.available() {
			continue
		}
		current.Store(e)
		k := newKey(aead, raw[:aead.KeyLen()], [nonceLen]byte(raw[aead.KeyLen():]))
		frame := make([]byte, FrameHeader+len(src)+TagLen)
		k.Seal(frame, src, control, offset)
		if want == nil {
			want = bytes.Clone(frame)
		}
		if !bytes.Equal(frame, want) {
			t.Fatalf("%v, %d bytes: %s seals\n%x, the standard library\n%x", aead, len(src), e.name, frame, want)
		}
		plain, ok := k.Open(frame, offset)
		if !ok || !bytes.Equal(plain, src) {
			t.Fatalf("%v, %d bytes: %s does not open its own frame", aead, len(src), e.name)
		}
		if _, ok := k.Open(bytes.Clone(want), offset^1); ok {
			t.Fatalf("%v: %s opens at another offset", aead, e.name)
		}
		k.erase()
		if *k != (Key{}) {
			t.Fatal("erase leaves something")
		}
	}
}

func TestEnginesAgree(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var raw [maxKeyLen + nonceLen]byte
	src := make([]byte, MaxPlain)
	for i := range 3000 {
		for j := range raw {
			raw[j] = byte(r.Uint32())
		}
		n := 1 + r.IntN(2000)
		if i%500 == 0 {
			n = MaxPlain - i/500
		}
		src[r.IntN(n)] = byte(i)
		sealAll(t, AllAEADs[i%len(AllAEADs)], raw[:], src[:n], byte(i&1), r.Uint64())
	}
}

// TestVecOfManyKeys takes vectors shorter and longer than what keys are fetched
// for at once.
func TestVecOfManyKeys(t *testing.T) {
	for n := range 3 * fetchBatch / 2 {
		seals, opens := make([]SealOp, n), make([]OpenOp, n)
		for i := range seals {
			var raw [maxKeyLen]byte
			raw[0] = byte(i)
			aead := AllAEADs[(i+n)%len(AllAEADs)]
			k := newKey(aead, raw[:aead.KeyLen()], [nonceLen]byte{})
			frame := make([]byte, Overhead+i)
			seals[i] = SealOp{Key: k, Dst: frame, Src: frame[FrameHeader : FrameHeader+1+i], Flags: FlagFIN, Offset: uint64(i)}
			opens[i] = OpenOp{Key: k, Frame: frame, Offset: uint64(i)}
		}
		SealVec(seals)
		if n > 2 {
			opens[n-2].Frame[FrameHeader] ^= 1
		}
		OpenVec(opens)
		for i := range opens {
			if bad := n > 2 && i == n-2; opens[i].OK == bad {
				t.Errorf("frame %d of %d: %v", i, n, opens[i].OK)
			} else if !bad && opens[i].Plain[0] != FlagFIN {
				t.Errorf("frame %d of %d has flags %#x", i, n, opens[i].Plain[0])
			}
		}
	}
}

func TestSealOverlap(t *testing.T) {
	a, _ := testSessions(AES128GCM)
	mem := make([]byte, 200)
	for _, at := range []int{0, FrameHeader - 1, FrameHeader + 1, FrameHeader + 50 + TagLen - 1} {
		mustPanic(t, fmt.Sprintf("Seal from %d of the frame", at), func() {
			a.SendKey(0).Seal(mem, mem[at:][:50], 0, 0)
		})
	}
	a.SendKey(0).Seal(mem, mem[FrameHeader+50+TagLen:][:50], 0, 0)
	a.SendKey(0).Seal(mem[60:], mem[FrameHeader:][:50], 0, 0)
}

func FuzzEngines(f *testing.F) {
	f.Add(byte(0), make([]byte, 44), []byte("data"), byte(0), uint64(9))
	f.Add(byte(1), []byte("0123456789abcdef0123456789abcdef0123456789ab"), make([]byte, 1441), byte(1), uint64(1)<<40)
	f.Fuzz(func(t *testing.T, which byte, key, src []byte, control byte, offset uint64) {
		var raw [maxKeyLen + nonceLen]byte
		copy(raw[:], key)
		if len(src) == 0 || len(src) > MaxPlain {
			return
		}
		sealAll(t, AllAEADs[int(which)%len(AllAEADs)], raw[:], src, control, offset)
	})
}
