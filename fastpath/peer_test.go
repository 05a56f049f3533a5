package fastpath

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// --- frames of the peer, whole and in pieces ---

func TestFramesInSegments(t *testing.T) {
	const most = crypto.MaxPlain - 1
	for _, c := range []struct {
		name   string
		frames []int
		seg    int
	}{
		{"one byte", []int{1}, 1460},
		{"empty", []int{0, 0, 5}, 1460},
		{"full segment", []int{1440, 1440, 1440}, 1460},
		{"several in a segment", []int{10, 300, 1, 0, 77, 500}, 1460},
		{"misaligned", []int{1000, 1000, 1000, 1000, 1000}, 1460},
		{"header across segments", []int{1438, 100}, 1460},
		{"byte by byte", []int{1, 0, 200, 40}, 1},
		{"large", []int{65000}, 1460},
		{"large, byte by byte", []int{65000}, 1},
		{"largest", []int{most, 1, most}, 1460},
		{"in jumbo segments", []int{40000, 3, 20000}, 9000},
	} {
		for _, src := range []string{"chunk", "copy"} {
			t.Run(c.name+"/"+src, func(t *testing.T) {
				r := newRig(t, rigConfig{innerWnd: 1 << 20, shift: 7})
				var b, want []byte
				for i, n := range c.frames {
					p := content(uint64(i*1000), 0, n)
					want = append(want, p...)
					b = append(b, r.seal(0, p)...)
				}
				for o := 0; o < len(b); {
					n := min(c.seg, len(b)-o)
					f := r.peerFrame(seg{o: int64(o), data: b[o : o+n]})
					if src == "copy" {
						r.e.OuterFrame(f, r.now)
						r.drain()
					} else {
						r.outerFrames(f)
					}
					o += n
				}
				r.advance(50 * time.Millisecond)
				if !bytes.Equal(r.got, want) {
					t.Fatalf("delivered %d bytes, want %d", len(r.got), len(want))
				}
				if a := r.acks(); a[len(a)-1] != int64(len(b)) {
					t.Errorf("acknowledged %d of %d", a[len(a)-1], len(b))
				}
				o := r.sealed
				r.stream(o, r.seal(crypto.FlagFIN, nil), 1460, packet.FIN)
				if !r.eof {
					t.Error("no end-of-file")
				}
			})
		}
	}
}

func TestFramesOutOfOrder(t *testing.T) {
	for _, sack := range []bool{false, true} {
		t.Run(fmt.Sprint("sack ", sack), func(t *testing.T) {
			r := newRig(t, rigConfig{sack: sack, innerWnd: 1 << 20, shift: 7})
			var b, want []byte
			for i := range 12 {
				p := content(uint64(i), 0, 100+900*(i%3))
				want = append(want, p...)
				b = append(b, r.seal(0, p)...)
			}
			// Pieces of 700 bytes, backwards, each also with an overlap.
			for o := len(b) / 700 * 700; o > 0; o -= 700 {
				r.forget()
				r.outer(seg{o: int64(o), data: b[o:min(o+900, len(b))]})
				if len(r.outs) != 1 || r.outs[0].a != 0 {
					t.Fatalf("piece at %d: answered by %v", o, r.acks())
				}
				if n := int(r.outs[0].NSACK); n != b2i(sack) {
					t.Fatalf("piece at %d: %d SACK blocks", o, n)
				}
				if sack {
					if k := r.outs[0].SACK[0]; k != [2]uint32{seqOf(rigIRS, uint64(o)), seqOf(rigIRS, uint64(len(b)))} {
						t.Fatalf("SACK block %v at %d", k, o)
					}
				}
			}
			if len(r.got) != 0 {
				t.Fatal("delivered out of order")
			}
			r.outer(seg{o: 0, data: b[:700]})
			r.advance(50 * time.Millisecond)
			if !bytes.Equal(r.got, want) {
				t.Fatalf("delivered %d bytes, want %d", len(r.got), len(want))
			}
		})
	}
}

// A segment that begins with bytes that are known already counts from where it
// is new, wherever its frames lie in it.
func TestOverlap(t *testing.T) {
	var sizes = []int{700, 30, 1000, 600, 900}
	for _, step := range []int{100, 333, 700} {
		r := newRig(t, rigConfig{})
		var b, want []byte
		for i, n := range sizes {
			p := content(uint64(i), 0, n)
			want = append(want, p...)
			b = append(b, r.seal(0, p)...)
		}
		for o := 0; o < len(b); o += step {
			r.outer(seg{o: int64(o), data: b[o:min(o+1460, len(b))]})
		}
		if !bytes.Equal(r.got, want) {
			t.Errorf("step %d: delivered %d bytes, want %d", step, len(r.got), len(want))
		}
	}
}

func TestSACKBlocksNewestFirst(t *testing.T) {
	r := newRig(t, rigConfig{sack: true})
	b := r.seal(0, content(0, 0, 10000))
	at := []int64{8000, 2000, 6000, 4000, 9000}
	for _, o := range at {
		r.outer(seg{o: o, data: b[o : o+100]})
	}
	p := r.outs[len(r.outs)-1]
	if p.NSACK != 4 {
		t.Fatalf("%d SACK blocks", p.NSACK)
	}
	for i := range 4 {
		o := uint64(at[len(at)-1-i])
		if p.SACK[i] != [2]uint32{seqOf(rigIRS, o), seqOf(rigIRS, o+100)} {
			t.Errorf("block %d is %v, want [%d,%d)", i, p.SACK[i], o, o+100)
		}
	}
	// A duplicate is told as DSACK, once, before the others (RFC 2883).
	r.forget()
	r.outer(seg{o: 2000, data: b[2000:2100]})
	p = r.outs[0]
	if p.SACK[0] != [2]uint32{seqOf(rigIRS, 2000), seqOf(rigIRS, 2100)} {
		t.Errorf("DSACK is %v", p.SACK[0])
	}
	r.outer(seg{o: 0, data: b[:100]})
	r.forget()
	r.outer(seg{o: 0, data: b[:100]})
	if p = r.outs[0]; p.a != 100 || p.SACK[0] != [2]uint32{seqOf(rigIRS, 0), seqOf(rigIRS, 100)} {
		t.Errorf("DSACK below the acknowledgement: ack %d %v", p.a, p.SACK[:p.NSACK])
	}
}

// A frame of 64 KB must pass a receive buffer of 4 KB (T13).
func TestLargeFrameSmallBuffer(t *testing.T) {
	for _, size := range []int{5000, 65000, crypto.MaxPlain - 1} {
		r := newRig(t, rigConfig{innerWnd: 4096})
		want := content(3, 0, size)
		b := append(r.seal(0, want), r.seal(crypto.FlagFIN, nil)...)
		edge, o := int64(4096), int64(0)
		for steps := 0; o < int64(len(b)); steps++ {
			if steps > 200 {
				t.Fatalf("size %d: stuck at %d of %d, edge %d", size, o, len(b), edge)
			}
			n := min(1460, edge-o, int64(len(b))-o)
			if n > 0 {
				r.outer(seg{o: o, data: b[o : o+n]})
				o += n
			} else {
				r.advance(250 * time.Millisecond)
			}
			for _, p := range r.outs {
				edge = max(edge, p.a+int64(p.Wnd))
			}
		}
		r.advance(time.Second)
		if !bytes.Equal(r.got, want) {
			t.Fatalf("size %d: delivered %d bytes", size, len(r.got))
		}
		if !r.eof {
			t.Errorf("size %d: no end-of-file", size)
		}
		for i, p := range r.ins {
			if p.Len() > 0 && p.Len() > 4096 {
				t.Errorf("packet %d brings %d bytes into a buffer of 4096", i, p.Len())
			}
		}
	}
}

// Every second segment is acknowledged while a frame is incomplete (T1).
func TestAckScheduleInsideFrame(t *testing.T) {
	r := newRig(t, rigConfig{})
	b := r.seal(0, content(0, 0, 65000-1000))
	last := int64(0)
	for i := range 10 {
		o := int64(i * 1460)
		r.outer(seg{o: o, data: b[o : o+1460]})
		for _, a := range r.acks() {
			last = max(last, a)
		}
		if behind := o + 1460 - last; i > 0 && behind > 2*1460 {
			t.Errorf("segment %d: %d bytes are not acknowledged", i, behind)
		}
	}
	if n := len(r.outs); n < 4 || n > 10 {
		t.Errorf("%d ACKs of 10 segments", n)
	}
	// The odd one is acknowledged by the timer.
	r.outer(seg{o: 14600, data: b[14600:14700]})
	r.advance(delayedAck)
	if a := r.acks(); a[len(a)-1] != 14700 {
		t.Errorf("acknowledged %d after the delay", a[len(a)-1])
	}
}

// Every second segment is acknowledged, too, when little or nothing of it is for the
// inner stack, and when a device has merged the ones before.
func TestAckScheduleOfSmallFrames(t *testing.T) {
	for _, size := range []int{0, 1, 60} {
		r := newRig(t, rigConfig{})
		r.auto = false // it delays its ACK
		o, last := int64(0), int64(0)
		next := func(n int) {
			var b []byte
			for len(b) < n {
				b = append(b, r.seal(0, make([]byte, size))...)
			}
			r.outer(seg{o: o, data: b})
			o += int64(len(b))
		}
		next(9000)
		for i := range 10 {
			next(1440)
			for _, a := range r.acks() {
				last = max(last, a)
			}
			if behind := o - last; i > 0 && behind > 2*1460 {
				t.Errorf("frames of %d bytes, segment %d: %d bytes are not acknowledged", size, i, behind)
			}
		}
		if n := len(r.outs); n > 11 {
			t.Errorf("frames of %d bytes: %d ACKs of 11 segments", size, n)
		}
	}
}

// --- frames that are not right ---

func TestBadFrames(t *testing.T) {
	flip := func(at int) func(r *rig, b []byte) []byte {
		return func(r *rig, b []byte) []byte { b[at] ^= 1; return b }
	}
	short := func(clen uint16) func(r *rig, b []byte) []byte {
		return func(r *rig, b []byte) []byte { binary.BigEndian.PutUint16(b[1:], clen); return b }
	}
	for _, c := range []struct {
		name   string
		forge  func(r *rig, b []byte) []byte
		reason string
	}{
		{"ciphertext", flip(50), ReasonAuth},
		{"tag", flip(119), ReasonAuth},
		{"reserved control bit", flip(0), ReasonAuth},
		{"clen 0", short(0), ReasonFrameLength},
		{"clen below the tag", short(15), ReasonFrameLength},
		{"clen with the tag alone", short(16), ReasonFrameLength},
		{"shorter clen", short(90), ReasonAuth},
		{"replay", func(r *rig, b []byte) []byte { return r.seal(0, nil)[:0] }, ReasonAuth},
		{"plaintext", func(r *rig, b []byte) []byte { return append([]byte{0, 0, 60}, content(0, 0, 60)...) }, ReasonAuth},
		{"wrong generation", func(r *rig, b []byte) []byte {
			r.sealed -= uint64(len(b))
			b = r.sealWith(crypto.ControlRekey, 0, content(0, 100, 100))
			b[0] = 0
			return b
		}, ReasonAuth},
		{"no urgent field", func(r *rig, b []byte) []byte {
			r.sealed -= uint64(len(b))
			return r.seal(crypto.FlagURG, []byte{1})
		}, ReasonFrameFormat},
	} {
		for _, n := range []int{1, 7, 1460} {
			t.Run(fmt.Sprintf("%s/%d", c.name, n), func(t *testing.T) {
				r := newRig(t, rigConfig{engine: EngineConfig{TCPKeepalive: true}})
				first := content(9, 0, 100)
				good := r.seal(0, first)
				bad := r.seal(0, content(0, 100, 100))
				bad = c.forge(r, bad)
				if c.name == "replay" {
					bad = bytes.Clone(good)
				}
				r.inner(seg{data: []byte("hello")})
				r.stream(0, bytes.Clone(good), n, 0)
				r.advance(100 * time.Millisecond)
				r.forget()
				for o := 0; o < len(bad) && r.ended() == ""; o += n {
					r.outer(seg{o: int64(len(good) + o), data: bad[o:min(o+n, len(bad))]})
				}
				r.wantEnded(c.reason)
				if !bytes.Equal(r.got, first) || r.eof {
					t.Errorf("delivered %d bytes, end-of-file %v", len(r.got), r.eof)
				}
				r.wantResets(25, 100)
				r.gone()
			})
		}
	}
}

// wantResets checks that both sides were reset, at the numbers they expect.
func (r *rig) wantResets(outer, inner int64) {
	r.t.Helper()
	out, in := resets(r.outs), resets(r.ins)
	if len(out) != 1 || out[0].o != outer {
		r.t.Errorf("%d resets to the peer, %+v, want one at %d", len(out), out, outer)
	}
	// It may acknowledge data that came just before, and is reset once more.
	if len(in) == 0 || slices.ContainsFunc(in, func(p pkt) bool { return p.o != inner }) {
		r.t.Errorf("%d resets to the inner stack, %+v, want them at %d", len(in), in, inner)
	}
}

// Whole frames before a bad one in the same segment are authentic: they are
// delivered, and the reason is that of the first bad frame. An inner stack that has
// not acknowledged the end of its handshake has got it.
func TestBadFrameBehindGood(t *testing.T) {
	flip := func(b []byte) []byte { b[len(b)-1] ^= 1; return b }
	short := []byte{0, 0, 5, 1, 2, 3, 4, 5}
	for _, c := range []struct {
		name   string
		bad    func(r *rig) []byte
		fin    byte
		reason string
	}{
		{"tag", func(r *rig) []byte { return flip(r.seal(0, content(0, 100, 100))) }, 0, ReasonAuth},
		{"too short", func(r *rig) []byte { return short }, 0, ReasonFrameLength},
		{"tag, then too short", func(r *rig) []byte { return append(flip(r.seal(0, content(0, 100, 100))), short...) }, 0, ReasonAuth},
		{"after FINp", func(r *rig) []byte { return r.seal(0, content(0, 100, 100)) }, crypto.FlagFIN, ReasonDataAfterFINp},
	} {
		for _, src := range []string{"chunk", "copy", "opening"} {
			t.Run(c.name+"/"+src, func(t *testing.T) {
				r := newRig(t, rigConfig{active: src == "opening"})
				b := r.seal(c.fin, content(0, 0, 100))
				b = append(b, c.bad(r)...)
				if src == "copy" {
					r.e.OuterFrame(r.peerFrame(seg{data: b}), r.now)
					r.drain()
				} else {
					r.outer(seg{data: b})
				}
				r.wantEnded(c.reason)
				if !bytes.Equal(r.got, content(0, 0, 100)) || r.eof {
					t.Errorf("delivered %d bytes, end-of-file %v", len(r.got), r.eof)
				}
				r.wantResets(0, 100)
				r.gone()
			})
		}
	}
}

// Whole frames before a bad one in the same vector are authentic, the
// end-of-file must not be made up.
func TestAbortReleasesOutOfOrder(t *testing.T) {
	r := newRig(t, rigConfig{chunks: 64})
	a, b := r.seal(0, content(0, 0, 1000)), r.seal(0, content(0, 1000, 1000))
	c := r.seal(0, content(0, 2000, 1000))
	binary.BigEndian.PutUint16(c[1:], 3)
	d := r.seal(0, content(0, 3000, 1000))
	n := int64(len(a))
	r.outer(seg{o: 3 * n, data: d})
	r.outer(seg{o: 2 * n, data: c})
	r.outer(seg{o: n, data: b})
	r.outer(seg{o: 0, data: a})
	r.wantEnded(ReasonFrameLength)
	r.gone()
}

// What was delivered before a reset in the same vector must survive until it
// was read, whatever the rest of the vector needs memory for.
func TestResetAfterDataInOneVector(t *testing.T) {
	for _, size := range []int{100, 1200} {
		r := newRig(t, rigConfig{})
		other := r.secondFlow()
		want := content(5, 0, 3*size)
		var ss []seg
		for i := range 3 {
			o := int64(r.sealed)
			ss = append(ss, seg{o: o, data: r.seal(0, want[i*size:(i+1)*size])})
		}
		ss = append(ss, seg{o: int64(r.sealed), flags: packet.RST})
		var frames [][]byte
		for _, s := range ss {
			frames = append(frames, r.peerFrame(s))
		}
		// Segments of another flow: out of order, so each is answered at once.
		frames = append(frames, other...)
		r.outerFrames(frames...)
		r.wantEnded(ReasonPeerReset)
		if !bytes.Equal(r.got, want) {
			t.Errorf("size %d: delivered bytes were overwritten", size)
		}
	}
}

// secondFlow installs another flow and returns segments for it that make the
// engine take memory and answer.
func (r *rig) secondFlow() (frames [][]byte) {
	c := r.c
	c.port++
	o := &rig{t: r.t, c: c, u: r.u, e: r.e, now: r.now, auto: true, autoWnd: uint64(c.innerWnd)}
	o.install()
	b := o.seal(0, content(77, 0, 20000))
	for i := int64(1); i < 12; i++ {
		frames = append(frames, o.peerFrame(seg{o: i * 1200, data: b[i*1200 : i*1200+100+1000*(i&1)]}))
	}
	return frames
}

// --- the end of the stream ---

func TestEndOfStream(t *testing.T) {
	data := content(1, 0, 500)
	type step func(r *rig)
	fin := func(flags uint8, frameFlags byte, d []byte) step {
		return func(r *rig) {
			o := int64(r.sealed)
			r.outer(seg{o: o, data: r.seal(frameFlags, d), flags: flags})
		}
	}
	for _, c := range []struct {
		name   string
		steps  []step
		wait   time.Duration
		reason string // "" lives on
		eof    bool
		got    int
	}{
		{"FIN and FINp with data", []step{fin(packet.FIN, crypto.FlagFIN, data)}, 2 * time.Second, "", true, 500},
		{"FIN and FINp without data", []step{fin(0, 0, data), fin(packet.FIN, crypto.FlagFIN, nil)}, 2 * time.Second, "", true, 500},
		{"FINp alone", []step{fin(0, crypto.FlagFIN, data)}, 2 * time.Second, "", true, 500},
		{"FINp, later FIN", []step{fin(0, crypto.FlagFIN, data), func(r *rig) { r.outer(seg{o: int64(r.sealed), flags: packet.FIN}) }}, 2 * time.Second, "", true, 500},
		{"FIN without FINp", []step{fin(packet.FIN, 0, data)}, 2 * time.Second, ReasonTruncated, false, 500},
		{"bare FIN", []step{func(r *rig) { r.outer(seg{flags: packet.FIN}) }}, 2 * time.Second, ReasonTruncated, false, 0},
		{"bare FIN, not yet waited for", []step{func(r *rig) { r.outer(seg{flags: packet.FIN}) }}, finWait / 2, "", false, 0},
		{"FIN inside a frame", []step{func(r *rig) {
			r.outer(seg{o: 0, data: r.seal(crypto.FlagFIN, data)[:300], flags: packet.FIN})
		}}, 2 * time.Second, ReasonTruncated, false, 0},
		{"FIN inside a header", []step{fin(0, 0, data), func(r *rig) {
			o := int64(r.sealed)
			r.outer(seg{o: o, data: r.seal(crypto.FlagFIN, data)[:2], flags: packet.FIN})
		}}, 2 * time.Second, ReasonTruncated, false, 500},
		{"forged FIN inside a frame, then the rest", []step{func(r *rig) {
			b := r.seal(crypto.FlagFIN, data)
			r.outer(seg{o: 0, data: b[:300], flags: packet.FIN})
			r.outer(seg{o: 300, data: b[300:], flags: packet.FIN})
		}}, 2 * time.Second, "", true, 500},
		{"forged bare FIN, then the stream", []step{
			func(r *rig) { r.outer(seg{flags: packet.FIN}) }, fin(0, 0, data), fin(packet.FIN, crypto.FlagFIN, nil),
		}, 2 * time.Second, "", true, 500},
		{"FIN before the data", []step{func(r *rig) {
			b := r.seal(crypto.FlagFIN, data)
			r.outer(seg{o: 300, data: b[300:], flags: packet.FIN})
			r.outer(seg{o: 0, data: b[:300]})
		}}, 2 * time.Second, "", true, 500},
		{"data after FINp", []step{fin(0, crypto.FlagFIN, data), fin(0, 0, data)}, 0, ReasonDataAfterFINp, true, 500},
		{"empty frame after FINp", []step{fin(0, crypto.FlagFIN, data), fin(0, 0, nil)}, 0, ReasonDataAfterFINp, true, 500},
		{"data after FINp in one vector", []step{func(r *rig) {
			b := append(r.seal(crypto.FlagFIN, data), r.seal(0, data)...)
			r.outer(seg{o: 0, data: b})
		}}, 0, ReasonDataAfterFINp, false, 500},
		{"part of a frame between FINp and FIN", []step{fin(0, crypto.FlagFIN, data), func(r *rig) {
			r.outer(seg{o: int64(r.sealed), data: make([]byte, 2), flags: packet.FIN})
		}}, 0, ReasonDataAfterFINp, true, 500},
		{"second FINp", []step{fin(0, crypto.FlagFIN, data), fin(packet.FIN, crypto.FlagFIN, nil)}, 0, ReasonDataAfterFINp, true, 500},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			for _, s := range c.steps {
				s(r)
			}
			for _, p := range r.outs {
				if c.reason == ReasonTruncated && p.Flags&packet.RST == 0 && p.a > int64(r.sealed) {
					t.Errorf("acknowledges a FIN without FINp: %d", p.a)
				}
			}
			r.advance(c.wait)
			r.wantEnded(c.reason)
			if r.eof != c.eof || c.got != len(r.got) {
				t.Errorf("end-of-file %v, want %v; delivered %d bytes, want %d", r.eof, c.eof, len(r.got), c.got)
			}
			if c.reason != "" {
				n := int64(len(r.got))
				if r.eof {
					n++
				}
				r.wantResets(0, n)
				r.gone()
			}
		})
	}
}

// closeBoth ends both directions.
func (r *rig) closeBoth() {
	r.t.Helper()
	o := int64(r.sealed)
	r.outer(seg{o: o, data: r.seal(crypto.FlagFIN, nil), flags: packet.FIN})
	r.inner(seg{flags: packet.FIN, o: int64(r.f.sealI)})
	last := r.outs[len(r.outs)-1]
	if last.Flags&packet.FIN == 0 {
		r.t.Fatalf("no FIN to the peer: %s", segText(last.Frame))
	}
	r.outer(seg{o: int64(r.sealed) + 1, ack: last.o + int64(last.Len()) + 1})
	r.wantEnded(ReasonClosed)
}

// After the end late packets are still answered, with the right numbers (T20).
func TestLinger(t *testing.T) {
	r := newRig(t, rigConfig{ts: true})
	r.inner(seg{data: content(0, 0, 100)})
	r.closeBoth()
	end := int64(len(r.wire)) + 1
	r.forget()
	r.outer(seg{o: int64(r.sealed), flags: packet.FIN, ack: end})
	if len(r.outs) != 1 || r.outs[0].a != int64(r.sealed)+1 || r.outs[0].o != end || r.outs[0].Flags != packet.ACK {
		t.Fatalf("repeated FIN is answered by %+v", r.outs)
	}
	r.forget()
	r.inner(seg{o: 100, flags: packet.FIN})
	if len(r.ins) != 1 || r.ins[0].a != 101 || r.ins[0].o != 1 || r.ins[0].Flags != packet.ACK {
		t.Fatalf("repeated inner FIN is answered by %+v", r.ins)
	}
	r.forget()
	r.outer(seg{o: int64(r.sealed) + 1, ack: end})
	r.inner(seg{o: 101})
	if len(r.outs)+len(r.ins) != 0 {
		t.Error("a pure ACK is answered")
	}
	r.advance(lingerLong)
	if len(r.events) != 1 || r.events[0].Kind != FlowGone || r.events[0].Destroy {
		t.Fatalf("events %+v", r.events)
	}
	r.gone()
}

// The inner stack of the side that closed last may miss its last ACK, too, when it
// has backed off: what it sends again must find the flow for as long as that takes.
func TestLingerForInnerStack(t *testing.T) {
	r := newRig(t, rigConfig{})
	d := content(0, 0, 100)
	r.inner(seg{data: bytes.Clone(d)})
	o := int64(r.sealed)
	r.outer(seg{o: o, data: r.seal(crypto.FlagFIN, nil), flags: packet.FIN})
	r.inner(seg{o: 100, flags: packet.FIN})
	rto := minRTO
	for ; rto < 30*time.Second; rto *= 2 {
		r.advance(rto)
		r.inner(seg{data: bytes.Clone(d), flags: packet.FIN})
	}
	// Both the ACK of this and the answers to what follows get lost.
	r.outer(seg{o: int64(r.sealed) + 1, ack: int64(r.f.sealO)})
	r.wantEnded(ReasonClosed)
	for range 3 {
		r.advance(rto)
		r.forget()
		r.inner(seg{data: bytes.Clone(d), flags: packet.FIN})
		if len(r.ins) != 1 || r.ins[0].a != 101 || len(r.outs)+len(r.events) != 0 {
			t.Fatalf("%v later: answered by %+v, outside %+v, events %+v", rto, r.ins, r.outs, r.events)
		}
		rto *= 2
	}
	r.advance(3 * rto)
	r.gone()
}

// An attacker has a connection aborted and opens a plain one on its ports at
// once: data that the local stack had sent before it heard of the abort must not
// pass for the new connection's.
func TestSYNRightAfterReset(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{data: make([]byte, 100)}, seg{o: 100, data: make([]byte, 100)})
	r.outer(seg{flags: packet.RST})
	r.forget()
	r.outer(seg{flags: packet.SYN, noAck: true, o: 12345})
	r.inner(seg{data: content(0, 0, 1000)})
	if len(r.events) != 0 || len(withData(r.outs)) != 0 {
		t.Errorf("events %+v, %d segments with data to the wire", r.events, len(withData(r.outs)))
	}
}

// When both directions have ended, the peer may be gone while a slow reader has
// not taken everything: custody survives keep-alives and the peer's resets.
func TestCustodyOutlivesPeer(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 1000, rxEdge: 60000})
	r.auto = false
	want := content(3, 0, 3000)
	f := r.seal(crypto.FlagFIN, want)
	o := int64(0)
	for len(f) > 0 {
		n := min(len(f), 1400)
		fl := uint8(0)
		if n == len(f) {
			fl = packet.FIN
		}
		r.outer(seg{o: o, data: f[:n], flags: fl})
		f, o = f[n:], o+int64(n)
	}
	r.inner(seg{flags: packet.FIN, ack: -1, wnd: 1000})
	last := r.outs[len(r.outs)-1]
	end := last.o + int64(last.Len()) + 1
	r.outer(seg{o: o + 1, ack: end})
	r.forget()
	r.inner(seg{o: 0, ack: -1, wnd: 1000})
	if len(r.outs) != 0 || len(r.ins) != 1 {
		t.Errorf("a keep-alive makes %d packets outward and %d inward", len(r.outs), len(r.ins))
	}
	r.outer(seg{o: o + 1, flags: packet.RST, ack: end})
	if why := r.ended(); why != "" || len(resets(r.ins)) > 0 {
		t.Fatalf("a reset of the peer ends the flow: %q", why)
	}
	r.got = append(r.got, want[:1000]...)
	r.auto, r.autoWnd = true, 60000
	r.inner(seg{o: 1})
	r.inner(seg{o: 1})
	if !bytes.Equal(r.got, want) || !r.eof {
		t.Errorf("delivered %d bytes of %d, end-of-file %v", len(r.got), len(want), r.eof)
	}
	r.wantEnded(ReasonClosed)
	r.gone()
}

// Ports are used again: the old flow goes, the slow path gets the SYN (T20).
func TestPortsReused(t *testing.T) {
	syn := seg{flags: packet.SYN, noAck: true, o: 12345}
	for _, c := range []struct {
		name  string
		setup func(r *rig)
		dir   packet.Direction
		kinds []EventKind
	}{
		{"outer SYN after close", (*rig).closeBoth, packet.FromOuter, []EventKind{FlowGone, SlowFrame}},
		{"inner SYN after close", (*rig).closeBoth, packet.FromInner, []EventKind{FlowGone, SlowFrame}},
		{"outer SYN after reset", func(r *rig) { r.outer(seg{flags: packet.RST}); r.advance(resetQuiet) }, packet.FromOuter, []EventKind{FlowGone, SlowFrame}},
		{"inner SYN after reset", func(r *rig) { r.outer(seg{flags: packet.RST}) }, packet.FromInner, []EventKind{FlowGone, SlowFrame}},
		{"inner SYN in a live flow", func(r *rig) { r.inner(seg{data: content(0, 0, 3000), gso: 1440}) }, packet.FromInner, []EventKind{FlowEnded, FlowGone, SlowFrame}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			c.setup(r)
			r.forget()
			if c.dir == packet.FromOuter {
				r.outer(syn)
			} else {
				r.inner(syn)
			}
			if len(r.events) != len(c.kinds) {
				t.Fatalf("events %+v", r.events)
			}
			for i, k := range c.kinds {
				if r.events[i].Kind != k {
					t.Fatalf("event %d is %+v", i, r.events[i])
				}
				// A socket that missed the reset would go on in plaintext. The
				// other SYNs say themselves that it is gone.
				if destroy := c.name == "outer SYN after reset"; k == FlowGone && r.events[i].Destroy != destroy {
					t.Errorf("destroy is %v", r.events[i].Destroy)
				}
			}
			if ev := r.events[len(r.events)-1]; ev.Dir != c.dir || len(ev.Frame) == 0 {
				t.Errorf("slow path gets %+v", ev)
			}
			if len(r.outs)+len(r.ins) != 0 {
				t.Errorf("%d and %d packets sent", len(r.outs), len(r.ins))
			}
			r.gone()
		})
	}
}

// --- validity (T12, T15) ---

func TestResetsAndSYNs(t *testing.T) {
	const at = 120 // rcv_nxt: 100 bytes of plaintext were delivered
	for _, c := range []struct {
		name    string
		s       seg
		reason  string
		answers int
	}{
		{"exact", seg{o: at, flags: packet.RST}, ReasonPeerReset, 0},
		{"exact without ACK", seg{o: at, flags: packet.RST, noAck: true}, ReasonPeerReset, 0},
		{"one above", seg{o: at + 1, flags: packet.RST}, "", 1},
		{"in the window", seg{o: at + 5000, flags: packet.RST}, "", 1},
		{"below", seg{o: at - 1, flags: packet.RST}, "", 0},
		{"plaintext number", seg{o: 100, flags: packet.RST}, "", 0},
		{"above the window", seg{o: at + 1<<20, flags: packet.RST}, "", 0},
		{"exact, bad checksum", seg{o: at, flags: packet.RST, badSum: true}, "", 0},
		{"SYN in the window", seg{o: at, flags: packet.SYN, noAck: true}, "", 1},
		{"SYN below", seg{o: -500, flags: packet.SYN, noAck: true}, "", 1},
		{"SYN-ACK of the handshake", seg{o: -1, flags: packet.SYN}, "", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			r.outer(seg{data: r.seal(0, content(0, 0, 100))})
			r.forget()
			r.outer(c.s)
			r.wantEnded(c.reason)
			if c.reason != "" {
				if in := resets(r.ins); len(in) != 1 || in[0].o != 100 {
					t.Errorf("inner resets %+v", in)
				}
				if len(resets(r.outs)) != 0 {
					t.Error("a reset is answered by a reset")
				}
				r.gone()
				return
			}
			if len(r.outs) != c.answers || len(r.ins) != 0 {
				t.Fatalf("%d answers, want %d; %d packets inward", len(r.outs), c.answers, len(r.ins))
			}
			for _, p := range r.outs {
				if p.Flags != packet.ACK || p.a != at || p.o != 0 {
					t.Errorf("challenge ACK %s", segText(p.Frame))
				}
			}
			// The flow is as it was.
			r.outer(seg{o: at, data: r.seal(0, content(0, 100, 50))})
			if !bytes.Equal(r.got, content(0, 0, 150)) {
				t.Errorf("delivered %d bytes", len(r.got))
			}
		})
	}
}

func TestChallengeLimit(t *testing.T) {
	r := newRig(t, rigConfig{})
	for range 500 {
		r.outer(seg{o: 77, flags: packet.RST})
	}
	if n := len(r.outs); n == 0 || n > 20 {
		t.Errorf("%d challenge ACKs for 500 resets in a moment", n)
	}
}

func TestAckRange(t *testing.T) {
	for _, c := range []struct {
		name string
		ack  int64
		una  int64 // what the inner stack is told, after sending 100 bytes
	}{
		{"nothing new", -1, 0},
		{"all", 120, 100},
		{"a part", 54, 50},
		{"the header alone", 4, 0},
		{"all but the tag", 119, 99},
		{"one beyond", 121, 0},
		{"far beyond", 100000, 0},
		{"half the space away", 1 << 31, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			r.inner(seg{data: content(0, 0, 100)})
			r.forget()
			r.outer(seg{ack: c.ack, data: r.seal(0, []byte("x"))})
			for _, p := range r.ins {
				if p.a != c.una {
					t.Errorf("inner acknowledgement %d, want %d", p.a, c.una)
				}
			}
			if beyond := c.ack > 120; beyond != (len(r.got) == 0) {
				t.Errorf("data of a segment that acknowledges %d: delivered %q", c.ack, r.got)
			}
			if r.f.ackI != uint64(c.una) {
				t.Errorf("una %d", r.f.ackI)
			}
		})
	}
}

// An acknowledgement that was overtaken says nothing about the window.
func TestOldAck(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 3000})
	r.inner(seg{data: content(0, 0, 1000)})
	r.outer(seg{wnd: 500})
	r.forget()
	r.outer(seg{ack: -1, wnd: 60000})
	if len(r.ins) != 0 || r.f.edgeO != 1020+500 {
		t.Errorf("old ACK: %d packets inward, edge %d", len(r.ins), r.f.edgeO)
	}
}

func TestPAWS(t *testing.T) {
	r := newRig(t, rigConfig{ts: true})
	r.outer(seg{data: r.seal(0, []byte("a"))})
	old := r.peerTS - 3
	b := r.seal(0, []byte("b"))
	r.forget()
	r.outer(seg{o: 21, data: b, ts: old})
	if string(r.got) != "a" || len(r.outs) != 1 || r.outs[0].a != 21 {
		t.Fatalf("old timestamp: delivered %q, answers %v", r.got, r.acks())
	}
	if r.outs[0].TSecr != r.peerTS {
		t.Errorf("TSecr %d, want %d", r.outs[0].TSecr, r.peerTS)
	}
	r.outer(seg{o: 21, data: b, ts: r.peerTS})
	if string(r.got) != "ab" {
		t.Errorf("equal timestamp: delivered %q", r.got)
	}
	// The reset of somebody whose clock restarted is exact enough.
	r.outer(seg{o: 42, flags: packet.RST, ts: old})
	r.wantEnded(ReasonPeerReset)
}

// A timestamp of 0 in the SYN, and one of long ago, say nothing about the next.
func TestTimestampsThatDoNotCount(t *testing.T) {
	for _, idle := range []bool{false, true} {
		r := newRig(t, rigConfig{ts: true})
		r.outer(seg{data: r.seal(0, []byte("a"))})
		if idle {
			r.advance(pawsIdle + 2*patrolEvery)
		} else {
			r.f.tsRemote = 0
		}
		r.peerTS += 3 << 30
		r.outer(seg{o: 21, data: r.seal(0, []byte("b"))})
		if string(r.got) != "ab" || r.f.tsRemote != r.peerTS {
			t.Errorf("idle %v: delivered %q, newest timestamp %d, want %d", idle, r.got, r.f.tsRemote, r.peerTS)
		}
		r.advance(patrolEvery)
		r.outer(seg{o: 42, data: r.seal(0, []byte("c")), ts: r.peerTS - 1})
		if string(r.got) != "ab" {
			t.Errorf("idle %v: after that, an old timestamp is taken", idle)
		}
	}
}

// An inner stack that drops what it has no memory for takes window back to say so.
// It gets that again as soon as there is window, and nothing behind it before.
func TestInnerWindowTakenBack(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 8100})
	r.auto = false
	for k := range uint64(7) {
		o := int64(r.sealed)
		r.outer(seg{o: o, data: r.seal(0, content(1, 1000*k, 1000))})
	}
	if r.f.sntI != 7000 {
		t.Fatalf("sent %d of 7000 bytes", r.f.sntI)
	}
	for _, c := range []struct{ ack, wnd, from, to int64 }{
		{0, 0, 0, 0},
		{0, 3000, 0, 3000},
		{2000, 500, 2500, 2500},
		{2000, 4000, 2500, 6000},
		{6000, 2000, 6000, 7000},
	} {
		r.forget()
		wnd := int(c.wnd)
		if wnd == 0 {
			wnd = -1
		}
		ack := c.ack
		if ack == 0 {
			ack = -1
		}
		r.inner(seg{ack: ack, wnd: wnd})
		at := c.from
		for _, p := range r.ins {
			if p.Len() == 0 {
				continue
			}
			if p.o != at {
				t.Errorf("acknowledged %d, window %d: a segment at %d, want %d", c.ack, c.wnd, p.o, at)
			}
			at = p.o + int64(p.Len())
		}
		if at != c.to {
			t.Errorf("acknowledged %d, window %d: sent to %d, want %d", c.ack, c.wnd, at, c.to)
		}
	}
}

// What waits above a gap when the inner stack takes its window back, as Linux does
// with tcp_shrink_window, must not keep out what fills the gap.
func TestGapFilledAfterShrink(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 1 << 20, shift: 7})
	b := r.seal(0, content(1, 0, 1000))
	var rest []byte
	for k := uint64(1000); k < 201000; k += 1000 {
		rest = append(rest, r.seal(0, content(1, k, 1000))...)
	}
	for k := 0; k < len(rest); k += 1460 {
		r.outer(seg{o: int64(len(b) + k), data: rest[k:min(k+1460, len(rest))]})
	}
	if r.f.oooBytes != len(rest) {
		t.Fatalf("%d of %d bytes wait", r.f.oooBytes, len(rest))
	}
	r.autoWnd = 3000
	r.inner(seg{wnd: 3000 >> 7})
	r.outer(seg{o: 0, data: b})
	for range 100 {
		r.advance(maxInnerRTO)
	}
	if !bytes.Equal(r.got, content(1, 0, 201000)) {
		t.Errorf("delivered %d of 201000 bytes", len(r.got))
	}
}

func TestBeyondWindow(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 2000})
	b := r.seal(0, content(0, 0, 5000))
	// The window is that of the inner stack and the overhead of two frames.
	r.outer(seg{o: 2041, data: b[2041:3000]})
	if r.f.oooBytes != 0 {
		t.Errorf("%d bytes kept from beyond the window", r.f.oooBytes)
	}
	r.outer(seg{o: 1500, data: b[1500:2500]})
	if r.f.oooBytes != 540 {
		t.Errorf("%d bytes kept across the edge, want 540", r.f.oooBytes)
	}
}

// Junk before the table is only counted.
func TestNotASegment(t *testing.T) {
	r := newRig(t, rigConfig{})
	good := r.peerFrame(seg{data: r.seal(0, []byte("x"))})
	for n := range good {
		r.e.OuterFrame(good[:n], r.now)
	}
	r.drain()
	if len(r.got) != 0 || len(r.outs) != 0 || r.e.st.Malformed == 0 {
		t.Errorf("delivered %q, %d answers, %d malformed", r.got, len(r.outs), r.e.st.Malformed)
	}
	r.outer(seg{badSum: true, data: good[len(good)-21:]})
	if r.e.st.BadChecksum != 1 || len(r.got) != 0 {
		t.Errorf("%d bad checksums", r.e.st.BadChecksum)
	}
	r.outerFrames(good)
	if string(r.got) != "x" {
		t.Errorf("delivered %q", r.got)
	}
}

// Options that do not fit into the header are ignored: no segment is lost for
// them, neither of a flow nor on its way to the slow path.
func TestIllegalOptions(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{data: r.seal(0, []byte("x")), garbage: 4})
	if string(r.got) != "x" {
		t.Errorf("delivered %q", r.got)
	}
	stranger := r.peerFrame(seg{flags: packet.SYN, garbage: 4})
	binary.BigEndian.PutUint16(stranger[len(stranger)-24:], 4711)
	packet.FullChecksum(stranger, packet.EthLen, len(stranger)-24, false)
	r.outerFrames(stranger)
	if len(r.events) != 1 || r.events[0].Kind != SlowFrame {
		t.Errorf("events %+v", r.events)
	}
}

// --- rekeying (TC 3.8) ---

func TestPeerRekeys(t *testing.T) {
	for _, data := range []string{"", "data"} {
		r := newRig(t, rigConfig{})
		r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, []byte(data))})
		r.advance(time.Millisecond)
		fs := r.readFrames()
		if len(fs) != 1 || fs[0].control != crypto.ControlRekey || len(fs[0].data) != 0 {
			t.Fatalf("rekey with %q is answered by %+v", data, fs)
		}
		o := int64(r.sealed)
		r.outer(seg{o: o, data: r.seal(0, []byte("more"))})
		r.inner(seg{data: []byte("reply")})
		fs = r.readFrames()
		if len(fs) != 1 || fs[0].control != 0 || string(fs[0].data) != "reply" {
			t.Fatalf("then %+v", fs)
		}
		if string(r.got) != data+"more" {
			t.Errorf("delivered %q", r.got)
		}
	}
}

// The answer rides on data that is there in the same vector (T8).
func TestRekeyAnswerRidesOnData(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: -1})
	r.auto = false
	b := r.peerFrame(seg{data: r.sealWith(crypto.ControlRekey, 0, nil), wnd: 60000})
	// The vector of the inner side comes first and is held; then both go.
	r.inner(seg{data: []byte("reply")})
	r.outerFrames(b)
	r.advance(time.Millisecond)
	n := 0
	for _, f := range r.readFrames() {
		if f.control != 0 {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d frames with the rekey bit", n)
	}
}

// Several rekeys are all followed, one generation after the other.
func TestPeerRekeysRepeatedly(t *testing.T) {
	for _, vector := range []bool{false, true} {
		t.Run(fmt.Sprint("one vector ", vector), func(t *testing.T) {
			r := newRig(t, rigConfig{})
			var ss []seg
			for i := range 4 {
				o := int64(r.sealed)
				ss = append(ss, seg{o: o, data: r.sealWith(crypto.ControlRekey, 0, []byte{byte('a' + i)})})
			}
			if vector {
				r.outer(ss...)
			} else {
				for _, s := range ss {
					r.outer(s)
				}
			}
			r.inner(seg{data: []byte("x")})
			r.readFrames()
			if string(r.got) != "abcd" {
				t.Errorf("delivered %q", r.got)
			}
			if r.rxGen != 4 {
				t.Errorf("we are at generation %d, the peer at 4", r.rxGen)
			}
		})
	}
}

// We start, the peer answers: that is no rekey of its own.
func TestOwnRekey(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{RekeyFrames: 3}})
	for i := range 4 {
		r.inner(seg{o: int64(i), data: []byte{byte(i)}})
	}
	fs := r.readFrames()
	if len(fs) != 4 || fs[3].control != crypto.ControlRekey || fs[2].control != 0 {
		t.Fatalf("frames %+v", fs)
	}
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, nil)})
	r.advance(time.Millisecond)
	if fs = r.readFrames(); len(fs) != 0 {
		t.Errorf("the answer is answered: %+v", fs)
	}
}

// After FINp was sealed a rekey is followed but not answered.
func TestRekeyAfterFIN(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{flags: packet.FIN})
	r.readFrames()
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, []byte("a"))})
	o := int64(r.sealed)
	r.outer(seg{o: o, data: r.seal(0, []byte("b"))})
	r.advance(time.Millisecond)
	if fs := r.readFrames(); len(fs) != 0 {
		t.Errorf("frames after FINp: %+v", fs)
	}
	if string(r.got) != "ab" {
		t.Errorf("delivered %q", r.got)
	}
}

// --- sending ---

func TestSuperSegment(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		r := newRig(t, rigConfig{v6: v6, ts: true, vlan: 5, mss: 1440})
		want := content(4, 0, 20000)
		r.inner(seg{data: bytes.Clone(want), gso: 1408, flags: packet.FIN | packet.PSH})
		d := withData(r.outs)
		for i, p := range d {
			if last := i == len(d)-1; p.Len()+12 > 1440 || (p.Flags&packet.FIN != 0) != last || (p.Flags&packet.PSH != 0) != last {
				t.Errorf("segment %d: %s", i, segText(p.Frame))
			}
			if p.Key.VLAN != 5 {
				t.Errorf("VLAN %d", p.Key.VLAN)
			}
		}
		var got []byte
		fs := r.readFrames()
		for i, f := range fs {
			got = append(got, f.data...)
			if (f.flags&crypto.FlagFIN != 0) != (i == len(fs)-1) {
				t.Errorf("frame %d has flags %#x", i, f.flags)
			}
		}
		if !bytes.Equal(got, want) || len(fs) != len(d) {
			t.Errorf("%d bytes in %d frames and %d segments", len(got), len(fs), len(d))
		}
	}
}

// Whatever an inner retransmission's boundaries and bytes are, the wire sees
// what was stored (T3, T4).
func TestInnerRetransmissions(t *testing.T) {
	r := newRig(t, rigConfig{})
	want := content(4, 0, 6000)
	r.inner(seg{data: bytes.Clone(want[:1440])}, seg{o: 1440, data: bytes.Clone(want[1440:4320]), gso: 1440})
	garbage := bytes.Repeat([]byte{0xaa}, 6000)
	for _, c := range [][2]int{{0, 1440}, {0, 4320}, {1000, 1500}, {1439, 1441}, {4319, 4320}, {0, 1}, {1440, 2880}, {700, 4320}} {
		r.forget()
		r.inner(seg{o: int64(c[0]), data: bytes.Clone(garbage[c[0]:c[1]]), gso: 1440})
		if len(withData(r.outs)) == 0 {
			t.Errorf("retransmission of %v sends nothing", c)
		}
		for _, p := range r.outs {
			if p.Len() > 1460 {
				t.Errorf("retransmission of %v sends a segment of %d", c, p.Len())
			}
		}
	}
	// Old and new bytes in one segment: the new ones are sealed.
	r.inner(seg{o: 4000, data: bytes.Clone(want[4000:6000]), gso: 1440})
	var got []byte
	for _, f := range r.readFrames() {
		got = append(got, f.data...)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%d bytes on the wire differ from what was written first", len(got))
	}
	// Acknowledged bytes are not sent again, they ask for an ACK.
	r.outer(seg{})
	r.forget()
	r.inner(seg{o: 100, data: bytes.Clone(garbage[100:300])})
	if len(withData(r.outs)) != 0 {
		t.Error("acknowledged bytes went out again")
	}
	if len(r.ins) == 0 || r.ins[len(r.ins)-1].a != 6000 {
		t.Errorf("retransmission of acknowledged bytes is not acknowledged: %d packets", len(r.ins))
	}
}

// Probes and keep-alives of the inner stack reach the peer, and its answer
// comes back (T4).
func TestInnerProbes(t *testing.T) {
	for _, c := range []struct {
		name string
		s    seg
	}{
		{"empty", seg{o: 99}},
		{"garbage byte", seg{o: 99, data: []byte{0xee}}},
	} {
		r := newRig(t, rigConfig{engine: EngineConfig{TCPKeepalive: true}})
		r.inner(seg{data: content(0, 0, 100)})
		r.outer(seg{})
		for k := range 3 {
			r.forget()
			r.inner(c.s)
			if len(r.outs) != 1 || r.outs[0].Len() != 0 || r.outs[0].o >= 120 {
				t.Fatalf("%s: probe %d becomes %+v", c.name, k, r.outs)
			}
			r.forget()
			r.outer(seg{})
			if len(r.ins) != 1 || r.ins[0].a != 100 {
				t.Fatalf("%s: the answer to probe %d becomes %d packets", c.name, k, len(r.ins))
			}
			r.advance(time.Second)
		}
	}
}

// The peer's probes are answered.
func TestOuterProbes(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{data: r.seal(0, content(0, 0, 100))})
	r.advance(time.Second)
	for _, s := range []seg{{o: 119}, {o: 119, data: []byte{0xee}}, {o: 0, data: []byte("something old")}} {
		r.forget()
		r.outer(s)
		if len(r.outs) != 1 || r.outs[0].a != 120 || len(r.ins) != 0 {
			t.Errorf("probe at %d with %d bytes is answered by %v", s.o, len(s.data), r.acks())
		}
	}
}

// A gap in what the inner queue brings is waited for (T7).
func TestInnerGap(t *testing.T) {
	r := newRig(t, rigConfig{})
	want := content(4, 0, 5000)
	r.inner(seg{o: 0, data: bytes.Clone(want[:1000])})
	r.forget()
	r.inner(seg{o: 3000, data: bytes.Clone(want[3000:]), flags: packet.FIN})
	r.inner(seg{o: 2000, data: bytes.Clone(want[2000:3000])})
	r.inner(seg{o: 2500, data: bytes.Clone(want[2500:3500])})
	if n := len(withData(r.outs)); n != 0 {
		t.Fatalf("%d segments beyond a gap", n)
	}
	r.inner(seg{o: 1000, data: bytes.Clone(want[1000:2000])})
	var got []byte
	fin := false
	for _, f := range r.readFrames() {
		got = append(got, f.data...)
		fin = f.flags&crypto.FlagFIN != 0
	}
	if !bytes.Equal(got, want) || !fin {
		t.Errorf("%d bytes, FINp %v", len(got), fin)
	}
}

// --- the peer's window (T6) ---

func TestPeerWindow(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 3000})
	want := content(4, 0, 6000)
	r.inner(seg{data: bytes.Clone(want[:2880]), gso: 1440})
	if n := len(withData(r.outs)); n != 2 {
		t.Fatalf("%d segments into a window of 3000", n)
	}
	r.outer(seg{ack: 1460, wnd: 1540})
	r.forget()
	// One more than fits: held, and the window is shut.
	r.inner(seg{o: 2880, data: bytes.Clone(want[2880:4320])})
	if n := len(withData(r.outs)); n != 0 {
		t.Fatalf("%d segments beyond the window", n)
	}
	if n := len(r.ins); n == 0 || r.ins[n-1].Wnd != 0 {
		t.Fatalf("inner window is %+v", r.ins)
	}
	// An inner retransmission of it cannot go out either, but is answered.
	r.forget()
	r.inner(seg{o: 2880, data: bytes.Clone(want[2880:4320])})
	if n := len(withData(r.outs)); n != 0 || len(r.outs) == 0 {
		t.Fatalf("%d segments beyond the window, %d in all", n, len(r.outs))
	}
	r.outer(seg{ack: 1460, wnd: 1540})
	if len(r.ins) == 0 {
		t.Error("an inner stack that probes a shut window hears nothing")
	}
	// The window opens.
	r.forget()
	r.outer(seg{ack: 2920, wnd: 3000})
	if d := withData(r.outs); len(d) != 1 || d[0].o != 2920 || d[0].Len() != 1460 {
		t.Fatalf("after the window opened: %d segments", len(d))
	}
	if n := len(r.ins); n == 0 || r.ins[n-1].Wnd == 0 || r.ins[n-1].a != 2880 {
		t.Errorf("the inner window stays shut")
	}
}

// A window that stays smaller than a frame is filled with a part of it.
func TestPartOfFrame(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 500})
	want := content(4, 0, 1440)
	r.inner(seg{data: bytes.Clone(want)})
	if n := len(withData(r.outs)); n != 0 {
		t.Fatalf("%d segments at once", n)
	}
	for o := int64(0); o < 1460; o += 500 {
		// The first part is little and waits; the next is most of the rest.
		if n := len(withData(r.outs)); n != min(int(o/500), 1) {
			t.Fatalf("at %d: %d segments at once", o, n)
		}
		r.advance(5 * time.Second)
		d := withData(r.outs)
		n := min(500, 1460-o)
		if len(d) != 1 || d[0].o != o || int64(d[0].Len()) != n {
			t.Fatalf("at %d: %d segments", o, len(d))
		}
		r.forget()
		r.outer(seg{ack: o + n, wnd: 500})
	}
	r.advance(5 * time.Second)
	if fs := r.readFrames(); len(fs) != 1 || !bytes.Equal(fs[0].data, want) {
		t.Fatalf("%d frames", len(fs))
	}
}

// A window of one segment of the inner stack's lets it send one, at once: it would
// wait for the rest of a smaller window, as would this side for the frame's.
func TestWindowOfOneSegment(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 3000})
	want := content(4, 0, 1440)
	r.inner(seg{data: content(0, 0, 100)})
	r.forget()
	r.outer(seg{ack: 120, wnd: 1440})
	if n := len(r.ins); n == 0 || int(r.ins[n-1].Wnd) != 1440 {
		t.Fatalf("inner window is %+v", r.ins)
	}
	r.inner(seg{o: 100, data: bytes.Clone(want)})
	if d := withData(r.outs); len(d) != 1 || d[0].o != 120 || d[0].Len() != 1440 {
		t.Fatalf("%d segments into the window", len(d))
	}
	r.outer(seg{ack: 120 + 1440, wnd: 1440})
	if d := withData(r.outs); len(d) != 2 || d[1].o != 120+1440 || d[1].Len() != overhead {
		t.Fatalf("%d segments after the window moved", len(d))
	}
}

// The inner stack makes its segments no larger than half of the largest window that
// it was shown, which is less than the peer's when that came with the Init message:
// a window that is nearly one of those segments lets it send one.
func TestWindowOfHalfSegment(t *testing.T) {
	r := newRig(t, rigConfig{active: true, mss: 8960, peerWnd: 16384, releaseWnd: 8192})
	want := content(4, 0, 4096)
	r.inner(seg{data: bytes.Clone(want)})
	r.forget()
	r.outer(seg{ack: 4116, wnd: 3903})
	if n := len(r.ins); n == 0 || int(r.ins[n-1].Wnd) < len(want) {
		t.Fatalf("inner window is %+v", r.ins)
	}
}

// The peer's probe of a shut window is passed on: the inner stack may have opened
// its own, and the TAP have lost the announcement.
func TestProbePassed(t *testing.T) {
	for _, n := range []int{0, 1} {
		r := newRig(t, rigConfig{innerWnd: 1000})
		r.auto = false
		b := r.seal(0, content(0, 0, 1000))
		r.outer(seg{data: b[:1000]})
		r.outer(seg{o: 1000, data: b[1000:]})
		r.inner(seg{ack: 1000, wnd: -1})
		edge := int64(r.f.rxEdge)
		r.forget()
		o := int64(len(b)) - 1
		if n > 0 {
			o = edge // as BSD does it
		}
		r.outer(seg{o: o, data: make([]byte, n)})
		if len(r.ins) != 1 || r.ins[0].Len() != 0 || r.ins[0].o != 999 {
			t.Errorf("probe of %d bytes: %d packets inward", n, len(r.ins))
		}
		r.inner(seg{ack: 1000, wnd: 5000})
		if len(r.outs) == 0 || int(r.outs[len(r.outs)-1].Wnd) < 5000 {
			t.Errorf("probe of %d bytes: %d answers", n, len(r.outs))
		}
	}
}

// An inner stack that has made its segments smaller, because larger ones vanish,
// gets what it repeats sent in segments of that size.
func TestResendSmaller(t *testing.T) {
	r := newRig(t, rigConfig{})
	want := content(4, 0, 4320)
	r.inner(seg{data: bytes.Clone(want), gso: 1440})
	for _, s := range []seg{{data: bytes.Clone(want[:1000])}, {o: 1000, data: bytes.Clone(want[1000:]), gso: 1000}} {
		r.forget()
		r.inner(s)
		sent := 0
		for _, p := range withData(r.outs) {
			sent += p.Len()
			if p.Len() > 1000+overhead {
				t.Errorf("a segment of %d bytes for one of 1000", p.Len())
			}
		}
		if sent < len(s.data) {
			t.Errorf("%d bytes sent for %d", sent, len(s.data))
		}
	}
}

// After a gap every segment is acknowledged at once for a while: the inner stack,
// which saw none, would delay the ACK of a window of one segment.
func TestQuickAcks(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.auto = false
	a, b := r.seal(0, content(0, 0, 100)), r.seal(0, content(0, 100, 100))
	r.outer(seg{data: a})
	if len(r.outs) != 0 {
		t.Fatal("the first segment was acknowledged at once")
	}
	c := r.seal(0, content(0, 200, 100))
	r.outer(seg{o: 240, data: c})
	r.outer(seg{o: 120, data: b})
	o := int64(360)
	for i := range quickAcks + 1 {
		r.forget()
		p := r.seal(0, content(0, 300+100*uint64(i), 100))
		r.outer(seg{o: o, data: p})
		o += int64(len(p))
		if n := len(r.outs); n != 1 && i < quickAcks-2 || n != 0 && i == quickAcks {
			t.Errorf("segment %d after the gap: %d ACKs", i, n)
		}
	}
}

// With a shut window the peer is asked again and again.
func TestZeroWindowProbes(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{wnd: -1})
	r.inner(seg{data: content(0, 0, 1000)})
	r.forget()
	r.advance(time.Minute)
	if n := len(r.outs); n < 4 || n > 40 {
		t.Errorf("%d probes in a minute", n)
	}
	for _, p := range r.outs {
		if p.Len() != 0 {
			t.Fatalf("data into a shut window: %s", segText(p.Frame))
		}
	}
	r.outer(seg{wnd: 5000})
	if fs := r.readFrames(); len(fs) != 1 {
		t.Errorf("%d frames after the window opened", len(fs))
	}
}

// The inner stack learns of the peer's window when it opens, also when it has
// nothing to ask.
func TestWindowUpdateShown(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 1000)})
	r.outer(seg{wnd: -1})
	if p := r.ins[len(r.ins)-1]; p.Wnd != 0 || p.a != 1000 {
		t.Fatalf("shut window is shown as %d", p.Wnd)
	}
	r.forget()
	r.outer(seg{wnd: 20000})
	if len(r.ins) != 1 || r.ins[0].Wnd < 10000 || r.ins[0].Wnd > 20000 {
		t.Errorf("window update becomes %d packets", len(r.ins))
	}
}

// A rekey answer at a shut window waits, and goes first (T8).
func TestRekeyAtZeroWindow(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, []byte("a")), wnd: -1})
	o := int64(r.sealed)
	if n := len(withData(r.outs)); n != 0 {
		t.Fatalf("%d segments into a shut window", n)
	}
	r.inner(seg{data: []byte("b")})
	r.outer(seg{o: o, wnd: 5000})
	fs := r.readFrames()
	if len(fs) == 0 || fs[0].control != crypto.ControlRekey {
		t.Fatalf("frames %+v", fs)
	}
	if f := fs[len(fs)-1]; string(f.data) != "b" {
		t.Errorf("frames %+v", fs)
	}
}

// --- control bytes (T8) ---

func TestInitRetransmission(t *testing.T) {
	r := newRig(t, rigConfig{init: 1700})
	r.advance(minRTO)
	d := withData(r.outs)
	if len(d) != 2 || d[0].o != 0 || d[0].Len()+d[1].Len() != 1700 {
		t.Fatalf("%d segments", len(d))
	}
	if d[0].Flags&packet.PSH != 0 || d[1].Flags&packet.PSH == 0 {
		t.Error("PSH belongs on the last byte of the message (TC 3.3)")
	}
	if !bytes.Equal(r.wire, r.init) {
		t.Error("other bytes than the slow path sent")
	}
	r.forget()
	r.outer(seg{ack: 1460})
	r.advance(minRTO)
	if d = withData(r.outs); len(d) != 1 || d[0].o != 1460 || d[0].Len() != 240 {
		t.Errorf("after a partial acknowledgement: %d segments", len(d))
	}
	r.outer(seg{ack: 1700})
	r.forget()
	r.advance(time.Hour)
	if len(r.outs) != 0 {
		t.Errorf("%d segments after all was acknowledged", len(r.outs))
	}
}

// The message goes out again when the inner stack resends the byte behind it.
func TestInitBelongsToNextByte(t *testing.T) {
	r := newRig(t, rigConfig{init: 78})
	r.inner(seg{data: content(0, 0, 100)})
	r.forget()
	r.inner(seg{data: content(0, 0, 100)})
	d := withData(r.outs)
	if len(d) == 0 || d[0].o != 0 {
		t.Fatalf("resent from %+v", d)
	}
	n := 0
	for _, p := range d {
		n += p.Len()
	}
	if n != 78+120 {
		t.Errorf("%d bytes resent", n)
	}
	// Its acknowledgement is none of an inner byte.
	r.forget()
	r.outer(seg{ack: 78})
	for _, p := range r.ins {
		if p.a != 0 {
			t.Errorf("inner acknowledgement %d", p.a)
		}
	}
}

func TestPeerSilent(t *testing.T) {
	r := newRig(t, rigConfig{init: 78})
	r.advance(time.Hour)
	r.wantEnded(ReasonPeerSilent)
	if n := len(withData(r.outs)); n < 4 || n > 20 {
		t.Errorf("%d attempts", n)
	}
	r.gone()
}

// An outage of ten minutes, which data would survive, ends no flow of which an
// answer was not acknowledged. A peer that is gone is given up.
func TestOutageWithControlBytes(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, nil), ack: -1})
	r.advance(10 * time.Minute)
	r.forget()
	r.advance(3 * time.Minute)
	if r.ended() != "" || len(withData(r.outs)) == 0 {
		t.Fatalf("ended %q, %d segments", r.ended(), len(r.outs))
	}
	r.outer(seg{o: int64(r.sealed)})
	o := int64(r.sealed)
	r.outer(seg{o: o, data: r.sealWith(crypto.ControlRekey, 0, nil), ack: int64(r.f.unaO)})
	r.advance(time.Hour)
	r.wantEnded(ReasonPeerSilent)
	r.gone()
}

// A lost rekey-only frame is resent by the daemon's timer.
func TestRekeyAnswerRetransmission(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, nil)})
	d := withData(r.outs)
	if len(d) != 1 {
		t.Fatalf("%d segments", len(d))
	}
	r.forget()
	r.advance(10 * minRTO)
	d2 := withData(r.outs)
	if len(d2) == 0 || d2[0].o != d[0].o || !bytes.Equal(d2[0].Payload(), d[0].Payload()) {
		t.Fatalf("%d retransmissions", len(d2))
	}
	r.outer(seg{o: int64(r.sealed)})
	r.forget()
	r.advance(time.Hour)
	if len(r.outs) != 0 {
		t.Errorf("%d segments after the acknowledgement", len(r.outs))
	}
}

// A probe of the peer's window, which waits for that very window, leaves the answer
// before it to this side.
func TestRekeyAnswerBeforeProbe(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 25})
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, nil), wnd: 25})
	d := withData(r.outs)
	if len(d) != 1 || d[0].Len() != 20 {
		t.Fatalf("%d segments", len(d))
	}
	r.inner(seg{data: []byte("p")})
	for try := range 3 {
		r.forget()
		r.advance(minRTO << try)
		if !slices.ContainsFunc(withData(r.outs), func(p pkt) bool {
			return p.o == d[0].o && bytes.HasPrefix(p.Payload(), d[0].Payload())
		}) {
			t.Fatalf("try %d: the answer is not among %d segments", try, len(r.outs))
		}
	}
}

// Many answers that the path swallows in one segment are sent in small ones in
// the end.
func TestControlBytesInSmallPieces(t *testing.T) {
	r := newRig(t, rigConfig{})
	for range 40 {
		o := int64(r.sealed)
		r.outer(seg{o: o, ack: -1, data: r.sealWith(crypto.ControlRekey, 0, nil)})
	}
	for try, most := range []int{1 << 16, 1 << 16, ctlSize, ctlSize} {
		r.forget()
		r.advance(time.Duration(minRTO << try))
		got := 0
		for _, p := range withData(r.outs) {
			if p.Len() > most {
				t.Errorf("try %d: a segment of %d bytes", try, p.Len())
			}
			got += p.Len()
		}
		if got == 0 {
			t.Errorf("try %d: nothing is sent again", try)
		}
	}
}

// Where small segments were needed, the next answers that get lost are not tried in
// a large one first: each of many losses would cost its timeouts.
func TestControlBytesStaySmall(t *testing.T) {
	r := newRig(t, rigConfig{})
	for round := range 3 {
		for range 40 {
			o := int64(r.sealed)
			r.outer(seg{o: o, ack: cmp.Or(int64(r.f.unaO), -1), data: r.sealWith(crypto.ControlRekey, 0, nil)})
		}
		for try := range 3 {
			from := r.f.unaO
			r.forget()
			r.advance(minRTO << try)
			for _, p := range withData(r.outs) {
				if round > 0 && p.Len() > ctlSize {
					t.Errorf("round %d, try %d: a segment of %d bytes", round, try, p.Len())
				}
				if uint64(p.o) == from {
					from += uint64(p.Len())
				}
			}
			if from != r.f.sentO {
				t.Errorf("round %d, try %d: sent again up to %d of %d", round, try, from, r.f.sentO)
			}
		}
		r.outer(seg{o: int64(r.sealed)})
	}
}

// Control bytes that left as the part which fitted the peer's window are sent again
// like others.
func TestControlBytesInSmallWindow(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 4})
	r.outer(seg{data: r.sealWith(crypto.ControlRekey, 0, nil)})
	r.advance(minRTO)
	if p := withData(r.outs); len(p) != 1 || p[0].o != 0 || p[0].Len() != 4 {
		t.Fatalf("%d segments into a window of 4 bytes", len(p))
	}
	r.forget()
	r.advance(time.Second)
	if p := withData(r.outs); len(p) == 0 || p[0].o != 0 || p[0].Len() != 4 {
		t.Errorf("%d segments sent again", len(p))
	}
}

// --- custody (T13) ---

func TestCustodyResent(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.auto = false
	want := content(2, 0, 5000)
	r.stream(0, r.seal(0, want), 1460, 0)
	r.advance(time.Minute)
	if r.now-time.Second < time.Minute || len(withData(r.ins)) < 10 {
		t.Fatalf("%d packets inward in a minute without acknowledgement", len(withData(r.ins)))
	}
	for _, p := range withData(r.ins) {
		if !bytes.Equal(p.Payload(), want[p.o:int(p.o)+p.Len()]) {
			t.Fatal("other bytes in a resend")
		}
	}
	// Three duplicate ACKs are faster than the timer.
	r.forget()
	r.inner(seg{ack: 2000}, seg{ack: 2000}, seg{ack: 2000}, seg{ack: 2000})
	if d := withData(r.ins); len(d) == 0 || d[0].o != 2000 {
		t.Errorf("duplicate ACKs are answered by %d packets", len(d))
	}
	r.inner(seg{ack: 5000})
	r.forget()
	r.advance(time.Minute)
	if len(r.ins) != 0 {
		t.Errorf("%d packets after all was acknowledged", len(r.ins))
	}
}

// Whatever the inner stack acknowledged of it, the rest is resent right.
func TestCustodyPartlyAcknowledged(t *testing.T) {
	for _, ack := range []int64{1, 599, 600, 601, 649, 650, 651, 1249, 1250, 1251, 1899, 1900} {
		r := newRig(t, rigConfig{})
		r.auto = false
		want := content(2, 0, 1901)
		for _, c := range [][2]int{{0, 600}, {600, 650}, {650, 1250}, {1250, 1900}, {1900, 1901}} {
			o := int64(r.sealed)
			r.outer(seg{o: o, data: r.seal(0, want[c[0]:c[1]])})
		}
		r.inner(seg{ack: ack})
		r.forget()
		r.advance(5 * minRTO)
		d := withData(r.ins)
		if len(d) == 0 || d[0].o != ack || !bytes.Equal(d[0].Payload(), want[ack:]) {
			t.Errorf("after %d were acknowledged, %d packets", ack, len(d))
		}
	}
}

// An inner stack that does not read must not fill the daemon's memory,
// whatever the window scale makes of an odd edge (T13).
func TestCustodyLimit(t *testing.T) {
	for _, shift := range []uint8{7, 14} {
		for _, size := range []int{90, 1400} {
			r := newRig(t, rigConfig{shift: shift, innerWnd: 16384, chunks: 4096, engine: EngineConfig{FlowBudget: 128 << 10}})
			r.auto = false
			edge := int64(r.c.rxEdge)
			// The peer sends whatever it may; segments that were not taken are
			// sent again for a while.
			var frames []seg
			for k, quiet := 0, 0; k < 6000 && quiet < 20; k++ {
				if len(frames) == 0 || frames[len(frames)-1].o < int64(r.f.nxtO) {
					o := int64(r.sealed)
					frames = append(frames[:0], seg{o: o, data: r.seal(0, content(0, 0, size))})
				}
				s := frames[len(frames)-1]
				if s.o+int64(len(s.data)) > edge {
					r.advance(time.Second)
					quiet++
				} else {
					s.data = bytes.Clone(s.data)
					r.outer(s)
					r.inner(seg{ack: int64(min(r.f.sntI, 16384)), wnd: -1})
				}
				for _, p := range r.outs {
					edge = max(edge, p.a+int64(p.Wnd)<<shift)
				}
				r.forget()
			}
			if c := r.f.dlvI - r.f.innerAck; c > 128<<10+crypto.MaxFrame {
				t.Errorf("shift %d, frames of %d: %d bytes in custody, the budget is %d", shift, size, c, 128<<10)
			}
		}
	}
}

func TestInnerWindowShut(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 3000})
	r.auto = false
	want := content(2, 0, 2900)
	r.stream(0, r.seal(0, want), 1460, 0)
	r.inner(seg{ack: 2900, wnd: -1})
	more := r.seal(0, content(2, 2900, 80))
	r.outer(seg{o: 2920, data: more[:80]})
	r.forget()
	r.outer(seg{o: 3000, data: more[80:]})
	r.advance(time.Minute)
	for _, p := range r.ins {
		if p.Len() > 0 {
			t.Fatal("data into a shut window")
		}
	}
	if len(r.ins) == 0 {
		t.Fatal("the shut window is never probed")
	}
	r.inner(seg{ack: 2900, wnd: 50})
	r.inner(seg{ack: 2950, wnd: 4000})
	var got []byte
	for _, p := range withData(r.ins) {
		got = append(got, p.Payload()...)
	}
	if !bytes.Equal(got, content(2, 2900, 80)) {
		t.Errorf("%d bytes after the window opened", len(got))
	}
}

// Before the inner stack has answered the release nothing is delivered, and
// the release is repeated (T18).
func TestReleaseRepeated(t *testing.T) {
	r := newRig(t, rigConfig{active: true})
	r.outer(seg{data: r.seal(0, []byte("early"))})
	r.advance(10 * time.Second)
	if n := len(r.ins); n < 3 || n > 20 {
		t.Errorf("release sent %d times in 10 s", n)
	}
	for _, p := range r.ins {
		if p.Flags != packet.SYN|packet.ACK || p.o != -1 {
			t.Fatalf("before the handshake's end: %s", segText(p.Frame))
		}
	}
	r.inner(seg{})
	if string(r.got) != "early" {
		t.Errorf("delivered %q", r.got)
	}
	r.forget()
	r.advance(time.Minute)
	if len(r.ins) != 0 {
		t.Errorf("%d packets inward when all is said", len(r.ins))
	}
}

// Where both SYNs crossed the inner stack is in SYN-RECEIVED, and says nothing when
// its handshake ends: it gets data all the same.
func TestDeliveredAfterCrossing(t *testing.T) {
	r := newRig(t, rigConfig{active: true, crossed: true})
	r.outer(seg{data: r.seal(0, []byte("greeting"))})
	if string(r.got) != "greeting" {
		t.Errorf("delivered %q", r.got)
	}
}

// --- ICMP (T21) ---

func (r *rig) tooBig(o int64, mtu int, mangle func(b []byte)) []byte {
	t := r.est.OuterTmpl
	inner := r.build(&seg{o: o, data: make([]byte, 8)}, &t, rigISS, rigIRS, 0, 0, 0)
	x, tmpl := inner[t.L3():], r.est.InnerTmpl
	var f []byte
	var hdr [packet.MaxHeaders]byte
	tmpl.Compose(hdr[:], &packet.Header{}, 0)
	f = append(f, hdr[:tmpl.L3()]...)
	if r.c.v6 {
		f = append(f, 0x60, 0, 0, 0, 0, 0, 58, 64)
		f = append(f, hdr[tmpl.L3()+8:tmpl.L3()+40]...)
		f = append(f, 2, 0, 0, 0)
		f = binary.BigEndian.AppendUint32(f, uint32(mtu))
		binary.BigEndian.PutUint16(f[tmpl.L3()+4:], uint16(8+len(x)))
	} else {
		f = append(f, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0)
		f = append(f, hdr[tmpl.L3()+12:tmpl.L3()+20]...)
		f = append(f, 3, 4, 0, 0, 0, 0)
		f = binary.BigEndian.AppendUint16(f, uint16(mtu))
		binary.BigEndian.PutUint16(f[tmpl.L3()+2:], uint16(28+len(x)))
		packet.PutIPv4Checksum(f[tmpl.L3():])
	}
	l4 := len(f) - 8
	f = append(f, x...)
	if mangle != nil {
		mangle(f[l4:])
	}
	packet.ICMPChecksum(f, tmpl.L3(), l4, r.c.v6)
	return f
}

func TestTooBig(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		ipLen, mtu := packet.IPv4Len, 1000
		if v6 {
			ipLen, mtu = packet.IPv6Len, 1300
		}
		newR := func() *rig {
			r := newRig(t, rigConfig{v6: v6, mss: 1440})
			r.inner(seg{data: content(0, 0, 4200), gso: 1400})
			r.forget()
			return r
		}
		for _, c := range []struct {
			name string
			o    int64
			mtu  int
			bad  func(m []byte)
			take bool
		}{
			{"in flight", 1420, mtu, nil, true},
			{"inside a frame", 1500, mtu, nil, true},
			{"below una", -5, mtu, nil, false},
			{"not sent", 4260, mtu, nil, false},
			{"absurd MTU", 1420, 68, nil, false},
			{"other port", 1420, mtu, func(m []byte) { m[8+ipLen] ^= 1 }, false},
			{"not TCP", 1420, mtu, func(m []byte) {
				if v6 {
					m[8+6] = 17
				} else {
					m[8+9] = 17
				}
			}, false},
		} {
			r := newR()
			r.outerFrames(r.tooBig(c.o, c.mtu, c.bad))
			if len(r.icmps) != b2i(c.take) {
				t.Errorf("v6 %v, %s: %d messages inward", v6, c.name, len(r.icmps))
			}
			if !c.take {
				continue
			}
			f := r.icmps[0]
			var x packet.L3Info
			if err := packet.ParseL3(f, &x); err != nil || !packet.ICMPChecksumOK(f, x.L3, x.L4, x.V6) {
				t.Fatalf("v6 %v: %v", v6, err)
			}
			m := f[x.L4:]
			got := int(binary.BigEndian.Uint16(m[6:]))
			if got != mtu-overhead {
				t.Errorf("v6 %v: MTU %d, want %d", v6, got, mtu-overhead)
			}
			if seq := binary.BigEndian.Uint32(m[8+ipLen+4:]); offOf(rigISS, seq, 0) < 1400 || offOf(rigISS, seq, 0) > 1500 {
				t.Errorf("v6 %v: embedded sequence number is inner offset %d", v6, offOf(rigISS, seq, 0))
			}
			// What goes out again fits the path.
			r.inner(seg{o: 1400, data: content(0, 1400, 1400)})
			for _, p := range withData(r.outs) {
				if n := len(p.Frame) - p.L3; n > mtu {
					t.Errorf("v6 %v: packet of %d bytes on a path of %d", v6, n, mtu)
				}
			}
			if len(withData(r.outs)) < 2 {
				t.Errorf("v6 %v: %d segments", v6, len(withData(r.outs)))
			}
		}
		r := newR()
		b := r.tooBig(1420, mtu, nil)
		b[len(b)-1] ^= 1
		r.outerFrames(b)
		if len(r.icmps) != 0 {
			t.Errorf("v6 %v: bad checksum taken", v6)
		}
	}
}

// --- ECN (T16) ---

func TestECN(t *testing.T) {
	r := newRig(t, rigConfig{ecn: true})
	o := int64(0)
	next := func(tos, flags uint8) {
		r.t.Helper()
		r.forget()
		b := r.seal(0, []byte("x"))
		r.outer(seg{o: o, data: b, tos: tos, flags: flags})
		r.advance(delayedAck)
		o += int64(len(b))
	}
	ece := func() bool {
		if len(r.outs) == 0 {
			t.Fatal("no ACK")
		}
		return r.outs[len(r.outs)-1].Flags&packet.ECE != 0
	}
	next(2, 0)
	if ece() || r.ins[0].TOS&3 != 2 {
		t.Errorf("ECT: ECE %v, inner TOS %#x", ece(), r.ins[0].TOS)
	}
	next(3, 0)
	if !ece() || r.ins[0].TOS&3 != 3 {
		t.Errorf("CE: ECE %v, inner TOS %#x", ece(), r.ins[0].TOS)
	}
	next(2, 0)
	if !ece() || r.ins[0].TOS&3 == 3 {
		t.Errorf("after CE: ECE %v, inner TOS %#x", ece(), r.ins[0].TOS)
	}
	next(2, packet.CWR)
	if ece() || r.ins[0].Flags&packet.CWR == 0 {
		t.Errorf("CWR: ECE %v, inner flags %#x", ece(), r.ins[0].Flags)
	}
	// A frame over several segments has CE when one of them had.
	b := r.seal(0, content(0, 0, 4000))
	r.forget()
	r.outer(seg{o: o, data: b[:1460], tos: 2})
	r.outer(seg{o: o + 1460, data: b[1460:2920], tos: 3})
	r.outer(seg{o: o + 2920, data: b[2920:], tos: 2})
	if d := withData(r.ins); len(d) != 1 || d[0].TOS&3 != 3 {
		t.Errorf("%d packets for a frame with CE in the middle", len(d))
	}
	// Towards the peer: ECT and CWR of the inner stack, on new data only.
	r.forget()
	r.inner(seg{data: content(0, 0, 100), tos: 2, flags: packet.CWR})
	r.inner(seg{data: content(0, 0, 100), tos: 0})
	d := withData(r.outs)
	if len(d) != 2 || d[0].TOS&3 != 2 || d[0].Flags&packet.CWR == 0 || d[1].TOS&3 != 0 || d[1].Flags&packet.CWR != 0 {
		t.Errorf("segments %s %s", segText(d[0].Frame), segText(d[1].Frame))
	}
	// The peer's ECE reaches the inner stack.
	r.forget()
	r.outer(seg{o: int64(r.sealed), flags: packet.ECE})
	if n := len(r.ins); n == 0 || r.ins[n-1].Flags&packet.ECE == 0 {
		t.Error("ECE of the peer is lost")
	}
}

// --- urgent data (T10) ---

func TestUrgentOut(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 100), flags: packet.URG, urg: 7})
	r.inner(seg{o: 100, data: content(0, 100, 3000), gso: 1440, flags: packet.URG, urg: 2000})
	fs := r.readFrames()
	if len(fs) != 4 {
		t.Fatalf("%d frames", len(fs))
	}
	if fs[0].flags != crypto.FlagURG || fs[0].urgent != 6 || len(fs[0].data) != 100 {
		t.Errorf("first frame %+v", fs[0])
	}
	at := 0
	for i, f := range fs[1:] {
		if f.flags&crypto.FlagURG != 0 && at+int(f.urgent) != 1999 {
			t.Errorf("frame %d: urgent %d at %d", i+1, f.urgent, at)
		}
		at += len(f.data)
	}
	if fs[2].flags&crypto.FlagURG == 0 || fs[3].flags&crypto.FlagURG != 0 {
		t.Errorf("flags %#x %#x", fs[2].flags, fs[3].flags)
	}
	for _, p := range r.outs {
		if p.Flags&packet.URG != 0 || p.Urg != 0 || p.Len() > 1460 {
			t.Errorf("segment %s", segText(p.Frame))
		}
	}
}

func TestUrgentIn(t *testing.T) {
	r := newRig(t, rigConfig{})
	// The header's flag is nobody's word.
	r.outer(seg{data: r.seal(0, []byte("abc")), flags: packet.URG, urg: 2})
	if p := r.ins[0]; p.Flags&packet.URG != 0 || p.Urg != 0 {
		t.Errorf("outer URG goes inward: %s", segText(p.Frame))
	}
	r.forget()
	o := int64(r.sealed)
	r.outer(seg{o: o, data: r.seal(crypto.FlagURG, append([]byte{0, 4}, "0123456789"...))})
	if p := withData(r.ins)[0]; p.Flags&packet.URG == 0 || p.Urg != 5 || string(p.Payload()) != "0123456789" {
		t.Errorf("urgent frame becomes %s", segText(p.Frame))
	}
	r.forget()
	o = int64(r.sealed)
	r.outer(seg{o: o, data: r.seal(0, []byte("plain"))})
	if p := withData(r.ins)[0]; p.Flags&packet.URG != 0 {
		t.Errorf("the next frame becomes %s", segText(p.Frame))
	}
	// One that comes before its data, and may point behind it.
	for _, at := range []byte{0, 4, 60} {
		r.forget()
		for _, f := range [][]byte{r.seal(crypto.FlagURG, []byte{0, at}), r.seal(0, []byte("01234")), r.seal(0, []byte("56789"))} {
			r.outer(seg{o: int64(r.f.nxtO), data: f})
		}
		d := withData(r.ins)
		if len(d) != 2 || d[0].Flags&packet.URG == 0 || d[0].Urg != uint16(at)+1 || d[1].Flags&packet.URG != 0 {
			t.Errorf("urgent at %d, announced by an empty frame: %d packets, the first %s", at, len(d), segText(d[0].Frame))
		}
	}
}

// --- the local stack's side ---

func TestInnerReset(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 100)})
	r.forget()
	r.inner(seg{o: 100, flags: packet.RST})
	r.wantEnded(ReasonLocalReset)
	if rs := resets(r.outs); len(rs) != 1 || rs[0].o != 120 {
		t.Fatalf("resets %+v", rs)
	}
	// Whoever still speaks is told again.
	r.forget()
	r.outer(seg{data: r.seal(0, []byte("x"))})
	if rs := resets(r.outs); len(rs) != 1 || rs[0].o != 120 || len(r.ins) != 0 {
		t.Errorf("resets %+v", rs)
	}
	r.inner(seg{o: 100, data: []byte("y")})
	if rs := resets(r.ins); len(rs) != 1 || rs[0].o != 0 {
		t.Errorf("inner resets %+v", rs)
	}
	r.gone()
}

// The local stack gives up an end of stream that nobody acknowledges or answers,
// and data that nobody acknowledges, without a word: the flow goes with its socket.
func TestSocketGoneSilently(t *testing.T) {
	for name, c := range map[string]struct {
		leave func(r *rig)
		asked bool
	}{
		"end of stream, not answered":     {func(r *rig) { r.inner(seg{flags: packet.FIN}); r.outer(seg{}) }, true},
		"end of stream, not acknowledged": {func(r *rig) { r.inner(seg{flags: packet.FIN}) }, true},
		"data, not acknowledged":          {func(r *rig) { r.inner(seg{data: content(0, 0, 100)}) }, true},
		"idle":                            {func(r *rig) { r.inner(seg{data: content(0, 0, 100)}); r.outer(seg{}) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			c.leave(r)
			r.forget()
			r.advance(3 * patrolEvery)
			if (len(r.ins) > 0) != c.asked || len(r.ins) > 2 {
				t.Fatalf("%d packets inward in two rounds", len(r.ins))
			}
			if !c.asked {
				return
			}
			if p := r.ins[0]; p.Len() != 0 || p.o != -1 || p.Flags != packet.ACK {
				t.Errorf("asks with %s", segText(p.Frame))
			}
			// One that lives says so, and goes on.
			r.inner(seg{o: int64(r.f.sealI)})
			if r.ended() != "" {
				t.Fatalf("ended by %q", r.ended())
			}
			r.inner(seg{o: int64(r.f.ackI), flags: packet.RST, noAck: true})
			r.wantEnded(ReasonLocalReset)
			r.gone()
		})
	}
}

// A copy of the handshake's segment gets the release again (T18).
func TestHandshakeCopies(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{o: -1, flags: packet.SYN, ack: -1})
	if len(r.ins) != 1 || len(r.outs) != 0 || r.ended() != "" {
		t.Errorf("%d packets inward, %d outward", len(r.ins), len(r.outs))
	}
}

func TestAbortAll(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.secondFlow()
	if live, linger := r.e.Flows(); live != 2 || linger != 0 {
		t.Fatalf("%d and %d flows", live, linger)
	}
	if n := len(r.e.Snapshot(nil)); n != 2 {
		t.Fatalf("%d flows in the snapshot", n)
	}
	r.outer(seg{data: r.seal(0, []byte("kept"))})
	r.inner(seg{data: content(0, 0, 100)})
	r.forget()
	r.e.AbortAll(ReasonShutdown, r.now)
	r.drain()
	r.wantEnded(ReasonShutdown)
	if len(resets(r.outs)) != 2 || len(resets(r.ins)) != 2 {
		t.Errorf("%d and %d resets", len(resets(r.outs)), len(resets(r.ins)))
	}
	r.gone()
}

// A flow is found by its endpoints, whatever its VLAN, and as long as it lives. A list
// of flows that is described later leaves out those that have ended.
func TestLookup(t *testing.T) {
	for _, vlan := range []uint16{0, 7} {
		r := newRig(t, rigConfig{vlan: vlan})
		r.secondFlow()
		k := r.est.Key
		k.VLAN = 0
		if f, ok := r.e.Lookup(&k); !ok || f.Remote != k.RemoteAddr().String() || f.VLAN != vlan || f.SessionID == "" {
			t.Fatalf("VLAN %d: found %v, %+v", vlan, ok, f)
		}
		all := r.e.all()
		r.outer(seg{flags: packet.RST})
		if _, ok := r.e.Lookup(&k); ok {
			t.Errorf("VLAN %d: found after the end", vlan)
		}
		if fs := r.e.describe(nil, all); len(all) != 2 || len(fs) != 1 || fs[0].Remote == k.RemoteAddr().String() {
			t.Errorf("VLAN %d: %d of %d flows, %+v", vlan, len(fs), len(all), fs)
		}
	}
}

// The inner stack may have missed the last acknowledgement of a flow that has just
// ended: when all flows go, so does its socket.
func TestAbortAllEnded(t *testing.T) {
	for _, c := range []struct {
		later   time.Duration
		destroy bool
	}{{time.Millisecond, true}, {lingerShort, false}} {
		r := newRig(t, rigConfig{})
		r.inner(seg{data: content(0, 0, 100)})
		// The inner stack closes first, and lingers long.
		r.inner(seg{o: 100, flags: packet.FIN})
		last := r.outs[len(r.outs)-1]
		o := int64(r.sealed)
		r.outer(seg{o: o, data: r.seal(crypto.FlagFIN, nil), flags: packet.FIN, ack: last.o + int64(last.Len()) + 1})
		r.wantEnded(ReasonClosed)
		r.advance(c.later)
		r.forget()
		r.e.AbortAll(ReasonShutdown, r.now)
		r.drain()
		if len(r.events) != 1 || r.events[0].Kind != FlowGone || r.events[0].Destroy != c.destroy {
			t.Errorf("after %v: %+v", c.later, r.events)
		}
	}
}

// Frames of the slow path pass through the engine; super-segments of flows that
// are not here are cut for it.
func TestSlowFrames(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.c.port = 50000
	other := makeTemplate(r.est.Key.Local, r.est.Key.Remote, false, 0, 443, 50000, 0)
	r.est.OuterTmpl = other
	want := content(3, 0, 4000)
	r.inner(seg{data: bytes.Clone(want), gso: 1460, flags: packet.FIN | packet.PSH | packet.CWR})
	var got []byte
	for i, ev := range r.events {
		var s packet.Segment
		if err := packet.Parse(ev.Frame, packet.FromInner, &s); ev.Kind != SlowFrame || ev.Dir != packet.FromInner || err != nil {
			t.Fatalf("event %+v: %v", ev, err)
		}
		if offOf(rigISS, s.Seq, 0) != int64(len(got)) {
			t.Errorf("frame %d at %d", i, offOf(rigISS, s.Seq, 0))
		}
		last := i == len(r.events)-1
		if s.Flags&packet.FIN != 0 != last || s.Flags&packet.PSH != 0 != last || s.Flags&packet.CWR != 0 != (i == 0) {
			t.Errorf("frame %d has flags %#x", i, s.Flags)
		}
		got = append(got, s.Payload()...)
	}
	if !bytes.Equal(got, want) || len(r.events) != 3 {
		t.Errorf("%d bytes in %d frames", len(got), len(r.events))
	}
	r.forget()
	f := makeFrame(r.est.Key.Local, r.est.Key.Remote, false, 0, 443, 50000, 0)
	r.e.SendOuter(f, r.now)
	r.e.SendInner(makeFrame(r.est.Key.Remote, r.est.Key.Local, false, 0, 50000, 443, 0), r.now)
	r.e.SendOuter([]byte("not a frame"), r.now)
	r.e.SendInner([]byte("not a frame"), r.now)
	r.e.SendOuter(make([]byte, 4000), r.now)
	r.drain()
	r.check()
	if len(r.outs) != 1 || len(r.ins) != 1 {
		t.Errorf("%d and %d packets", len(r.outs), len(r.ins))
	}
}

// Vectors longer than the engine's outputs are drained on the way.
func TestDrain(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 1 << 20, innerWnd: 1 << 20, shift: 7, chunks: 8192})
	var ss []seg
	for i := range 2000 {
		ss = append(ss, seg{o: int64(i), data: []byte{byte(i)}})
	}
	r.inner(ss...)
	if fs := r.readFrames(); len(fs) != 2000 {
		t.Errorf("%d frames", len(fs))
	}
}

// An ACK in the middle of a vector must not promise the window that frames
// before it in the vector have used already (T13).
func TestEdgeInVector(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 4096})
	r.auto = false
	a, b := r.seal(0, content(0, 0, 1000)), r.seal(0, content(0, 1000, 1000))
	c := r.seal(0, content(0, 2000, 100))
	r.outer(seg{o: 0, data: a}, seg{o: 1020, data: b}, seg{o: 2100, data: c[60:]})
	for _, p := range r.outs {
		if edge := p.a + int64(p.Wnd); edge > 4096+4*overhead {
			t.Errorf("ACK of %d promises a window to %d, the inner stack's ends at 4096", p.a, edge)
		}
	}
}
