package crypto

import (
	"bytes"
	"slices"
	"testing"
)

func FuzzInit1(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(byte(v.TEP), []byte(v.Init1))
	}
	f.Fuzz(func(t *testing.T, tep byte, msg []byte) {
		m, err := ParseInit1(TEP(tep), msg)
		if err != nil {
			if m != nil {
				t.Error("message and error")
			}
			return
		}
		again, err := ParseInit1(TEP(tep), m.Append(nil))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(again.Ciphers, m.Ciphers) || again.Nonce != m.Nonce || !bytes.Equal(again.Pub, m.Pub) {
			t.Errorf("%+v became %+v", m, again)
		}
	})
}

func FuzzInit2(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(byte(v.TEP), []byte(v.Init2))
	}
	f.Fuzz(func(t *testing.T, tep byte, msg []byte) {
		m, err := ParseInit2(TEP(tep), msg)
		if err != nil {
			if m != nil {
				t.Error("message and error")
			}
			return
		}
		again, err := ParseInit2(TEP(tep), m.Append(nil))
		if err != nil {
			t.Fatal(err)
		}
		if again.Cipher != m.Cipher || again.Nonce != m.Nonce || !bytes.Equal(again.Pub, m.Pub) {
			t.Errorf("%+v became %+v", m, again)
		}
	})
}

// FuzzOpen cuts the first frame off a hostile stream and opens it. Nothing
// opens that was not sealed; what was sealed opens to itself.
func FuzzOpen(f *testing.F) {
	f.Add(byte(0), uint64(0), []byte{0, 0, 17, 1, 2, 3})
	f.Add(byte(1), uint64(1)<<63, make([]byte, 3+17))
	f.Add(byte(2), uint64(82), append([]byte{1, 1, 0}, make([]byte, 300)...))
	f.Fuzz(func(t *testing.T, which byte, offset uint64, stream []byte) {
		a, b := testSessions(AllAEADs[int(which)%len(AllAEADs)])
		n, err := FrameLen(stream)
		if err != nil || n == 0 || n > len(stream) {
			if _, ok := b.RecvKey(0).Open(bytes.Clone(stream), offset); ok {
				t.Error("a frame without a length opens")
			}
		} else if _, ok := b.RecvKey(0).Open(bytes.Clone(stream[:n]), offset); ok {
			t.Error("forged frame opens")
		}
		if len(stream) == 0 || len(stream) > MaxPlain {
			return
		}
		frame := make([]byte, FrameHeader+len(stream)+TagLen)
		a.SendKey(0).Seal(frame, stream, 0, offset)
		plain, ok := b.RecvKey(0).Open(frame, offset)
		if !ok || !bytes.Equal(plain, stream) {
			t.Error("sealed frame does not open to itself")
		}
		if flags, _, data, err := ParsePlain(plain); err == nil && len(data) >= len(plain) {
			t.Errorf("flags %#x, data of %d in %d bytes", flags, len(data), len(plain))
		}
	})
}
