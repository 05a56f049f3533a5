package fastpath

import (
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// The tests of this file are those of docs/conformance.md that no other test
// of the package brings along.

// Reserved bits of an authentic frame mean nothing (RFC 8548 sections 4.2 and
// 4.2.1); they are zero in every frame of ours.
func TestReservedBits(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{RekeyFrames: 2}})
	var o int64
	next := func(control, flags byte, data string) {
		b := r.sealWith(control, flags, []byte(data))
		r.outer(seg{o: o, data: b})
		o += int64(len(b))
	}
	next(0xfe, 0, "control bits ")
	next(0, 0xfc, "flag bits ")
	next(0xff, 0xfc, "and rekey ")
	next(0xfe, 0xfc|crypto.FlagURG, "\x00\x00urgent")
	if want := "control bits flag bits and rekey urgent"; string(r.got) != want {
		t.Fatalf("delivered %q, want %q", r.got, want)
	}
	next(0xfe, 0xfc|crypto.FlagFIN, "")
	if !r.eof {
		t.Error("no end-of-file")
	}
	for i := range int64(6) {
		r.inner(seg{o: i, data: []byte{'x'}, flags: packet.URG, urg: 1})
	}
	r.inner(seg{o: 6, flags: packet.FIN})
	fs := r.readFrames()
	if len(fs) < 7 {
		t.Fatalf("%d frames", len(fs))
	}
	rekeys := 0
	for i, f := range fs {
		if f.control&^crypto.ControlRekey != 0 || f.flags&^(crypto.FlagFIN|crypto.FlagURG) != 0 {
			t.Errorf("frame %d has control %#x and flags %#x", i, f.control, f.flags)
		}
		if (f.flags&crypto.FlagFIN != 0) != (i == len(fs)-1) {
			t.Errorf("frame %d of %d has flags %#x", i, len(fs), f.flags)
		}
		rekeys += int(f.control & crypto.ControlRekey)
	}
	if rekeys == 0 {
		t.Error("no frame with the rekey bit")
	}
}

// Until the peer was heard without SYN, every segment to it carries a non-SYN
// ENO option, and none after that (RFC 8547 section 4.6).
func TestUnheardPeer(t *testing.T) {
	count := func(p *pkt) (n int) {
		_ = packet.WalkOptions(p.Options(), func(o []byte) bool {
			if o[0] == packet.OptENO && len(o) == 2 {
				n++
			}
			return true
		})
		return n
	}
	for _, c := range []rigConfig{{}, {ts: true, sack: true}, {ts: true, sack: true, v6: true, vlan: 3, mss: 1220}} {
		r := newRig(t, c)
		r.est.Unheard = true
		r.f.unheard = newFlow(r.est, r.now).unheard
		r.inner(seg{data: content(0, 0, 3000), gso: r.c.mss - 60})
		r.inner(seg{data: content(0, 0, 1000)}) // again
		r.inner(seg{o: 3000})
		if len(withData(r.outs)) < 3 {
			t.Fatalf("%d segments with data", len(withData(r.outs)))
		}
		for i := range r.outs {
			if p := &r.outs[i]; count(p) != 1 || p.Len()+len(p.Options()) > r.c.mss {
				t.Errorf("segment %d has %d options of ENO, and %d bytes", i, count(p), p.Len()+len(p.Options()))
			}
		}
		r.outer(seg{})
		r.forget()
		r.inner(seg{o: 3000, data: []byte("x")})
		r.outer(seg{data: r.seal(0, []byte("y"))})
		r.advance(time.Second)
		if len(r.outs) == 0 {
			t.Fatal("nothing sent")
		}
		for i := range r.outs {
			if n := count(&r.outs[i]); n != 0 {
				t.Errorf("segment %d after the peer was heard has %d options of ENO", i, n)
			}
		}
	}
}

// Keys are erased as soon as a flow has ended, well or badly, while its numbers
// linger (RFC 8547 section 5).
func TestKeysErasedAtEnd(t *testing.T) {
	for name, end := range map[string]func(r *rig){
		"closed":     (*rig).closeBoth,
		"peer reset": func(r *rig) { r.outer(seg{flags: packet.RST}) },
		"aborted": func(r *rig) {
			b := r.seal(0, []byte("x"))
			b[5] ^= 1
			r.outer(seg{data: b})
		},
		"local reset": func(r *rig) { r.inner(seg{flags: packet.RST}) },
		"shutdown":    func(r *rig) { r.e.AbortAll(ReasonShutdown, r.now) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			sess := r.f.sess
			if sess.SendKey(0) == nil || sess.RecvKey(0) == nil {
				t.Fatal("no keys at the start")
			}
			end(r)
			if r.f.state == flowLive {
				t.Fatal("the flow lives")
			}
			if sess.SendKey(0) != nil || sess.RecvKey(0) != nil || sess.NextSecret() != nil {
				t.Error("keys after the end")
			}
		})
	}
}

// Keys of a generation that is over are erased in either direction (RFC 8548
// section 3.8).
func TestOldKeysErased(t *testing.T) {
	r := newRig(t, rigConfig{})
	sess := r.f.sess
	for gen := uint32(1); gen < 5; gen++ {
		o := int64(r.sealed)
		r.outer(seg{o: o, data: r.sealWith(crypto.ControlRekey, 0, []byte("x"))})
		r.advance(time.Millisecond)
		if fs := r.readFrames(); len(fs) != 1 || fs[0].control != crypto.ControlRekey {
			t.Fatalf("generation %d is answered by %+v", gen, fs)
		}
		if sess.RecvKey(gen-1) != nil || sess.SendKey(gen-1) != nil {
			t.Errorf("keys of generation %d after that of %d", gen-1, gen)
		}
		if sess.RecvKey(gen) == nil || sess.SendKey(gen) == nil {
			t.Errorf("no keys of generation %d", gen)
		}
	}
}
