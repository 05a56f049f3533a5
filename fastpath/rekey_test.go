package fastpath

import (
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// controls are the control bytes of the frames that the engine sent since the
// last call.
func (r *rig) controls() (cs []byte) {
	for _, f := range r.readFrames() {
		cs = append(cs, f.control)
	}
	return cs
}

func wantControls(t *testing.T, got []byte, want ...byte) {
	t.Helper()
	if string(got) != string(want) {
		t.Fatalf("frames with control bytes %v, want %v", got, want)
	}
}

const rekeyBit = crypto.ControlRekey

// The key is changed after so many bytes, and the bit rides on data.
func TestRekeyBytes(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{RekeyBytes: 2500}})
	for i := range 6 {
		r.inner(seg{o: int64(i) * 1000, data: content(0, uint64(i)*1000, 1000)})
	}
	wantControls(t, r.controls(), 0, 0, 0, rekeyBit, 0, 0)
}

// A key that sealed data is changed when its time is over, with an empty frame
// if need be; one that did not is kept.
func TestRekeyEvery(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{RekeyEvery: time.Minute}})
	r.advance(time.Hour)
	wantControls(t, r.controls())
	r.inner(seg{data: []byte("a")})
	r.outer(seg{})
	r.advance(59 * time.Second)
	wantControls(t, r.controls(), 0)
	r.advance(2 * time.Second)
	wantControls(t, r.controls(), rekeyBit)
	r.outer(seg{data: r.sealWith(rekeyBit, 0, nil)})
	r.advance(time.Hour)
	wantControls(t, r.controls())
	if f := r.e.Snapshot(nil)[0]; f.RekeysOut != 1 || f.RekeysIn != 1 {
		t.Errorf("%d rekeys out, %d in", f.RekeysOut, f.RekeysIn)
	}
}

// A peer that answers nothing, or has ended its stream, does not keep data under
// one key for longer: each time, the next data has the bit.
func TestRekeyEveryUnanswered(t *testing.T) {
	for _, fin := range []bool{false, true} {
		r := newRig(t, rigConfig{engine: EngineConfig{RekeyEvery: time.Minute}})
		if fin {
			r.outer(seg{data: r.seal(crypto.FlagFIN, nil), flags: packet.FIN})
		}
		r.inner(seg{data: []byte{0}})
		r.advance(61 * time.Second)
		wantControls(t, r.controls(), 0, rekeyBit)
		for i := range int64(3) {
			r.inner(seg{o: 2*i + 1, data: []byte{0}})
			r.advance(61 * time.Second)
			r.inner(seg{o: 2*i + 2, data: []byte{0}})
			wantControls(t, r.controls(), 0, rekeyBit)
		}
	}
}

// By command an empty frame initiates rekeying, never a second one before the
// answer (TC 3.8).
func TestRekeyCommand(t *testing.T) {
	r := newRig(t, rigConfig{})
	for k, want := range []int{1, 0, 0} {
		if n := r.e.Rekey(&r.est.Key, r.now); n != want {
			t.Errorf("command %d: %d flows, want %d", k, n, want)
		}
		r.drain()
	}
	wantControls(t, r.controls(), rekeyBit)
	r.outer(seg{data: r.sealWith(rekeyBit, 0, []byte("x"))})
	if n := r.e.Rekey(nil, r.now); n != 1 {
		t.Errorf("after the answer: %d flows", n)
	}
	r.drain()
	wantControls(t, r.controls(), rekeyBit)
	other := r.est.Key
	other.RPort++
	if n := r.e.Rekey(&other, r.now); n != 0 {
		t.Errorf("%d flows of another key", n)
	}
}

// Both sides initiate at once: each frame is the answer to the other, and there
// is no third.
func TestRekeyCrossing(t *testing.T) {
	r := newRig(t, rigConfig{})
	theirs := r.sealWith(rekeyBit, 0, []byte("theirs"))
	r.e.Rekey(nil, r.now)
	r.drain()
	r.outer(seg{data: theirs})
	r.advance(time.Millisecond)
	wantControls(t, r.controls(), rekeyBit)
	if string(r.got) != "theirs" {
		t.Errorf("delivered %q", r.got)
	}
	r.inner(seg{data: []byte("ours")})
	wantControls(t, r.controls(), 0)
}

// A lost initiation is sent again as it was, by the daemon's own timer: no inner
// byte follows it (T8).
func TestRekeyResent(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.e.Rekey(nil, r.now)
	r.drain()
	first := withData(r.outs)
	r.forget()
	r.advance(time.Second)
	again := withData(r.outs)
	if len(first) != 1 || len(again) == 0 || string(again[0].Payload()) != string(first[0].Payload()) {
		t.Errorf("%d segments, then %d", len(first), len(again))
	}
}

// One that data follows is sent again as soon as the peer says that it has the
// data, once a round trip: a SACK block that begins where it acknowledges cannot be
// shown to the inner stack.
func TestRekeyLostBeforeData(t *testing.T) {
	r := newRig(t, rigConfig{sack: true})
	r.e.Rekey(nil, r.now)
	r.drain()
	r.inner(seg{data: content(0, 0, 100)})
	sent := withData(r.outs)
	if len(sent) != 2 {
		t.Fatalf("%d segments", len(sent))
	}
	end := sent[1].o + int64(sent[1].Len())
	resent := func() (n int) {
		for _, p := range withData(r.outs) {
			if p.o != 0 || string(p.Payload()) != string(sent[0].Payload()) {
				t.Errorf("%d bytes at %d are sent", p.Len(), p.o)
			}
			n++
		}
		r.forget()
		return n
	}
	r.forget()
	for _, sack := range [][2]int64{{end, end + 10}, {0, sent[1].o}} {
		r.outer(seg{ack: -1, sack: [][2]int64{sack}})
		if n := resent(); n != 0 {
			t.Errorf("%d segments for the block %d", n, sack)
		}
	}
	whole := seg{ack: -1, sack: [][2]int64{{sent[1].o, end}}}
	for round := range 2 {
		for k := range 3 {
			r.outer(whole)
			if n := resent(); n != b2i(k == 0) {
				t.Errorf("round %d: %d segments for the SACK %d", round, n, k)
			}
		}
		r.advance(100 * time.Millisecond)
		r.forget()
	}
	// What is lost with its data is the inner stack's to send again.
	r.outer(seg{ack: -1, sack: [][2]int64{{sent[1].o + 50, end}}})
	if n := resent(); n != 0 {
		t.Errorf("%d segments, although data is lost, too", n)
	}
}

// A keep-alive of the inner stack becomes an initiation (TC 3.9). Only a frame
// of the new generation is an answer: a bare ACK, which anyone can forge, and a
// frame of the old one are not.
func TestVerifiedKeepalive(t *testing.T) {
	for name, probe := range map[string]seg{"empty": {o: 99}, "garbage byte": {o: 99, data: []byte{0xee}}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			r.inner(seg{data: content(0, 0, 100)})
			r.outer(seg{})
			wantControls(t, r.controls(), 0)
			r.forget()
			r.inner(probe)
			wantControls(t, r.controls(), rekeyBit)
			for range 3 {
				r.outer(seg{})
				r.inner(probe)
				r.advance(10 * time.Second)
			}
			wantControls(t, r.controls())
			if n := len(r.ins); n != 0 {
				t.Fatalf("a forged ACK becomes %d inner packets", n)
			}
			r.outer(seg{data: r.sealWith(rekeyBit, 0, nil)})
			if len(r.ins) != 1 || r.ins[0].a != 100 {
				t.Fatalf("the authentic answer becomes %d packets", len(r.ins))
			}
			r.forget()
			r.inner(probe)
			wantControls(t, r.controls(), rekeyBit)
		})
	}
}

// A peer that was reset after it had got the frame which asks for proof, when the
// reset was lost, says so to the next probe.
func TestVerifiedKeepaliveOfGonePeer(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 100)})
	r.outer(seg{})
	r.inner(seg{o: 99})
	r.outer(seg{})
	r.forget()
	r.inner(seg{o: 99})
	if len(r.outs) != 1 || r.outs[0].Len() != 0 || r.outs[0].o != int64(r.f.unaO)-1 {
		t.Fatalf("the probe becomes %d packets", len(r.outs))
	}
	r.outer(seg{flags: packet.RST})
	r.wantEnded(ReasonPeerReset)
}

// With a peer that is gone it is the inner stack that gives up, however long it
// waits.
func TestVerifiedKeepaliveWaits(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 100)})
	r.outer(seg{})
	for range 20 {
		r.inner(seg{o: 99})
		r.advance(75 * time.Second)
	}
	if why := r.ended(); why != "" {
		t.Errorf("the flow ended: %s", why)
	}
}

// While the local application does not read, the peer cannot send the answer that
// proves its life: the window is shut, and data stands before it. An ACK does then,
// as it does for plain TCP, also when the question was asked before.
func TestVerifiedKeepaliveWindowShut(t *testing.T) {
	for _, before := range []bool{false, true} {
		r := newRig(t, rigConfig{innerWnd: 2880})
		r.auto = false
		r.inner(seg{data: content(0, 0, 100)})
		r.outer(seg{})
		wantControls(t, r.controls(), 0)
		if before {
			r.inner(seg{o: 99})
			wantControls(t, r.controls(), rekeyBit)
		}
		b := append(r.seal(0, content(0, 0, 1440)), r.seal(0, content(0, 1440, 1440))...)
		r.stream(0, b, 1460, 0)
		r.inner(seg{o: 100, ack: 2880, wnd: -1})
		for range 3 {
			r.outer(seg{o: int64(r.sealed)})
			r.forget()
			r.inner(seg{o: 99, ack: 2880, wnd: -1})
			wantControls(t, r.controls())
			if len(r.outs) != 1 || r.outs[0].Len() != 0 {
				t.Fatalf("asked before %v: the probe becomes %d packets", before, len(r.outs))
			}
			r.forget()
			r.outer(seg{o: int64(r.sealed)})
			if len(r.ins) != 1 || r.ins[0].a != 100 {
				t.Fatalf("asked before %v: the answer becomes %d packets", before, len(r.ins))
			}
			r.advance(time.Minute)
		}
	}
}

// After FINp of either side there is no rekeying, and keep-alives are those of
// TCP.
func TestKeepaliveAfterFINp(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 100)})
	r.outer(seg{})
	fin := r.seal(crypto.FlagFIN, nil)
	r.outer(seg{data: fin, flags: 1})
	r.advance(time.Second)
	r.readFrames()
	r.forget()
	r.inner(seg{o: 99})
	wantControls(t, r.controls())
	if len(r.outs) != 1 || r.outs[0].Len() != 0 {
		t.Errorf("the probe becomes %d packets", len(r.outs))
	}
}

// A flow that cannot seal within its limits ends.
func TestKeyExhausted(t *testing.T) {
	for name, use := range map[string]func(f *flow){
		"generations": func(f *flow) { f.txGen = maxGen },
		"offsets":     func(f *flow) { f.sealO = maxSealO },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			r.e.tab.each(use)
			r.inner(seg{data: []byte("one too many")})
			r.wantEnded(ReasonKeyExhausted)
		})
	}
}

// There is no second initiation with an empty frame before the answer
// to the first, not even for one with FINp (TC 3.8).
func TestRekeyWithFINp(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{RekeyFrames: 1}})
	r.e.Rekey(nil, r.now)
	r.drain()
	wantControls(t, r.controls(), rekeyBit)
	r.inner(seg{flags: packet.FIN})
	wantControls(t, r.controls(), 0)
}
