package slowpath

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// option wraps the contents of an ENO option.
func option(contents ...byte) []byte {
	return append([]byte{packet.OptENO, byte(len(contents) + 2)}, contents...)
}

// data returns n bytes.
func data(n int) []byte { return bytes.Repeat([]byte{0x55}, n) }

func TestParseENO(t *testing.T) {
	for _, x := range []struct {
		name     string
		opt      []byte
		bad      bool
		global   byte
		explicit bool
		subs     []Suboption
	}{
		{name: "vacuous", opt: option()},
		{name: "vacuous of a passive opener", opt: option(0x01), global: 1, explicit: true},
		{name: "figure 9, SYN", opt: option(0x21, 0x23), subs: []Suboption{{TEP: 0x21}, {TEP: 0x23}}},
		{name: "figure 9, SYN-ACK", opt: option(0x01, 0x23), global: 1, explicit: true, subs: []Suboption{{TEP: 0x23}}},
		{name: "a and b", opt: option(0x03, 0x23), global: 3, explicit: true, subs: []Suboption{{TEP: 0x23}}},
		{name: "z bits are ignored", opt: option(0x1d, 0x23), global: 1, explicit: true, subs: []Suboption{{TEP: 0x23}}},
		{name: "explicit zero", opt: option(0x00, 0x23), explicit: true, subs: []Suboption{{TEP: 0x23}}},
		{name: "only the first global counts", opt: option(0x00, 0x23, 0x01, 0x02), explicit: true, subs: []Suboption{{TEP: 0x23}}},
		{name: "global after TEPs", opt: option(0x23, 0x01), global: 1, explicit: true, subs: []Suboption{{TEP: 0x23}}},
		{name: "data to the end", opt: option(0x23, 0xa1, 0x01, 0x02), subs: []Suboption{{TEP: 0x23}, {TEP: 0x21, V: true, Data: []byte{1, 2}}}},
		{name: "v without data", opt: option(0xa3), subs: []Suboption{{TEP: 0x23, V: true, Data: []byte{}}}},
		{name: "length byte", opt: option(0x82, 0xa3, 0x01, 0x02, 0x03, 0x21), subs: []Suboption{{TEP: 0x23, V: true, Data: []byte{1, 2, 3}}, {TEP: 0x21}}},
		{name: "length byte to the end", opt: option(0x80, 0xa3, 0x07), subs: []Suboption{{TEP: 0x23, V: true, Data: []byte{7}}}},
		{name: "longest length", opt: option(append([]byte{0x9f, 0xa3}, data(32)...)...), subs: []Suboption{{TEP: 0x23, V: true, Data: data(32)}}},
		{name: "last TEP value", opt: option(0x7f, 0xff, 0x00), subs: []Suboption{{TEP: 0x7f}, {TEP: 0x7f, V: true, Data: []byte{0}}}},
		{name: "more than 32 bytes at the end", opt: option(append([]byte{0xa3}, data(35)...)...), subs: []Suboption{{TEP: 0x23, V: true, Data: data(35)}}},
		{name: "length beyond the option", opt: option(0x82, 0xa3, 0x01, 0x02), bad: true},
		{name: "length byte last", opt: option(0x23, 0x80), bad: true},
		{name: "length byte before v = 0", opt: option(0x80, 0x23, 0x00), bad: true},
		{name: "length byte before global", opt: option(0x80, 0x01, 0x00), bad: true},
		{name: "length byte before length byte", opt: option(0x80, 0x80, 0xa3, 0x00), bad: true},
		{name: "length byte and TEP without data", opt: option(0x80, 0xa3), bad: true},
		{name: "wrong length", opt: []byte{packet.OptENO, 4, 0x23}, bad: true},
		{name: "wrong kind", opt: []byte{packet.OptExp1, 3, 0x23}, bad: true},
		{name: "empty", bad: true},
	} {
		t.Run(x.name, func(t *testing.T) {
			e, err := ParseENO(x.opt)
			if x.bad != errors.Is(err, ErrIllFormed) {
				t.Fatalf("error %v", err)
			}
			if x.bad {
				return
			}
			if e.AppAware() != (x.global&2 != 0) || e.PassiveRole() != (x.global&1 != 0) {
				t.Errorf("a %v, b %v", e.AppAware(), e.PassiveRole())
			}
			if e.Global != x.global || e.Explicit != x.explicit || len(e.Subs) != len(x.subs) {
				t.Fatalf("got %+v", e)
			}
			for i, s := range x.subs {
				if g := e.Subs[i]; g.TEP != s.TEP || g.V != s.V || !bytes.Equal(g.Data, s.Data) {
					t.Errorf("suboption %d: %+v, want %+v", i, g, s)
				}
			}
		})
	}
}

const (
	p256, p521, x25519, x448 = byte(crypto.TEPP256), byte(crypto.TEPP521), byte(crypto.TEPX25519), byte(crypto.TEPX448)
)

// resume is a resumption suboption with n bytes of data, not last.
func resume(tep byte, n int) []byte { return append([]byte{0x80 | byte(n-1), 0x80 | tep}, data(n)...) }

func TestChooseTEP(t *testing.T) {
	all := crypto.AllTEPs
	for _, x := range []struct {
		name   string
		offer  []byte
		prefs  []crypto.TEP
		tep    byte
		reason string
	}{
		{name: "our preference decides", offer: []byte{p521, p256, x448}, prefs: []crypto.TEP{crypto.TEPX25519, crypto.TEPP256, crypto.TEPX448}, tep: p256},
		{name: "whatever the order", offer: []byte{x25519, p256}, prefs: all, tep: x25519},
		{name: "unknown TEPs are skipped", offer: []byte{0x20, 0x7f, x448}, prefs: all, tep: x448},
		{name: "none in common", offer: []byte{0x30, p521}, prefs: []crypto.TEP{crypto.TEPX25519}, reason: ReasonNoCommonTEP},
		{name: "vacuous", reason: ReasonVacuous, prefs: all},
		{name: "vacuous with b", offer: []byte{1}, reason: ReasonVacuous, prefs: all},
		{name: "role conflict", offer: []byte{1, x25519}, prefs: all, reason: ReasonRoleConflict},
		{name: "a later global does not count", offer: []byte{0, 1, x25519}, prefs: all, tep: x25519},
		{name: "a bit", offer: []byte{2, x25519}, prefs: all, tep: x25519},
		{name: "repeated", offer: []byte{x25519, x25519}, prefs: all, reason: ReasonNoCommonTEP},
		{name: "repeated, another is left", offer: []byte{x25519, p256, x25519}, prefs: all, tep: p256},
		{name: "repeated with data", offer: append([]byte{x25519}, append([]byte{0x80 | x25519}, data(17)...)...), prefs: all, reason: ReasonNoCommonTEP},
		{name: "resumption of 17 bytes", offer: append([]byte{0x80 | x25519}, data(17)...), prefs: all, tep: x25519},
		{name: "resumption of 9 bytes", offer: append([]byte{0x80 | x25519}, data(9)...), prefs: all, tep: x25519},
		{name: "too short is v = 0", offer: append([]byte{0x80 | x25519}, data(8)...), prefs: all, tep: x25519},
		{name: "empty is v = 0", offer: []byte{0x80 | x25519}, prefs: all, tep: x25519},
		{name: "too long is not valid", offer: append([]byte{p256, 0x80 | x25519}, data(18)...), prefs: all, tep: p256},
		{name: "with a length byte", offer: append(resume(x25519, 17), p256), prefs: all, tep: x25519},
	} {
		t.Run(x.name, func(t *testing.T) {
			e, err := ParseENO(option(x.offer...))
			if err != nil {
				t.Fatal(err)
			}
			tep, reason := ChooseTEP(&e, x.prefs)
			if byte(tep) != x.tep || reason != x.reason {
				t.Errorf("got %v %q, want %v %q", tep, reason, crypto.TEP(x.tep), x.reason)
			}
		})
	}
}

func TestNegotiatedTEP(t *testing.T) {
	for _, x := range []struct {
		name          string
		offer, answer []byte
		sub           byte
		reason        string
	}{
		{name: "figure 9", offer: []byte{x25519, p256}, answer: []byte{1, p256}, sub: p256},
		{name: "figure 12: the last one", offer: []byte{p256, x25519}, answer: []byte{1, x25519, p256, 0x30}, sub: p256},
		{name: "last valid one", offer: []byte{x25519, x448}, answer: []byte{1, x448, x25519, p521}, sub: x25519},
		{name: "none in common", offer: []byte{x25519}, answer: []byte{1, p256}, reason: ReasonNoCommonTEP},
		{name: "vacuous", offer: []byte{x25519}, answer: []byte{1}, reason: ReasonVacuous},
		{name: "no b bit", offer: []byte{x25519}, answer: []byte{x25519}, reason: ReasonRoleConflict},
		{name: "explicit b = 0", offer: []byte{x25519}, answer: []byte{0, x25519}, reason: ReasonRoleConflict},
		{name: "b only in a second global", offer: []byte{x25519}, answer: []byte{0, 1, x25519}, reason: ReasonRoleConflict},
		{name: "b = 1 on both sides", offer: []byte{1, x25519}, answer: []byte{1, x25519}, reason: ReasonRoleConflict},
		{name: "z and a bits", offer: []byte{x25519}, answer: []byte{0x1f, x25519}, sub: x25519},
		{name: "repeated in the answer", offer: []byte{x25519, p256}, answer: []byte{1, x25519, p256, x25519}, sub: p256},
		{name: "repeated in the offer", offer: []byte{x25519, p256, x25519}, answer: []byte{1, p256, x25519}, sub: p256},
		{name: "v = 1 to v = 0", offer: []byte{x25519, p256}, answer: append([]byte{1, p256, 0x80 | x25519}, data(17)...), sub: p256},
		{name: "v = 1 to v = 0 alone", offer: []byte{x25519}, answer: append([]byte{1, 0x80 | x25519}, data(17)...), reason: ReasonNoCommonTEP},
		{name: "v = 0 to v = 1", offer: append([]byte{0x80 | x25519}, data(17)...), answer: []byte{1, x25519}, sub: x25519},
		{name: "v = 1 to v = 1", offer: append([]byte{0x80 | x25519}, data(17)...), answer: append([]byte{1, 0x80 | x25519}, data(9)...), sub: 0x80 | x25519},
		{name: "another identifier", offer: append([]byte{p256, 0x80 | x25519}, data(17)...), answer: append([]byte{1, p256, 0x80 | x25519, 0xff}, data(9)...), sub: p256},
		{name: "another identifier alone", offer: append([]byte{0x80 | x25519}, data(17)...), answer: append([]byte{1, 0x80 | x25519, 0xff}, data(9)...), reason: ReasonNoCommonTEP},
		{name: "too short", offer: append([]byte{0x80 | x25519}, data(17)...), answer: append([]byte{1, 0x80 | x25519}, data(8)...), reason: ReasonNoCommonTEP},
		{name: "too long", offer: append([]byte{0x80 | x25519}, data(17)...), answer: append([]byte{1, 0x80 | x25519}, data(18)...), reason: ReasonNoCommonTEP},
	} {
		t.Run(x.name, func(t *testing.T) {
			offer, err := ParseENO(option(x.offer...))
			if err != nil {
				t.Fatal(err)
			}
			answer, err := ParseENO(option(x.answer...))
			if err != nil {
				t.Fatal(err)
			}
			sub, reason := NegotiatedTEP(&offer, &answer, data(9))
			if reason != x.reason || reason == "" && sub.Byte() != x.sub {
				t.Errorf("got %#x %q, want %#x %q", sub.Byte(), reason, x.sub, x.reason)
			}
		})
	}
}

func TestOfferAndAnswer(t *testing.T) {
	offer := AppendOffer(nil, 0, crypto.AllTEPs, Suboption{})
	if want := option(x25519, x448, p256, p521); !bytes.Equal(offer, want) {
		t.Errorf("offer %x, want %x", offer, want)
	}
	answer := AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX448})
	if want := option(1, x448); !bytes.Equal(answer, want) {
		t.Errorf("answer %x, want %x", answer, want)
	}
	if got := Transcript(offer, answer); !bytes.Equal(got, slices.Concat(offer, answer)) {
		t.Errorf("transcript %x", got)
	}
}

// FuzzENO: parsing never panics, suboptions lie within the option, and what
// both negotiations accept is in both options exactly once.
func FuzzENO(f *testing.F) {
	f.Add(option(x25519, p256), option(1, p256))
	f.Add(option(0x82, 0xa3, 1, 2, 3, 0x21), option(0x9f, 0xa3))
	f.Add(append(option(x25519), 0), []byte{69})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		ea, errA := ParseENO(a)
		eb, errB := ParseENO(b)
		for _, e := range []ENO{ea, eb} {
			n := 0
			for _, s := range e.Subs {
				n += 1 + len(s.Data)
				if s.TEP < enoTEP || !s.V && len(s.Data) > 0 {
					t.Errorf("suboption %+v", s)
				}
			}
			if n > max(len(a), len(b)) || e.Global&^3 != 0 {
				t.Errorf("%+v from %x, %x", e, a, b)
			}
		}
		if errA != nil || errB != nil {
			return
		}
		if tep, reason := ChooseTEP(&ea, crypto.AllTEPs); (reason == "") != tep.Valid() {
			t.Errorf("chose %v, %q", tep, reason)
		} else if _, ok := ea.offer(tep); reason == "" && !ok {
			t.Errorf("%v is not in the offer", tep)
		}
		if sub, reason := NegotiatedTEP(&ea, &eb, nil); reason == "" {
			_, okA := ea.offer(sub.TEP)
			_, okB := eb.offer(sub.TEP)
			if !okA || !okB || ea.PassiveRole() == eb.PassiveRole() {
				t.Errorf("negotiated %v", sub)
			}
		}
	})
}
