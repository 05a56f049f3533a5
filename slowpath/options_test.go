package slowpath

import (
	"bytes"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

func TestOptionEdit(t *testing.T) {
	eno := option(x25519)
	linux := linuxSYN(1460, 1, 0)
	full := append(bytes.Clone(linux), 254, 20, 0x12, 0x34, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	tight := append(bytes.Clone(linux), 254, 17, 0x12, 0x34, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	for _, x := range []struct {
		name string
		edit optionEdit
		in   []byte
		want []byte
		full bool
	}{
		{name: "nothing", in: linux, want: linux},
		{name: "no options", in: nil, want: []byte{}},
		{name: "add", edit: optionEdit{eno: eno}, in: linux, want: withENO(linux, eno)},
		{name: "add to none", edit: optionEdit{eno: eno}, want: []byte{69, 3, x25519, 1}},
		{name: "remove what was added", in: withENO(linux, eno), want: linux},
		{name: "replace", edit: optionEdit{eno: option(1, p256)}, in: withENO(linux, eno), want: withENO(linux, option(1, p256))},
		{name: "remove two", in: append(withENO(linux, eno), withENO(nil, eno)...), want: linux},
		{name: "remove the first", in: append([]byte{69, 3, x25519}, 2, 4, 1, 2, 1), want: []byte{2, 4, 1, 2}},
		{name: "MSS", edit: optionEdit{mss: 0x0102}, in: linux, want: append([]byte{2, 4, 1, 2}, linux[4:]...)},
		{name: "MSS twice", edit: optionEdit{mss: 0x0102}, in: []byte{2, 4, 9, 9, 2, 4, 8, 8}, want: []byte{2, 4, 1, 2}},
		{name: "MSS missing", edit: optionEdit{mss: 0x0102}, in: []byte{4, 2, 1, 1}, want: []byte{4, 2, 2, 4, 1, 2, 1, 1}},
		{name: "MSS malformed", edit: optionEdit{mss: 0x0102}, in: []byte{2, 3, 9, 1}, want: []byte{2, 3, 9, 2, 4, 1, 2, 1}},
		{name: "Fast Open", edit: optionEdit{tfo: true}, in: []byte{34, 6, 1, 2, 3, 4, 254, 4, 0xf9, 0x89, 1, 1}, want: []byte{}},
		{name: "Fast Open stays", in: []byte{34, 6, 1, 2, 3, 4, 1, 1}, want: []byte{34, 6, 1, 2, 3, 4, 1, 1}},
		{name: "end of list", in: []byte{4, 2, 0, 69}, want: []byte{4, 2, 1, 1}},
		{name: "an option that ends like padding", in: []byte{3, 3, 1, 69, 3, x25519, 0, 0}, want: []byte{3, 3, 1, 1}},
		{name: "malformed ENO ends the list", in: []byte{4, 2, 69, 9}, want: []byte{4, 2, 1, 1}},
		{name: "padding makes room", edit: optionEdit{eno: []byte{69, 4, 1, 2}}, in: tight, want: append(append(bytes.Clone(tight[:16]), append([]byte{3, 3, 7}, tight[20:37]...)...), 69, 4, 1, 2)},
		{name: "full", edit: optionEdit{eno: eno}, in: full, full: true},
	} {
		t.Run(x.name, func(t *testing.T) {
			got, ok := x.edit.apply(x.in)
			if ok == x.full || ok && !bytes.Equal(got, x.want) {
				t.Errorf("got %x %v, want %x", got, ok, x.want)
			}
		})
	}
}

// FuzzOptions: edited options are well-formed, aligned, fit, carry the ENO
// option that was asked for, and nothing else of the original is lost.
func FuzzOptions(f *testing.F) {
	f.Add(linuxSYN(1460, 1, 0), uint16(1440), false, true)
	f.Add([]byte{2, 4, 5}, uint16(0), true, false)
	f.Fuzz(func(t *testing.T, opts []byte, mss uint16, tfo, add bool) {
		opts = opts[:min(len(opts), packet.MaxOptions)&^3]
		edit := optionEdit{mss: int(mss), tfo: tfo}
		if add {
			edit.eno = AppendOffer(nil, 0, nil, Suboption{})
		}
		before := readSYNOptions(opts)
		got, ok := edit.apply(opts)
		if !ok {
			if !add && mss == 0 {
				t.Fatalf("%x does not fit any more", opts)
			}
			return
		}
		if len(got) > packet.MaxOptions || len(got)%4 != 0 {
			t.Fatalf("%d bytes", len(got))
		}
		if err := packet.WalkOptions(got, func([]byte) bool { return true }); err != nil {
			t.Fatalf("%x: %v", got, err)
		}
		after := readSYNOptions(got)
		if (after.enos == 1) != add || after.enos > 1 {
			t.Fatalf("%d ENO options", after.enos)
		}
		if mss != 0 && after.mss != int(mss) || mss == 0 && after.mss != before.mss {
			t.Fatalf("MSS %d", after.mss)
		}
		if after.wscale != before.wscale || after.sackOK != before.sackOK || after.ts != before.ts || after.conflict != before.conflict {
			t.Fatalf("%+v became %+v", before, after)
		}
		if after.tfo != (before.tfo && !tfo) {
			t.Fatalf("Fast Open %v", after.tfo)
		}
	})
}

// FuzzReassembly compares with a byte-by-byte model.
func FuzzReassembly(f *testing.F) {
	f.Add([]byte{0, 5, 5, 5, 3, 9, 200, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		var r reassembly
		model := make([]int, 400)
		serial := byte(0)
		for len(script) >= 2 {
			off, n := int(int8(script[0]))*2, int(script[1])
			script = script[2:]
			serial++
			if len(r.have) == maxRxSpans || serial == 255 {
				return
			}
			r.insert(off, bytes.Repeat([]byte{serial}, n), 300)
			for i := max(off, 0); i < min(off+n, 300); i++ {
				if model[i] == 0 {
					model[i] = int(serial)
				}
			}
			next := 0
			for next < len(model) && model[next] != 0 {
				next++
			}
			if r.inOrder() != next {
				t.Fatalf("in order %d, want %d", r.inOrder(), next)
			}
			for i, s := range r.have {
				if s.from >= s.to || i > 0 && r.have[i-1].to >= s.from {
					t.Fatalf("spans %v", r.have)
				}
				for k := s.from; k < s.to; k++ {
					if int(r.buf[k]) != model[k] {
						t.Fatalf("byte %d is %d, want %d", k, r.buf[k], model[k])
					}
				}
			}
			if len(r.buf) > 300 {
				t.Fatalf("%d bytes kept", len(r.buf))
			}
		}
	})
}
