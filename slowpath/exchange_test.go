package slowpath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Every field of Established, for an active opener.
func TestActiveEstablished(t *testing.T) {
	s := newScript(t, Config{MTU: 1500})
	syn := s.connect()
	s.wantKinds(Divert, SendOuter)
	if syn.Wnd != openWindow {
		t.Errorf("SYN advertises %d", syn.Wnd)
	}
	if want := AppendOffer(nil, 0, crypto.AllTEPs, Suboption{}); !bytes.Equal(s.localENO, want) {
		t.Errorf("option %x, want %x", s.localENO, want)
	}
	s.now += 10 * time.Millisecond
	s.peerENO = AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})
	s.outer(synack(s.peerENO))
	s.wantReport(StateNegotiating, "")
	segs := s.sent(SendOuter)
	if len(segs) != 2 || segs[0].Len() != 0 || segs[0].Flags != packet.ACK || segs[1].Flags != packet.ACK|packet.PSH {
		t.Fatalf("want a pure ACK and Init1: %+v", segs)
	}
	for i, p := range segs {
		if !hasENO(p.Options()) || p.Seq != localISS+1 || p.Ack != peerISS+1 || p.TSval != 11 || p.TSecr != 21 {
			t.Errorf("segment %d: %+v", i, p)
		}
		if int(p.Wnd)<<7 > openWindow {
			t.Errorf("segment %d: window %d", i, int(p.Wnd)<<7)
		}
	}
	s.localInit = s.payload()

	msg := s.init2(crypto.TEPX25519, nil)
	frames := []byte("frames that follow")
	s.outer(s.data(0, len(s.localInit), append(bytes.Clone(msg), frames...)))
	s.wantKinds(SendOuter, Install, SendInner)
	s.wantReport(StateEncrypted, "")
	e := s.installed()
	s.wantSession(e, msg)
	if ack := s.one(SendOuter); ack.Ack != peerISS+1+uint32(len(msg)+len(frames)) || ack.Len() != 0 || hasENO(ack.Options()) || ack.TSecr != 30 {
		t.Errorf("ACK of Init2: %+v", ack)
	}
	rel := s.one(SendInner)
	o := readSYNOptions(rel.Options())
	if rel.Flags != packet.SYN|packet.ACK || rel.Seq != peerISS || rel.Ack != localISS+1 || rel.TSecr != 11 || rel.Wnd != 65160 {
		t.Errorf("released %+v", rel)
	}
	if o.mss != 1380 || o.enos != 0 || !o.sackOK || o.wscale != 7 {
		t.Errorf("options of the released SYN-ACK: %+v", o)
	}
	if !bytes.Equal(e.Release, rel.Frame) {
		t.Error("Release is not what was sent")
	}
	want := Established{
		Key: s.link.key(1, clientPort, 2, serverPort), Role: crypto.RoleA, TEP: crypto.TEPX25519, Active: true,
		ISS: localISS, IRS: peerISS, PeerMSS: 1400, InnerMSS: 1460,
		WScaleOK: true, LocalWScale: 7, RemoteWScale: 7, SACKOK: true, TSOK: true, TSLocal: 11, TSRemote: 30,
		TxAcked: len(s.localInit), PeerWnd: 1000 << 7, RxOffset: len(msg), RxEdge: e.RxEdge, InnerWnd: 64240, RTT: 10 * time.Millisecond,
	}
	wantEstablished(t, e, &want)
	if !bytes.Equal(e.TxInit, s.localInit) || !bytes.Equal(e.RxPending, frames) {
		t.Errorf("TxInit %x, RxPending %q", e.TxInit, e.RxPending)
	}
	if at := len(msg) + len(frames); e.RxEdge < at || e.RxEdge > at+openWindow+127 {
		t.Errorf("right edge %d", e.RxEdge)
	}
}

// wantEstablished compares the fields that are plain values.
func wantEstablished(t *testing.T, e, want *Established) {
	t.Helper()
	if e.Session == nil || !e.OuterTmpl.Set() || !e.InnerTmpl.Set() {
		t.Error("session or templates missing")
	}
	got := *e
	got.Session, got.TxInit, got.RxPending, got.Release = nil, nil, nil, nil
	got.OuterTmpl, got.InnerTmpl = packet.Template{}, packet.Template{}
	if g, w := fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", *want); g != w {
		t.Errorf("established\n%s, want\n%s", g, w)
	}
}

// The segment that turned encryption on was ahead of others: the released ACK has
// no timestamp that makes those look old.
func TestReleaseTimestamp(t *testing.T) {
	s := newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.answered()
	x := firstACK(true, 300, []byte("later"))
	copy(x.opts, timestamps(99, 11))
	s.outer(x)
	s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
	e := s.installed()
	if rel := s.one(SendInner); rel.TSval != 30 || e.TSRemote != 30 || !bytes.Equal(rel.Frame, e.Release) {
		t.Errorf("released with TSval %d, the newest in order is %d", rel.TSval, e.TSRemote)
	}
}

// The inner stack may have seen the second copy of the SYN only: nothing that it
// is given later may look older than that.
func TestTimestampOfSYNCopy(t *testing.T) {
	s := newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 1021, 0), s.peerENO)})
	if p := s.one(SendInner); p.TSval != 1021 {
		t.Fatalf("passed on %+v", p)
	}
	for _, f := range s.m.flows {
		if f.tsRemote != 1021 {
			t.Errorf("newest TSval %d, the inner stack was shown 1021", f.tsRemote)
		}
	}
}

// The last segment of a short stream overtakes Init1: its FIN is not lost.
func TestFINAheadOfInit(t *testing.T) {
	s := newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	msg := s.init1(crypto.TEPX25519, false, nil)
	x := s.data(len(msg), 0, []byte("frames"))
	x.flags |= packet.FIN
	s.outer(x)
	s.outer(s.data(0, 0, msg))
	s.wantKinds(SendOuter, Install, SendInner, Reinject)
	if e := s.installed(); string(e.RxPending) != "frames" {
		t.Errorf("RxPending %q", e.RxPending)
	}
	p := parse(t, s.acts[len(s.acts)-2].Frame, packet.FromOuter)
	if p.Flags&packet.FIN == 0 || p.Len() != 0 || p.Seq != x.seq+6 || !p.ChecksumOK(false) {
		t.Errorf("reinjected %+v", p)
	}
}

func TestPassiveEstablished(t *testing.T) {
	s := newScript(t, Config{MTU: 1300})
	s.listening(crypto.TEPP256, crypto.TEPX25519)
	s.wantKinds(Divert, SendInner)
	in := s.one(SendInner)
	if o := readSYNOptions(in.Options()); o.enos != 0 || o.mss != 1300-40-20 || in.Flags != packet.SYN {
		t.Errorf("SYN for the inner stack: %+v", o)
	}
	p := s.answered()
	if !bytes.Equal(s.localENO, []byte{69, 4, 1, byte(crypto.TEPX25519)}) || p.Wnd != openWindow {
		t.Errorf("SYN-ACK: option %x, window %d", s.localENO, p.Wnd)
	}
	s.now += 20 * time.Millisecond
	s.outer(firstACK(true, 0, nil))
	s.none()
	msg := trailing(s.init1(crypto.TEPX25519, false, nil), 5)
	s.outer(s.data(0, 0, append(bytes.Clone(msg), "xyz"...)))
	s.wantKinds(SendOuter, Install, SendInner)
	e := s.installed()
	s.wantSession(e, msg)
	out := s.one(SendOuter)
	if !bytes.Equal(out.Payload(), e.TxInit) || out.Flags != packet.ACK|packet.PSH || out.Ack != peerISS+1+uint32(len(msg)+3) || hasENO(out.Options()) {
		t.Errorf("Init2: %+v", out)
	}
	rel := s.one(SendInner)
	if rel.Flags != packet.ACK || rel.Seq != peerISS+1 || rel.Ack != localISS+1 || rel.Len() != 0 || hasENO(rel.Options()) ||
		rel.TSval != 22 || rel.TSecr != 11 || rel.Wnd != 500 || len(rel.Options()) != 12 {
		t.Errorf("released %+v", rel)
	}
	want := Established{
		Key: s.link.key(1, clientPort, 2, serverPort), Role: crypto.RoleB, TEP: crypto.TEPX25519,
		ISS: localISS, IRS: peerISS, PeerMSS: 1260, InnerMSS: 1260,
		WScaleOK: true, LocalWScale: 7, RemoteWScale: 7, SACKOK: true, TSOK: true, TSLocal: 11, TSRemote: 30,
		PeerWnd: 1000 << 7, RxOffset: len(msg), RxEdge: e.RxEdge, InnerWnd: 65160, RTT: 20 * time.Millisecond,
	}
	wantEstablished(t, e, &want)
	if string(e.RxPending) != "xyz" {
		t.Errorf("RxPending %q", e.RxPending)
	}
}

// Init1 may ride in the third ACK (decision 12), whatever its shape.
func TestInit1InThirdACK(t *testing.T) {
	for _, cut := range []int{0, 1, 7, 50} {
		s := newScript(t, Config{})
		s.listening(crypto.TEPX448)
		s.answered()
		msg := s.init1(crypto.TEPX448, false, nil)
		s.outer(firstACK(true, 0, msg[:len(msg)-cut]))
		if cut > 0 {
			if ack := s.one(SendOuter); ack.Ack != peerISS+1+uint32(len(msg)-cut) {
				t.Errorf("cut %d: acknowledged %d bytes", cut, ack.Ack-peerISS-1)
			}
			s.outer(s.data(len(msg)-cut, 0, msg[len(msg)-cut:]))
		}
		s.wantSession(s.installed(), msg)
		if rel := s.one(SendInner); rel.Len() != 0 || rel.Seq != peerISS+1 || rel.Flags != packet.ACK {
			t.Errorf("cut %d: released %+v", cut, rel)
		}
	}
}

// The first segment that arrives is not the first that was sent.
func TestFirstACKOutOfOrder(t *testing.T) {
	s := newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.answered()
	msg := s.init1(crypto.TEPX25519, false, nil)
	s.outer(firstACK(true, 30, msg[30:]))
	if ack := s.one(SendOuter); ack.Ack != peerISS+1 {
		t.Errorf("acknowledged %d", ack.Ack)
	}
	s.outer(firstACK(true, 0, msg[:30]))
	s.wantSession(s.installed(), msg)
	if rel := s.one(SendInner); rel.Len() != 0 || rel.Seq != peerISS+1 {
		t.Errorf("released %+v", rel)
	}
}

// Messages in pieces, in any order, with overlaps and repetitions.
func TestSplitInit(t *testing.T) {
	for seed := range uint64(60) {
		r := seeded(seed)
		s := newScript(t, Config{})
		active := seed%2 == 0
		var msg []byte
		extra := []int{0, 3, 2000, 70000, 300000}[seed%5]
		acked := 0
		if active {
			s.active(crypto.TEPP256)
			msg = trailing(s.init2(crypto.TEPP256, nil), extra)
			acked = len(s.localInit)
		} else {
			s.passive(crypto.TEPP256)
			msg = trailing(s.init1(crypto.TEPP256, false, nil), extra)
		}
		stream := append(bytes.Clone(msg), "what follows"...)
		size := 1 + int(r.Uint64()%60)
		if extra > 100 {
			size += 1300
		}
		next, edge, rounds := 0, 0, 0
		for done := false; !done; rounds++ {
			if rounds > 20000 {
				t.Fatalf("seed %d: no end", seed)
			}
			off := next + int(r.Uint64()%4)*size - int(r.Uint64()%2)*size/2
			off = min(max(off, 0), len(stream)-1)
			end := min(off+size, len(stream))
			s.outer(s.data(off, acked, stream[off:end]))
			for _, p := range s.sent(SendOuter) {
				got := int(p.Ack - peerISS - 1)
				if got < next {
					t.Fatalf("seed %d: acknowledgement went back", seed)
				}
				e := got + int(p.Wnd)<<7
				if e < edge {
					t.Fatalf("seed %d: right edge went back from %d to %d", seed, edge, e)
				}
				next, edge = got, e
			}
			for _, a := range s.acts {
				done = done || a.Kind == Install
			}
		}
		e := s.installed()
		s.wantSession(e, msg)
		if e.RxOffset != len(msg) || !bytes.HasPrefix([]byte("what follows"), e.RxPending) || next != e.RxOffset+len(e.RxPending) {
			t.Errorf("seed %d: offset %d of %d, pending %q, acknowledged %d", seed, e.RxOffset, len(msg), e.RxPending, next)
		}
		if s.m.rxHeld != 0 {
			t.Errorf("seed %d: %d bytes still counted", seed, s.m.rxHeld)
		}
	}
}

// An inner stack with a small receive buffer: its own window is all that is
// promised behind the Init message, which itself fits however small that is.
func TestSmallWindowIsNotExceeded(t *testing.T) {
	const small = 1200
	for _, extra := range []int{0, 5000} { // trailing bytes of the Init message
		s := newScript(t, Config{MTU: 1500})
		s.listening(crypto.TEPX25519)
		s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: small, opts: linuxSYN(1460, 11, 21)})
		synAck := s.one(SendOuter)
		o := readSYNOptions(synAck.Options())
		s.localENO = bytes.Clone(o.option())
		edge := int(synAck.Wnd)
		if edge != small {
			t.Errorf("SYN-ACK: window %d", edge)
		}
		s.outer(firstACK(true, 0, nil))
		msg := trailing(s.init1(crypto.TEPX25519, false, nil), extra)
		stream := append(bytes.Clone(msg), make([]byte, small)...)
		const unit = 1 << 7 // of the window field, by which the edge may creep each time
		creep := 0
		for off, n := 0, 4; off < len(msg); off, n = off+n, 1000 {
			if edge <= off {
				t.Fatalf("edge %d at offset %d of a message of %d bytes", edge, off, len(msg))
			}
			n = min(n, edge-off, len(msg)-off)
			s.outer(s.data(off, 0, stream[off:off+n]))
			for _, p := range s.sent(SendOuter) {
				edge = max(edge, int(p.Ack-peerISS-1)+int(p.Wnd)*unit)
			}
			creep += unit
			if most := len(msg) + small + creep; edge >= most {
				t.Errorf("edge %d after %d bytes of a message of %d", edge, off+n, len(msg))
			}
		}
		if e := s.installed(); e.InnerWnd != small || e.RxEdge >= e.RxOffset+small+creep {
			t.Errorf("installed with edge %d after offset %d, inner window %d", e.RxEdge, e.RxOffset, e.InnerWnd)
		}
	}
}

// Of two segments that differ where they overlap the first one counts.
func TestOverlappingInit(t *testing.T) {
	s := newScript(t, Config{})
	s.passive(crypto.TEPP256)
	msg := s.init1(crypto.TEPP256, false, nil)
	other := bytes.Clone(msg)
	fill(other)
	s.outer(s.data(30, 0, msg[30:50]))
	s.outer(s.data(0, 0, msg[:20]))
	s.outer(s.data(0, 0, slices.Concat(other[:20], msg[20:30], other[30:40])))
	s.outer(s.data(45, 0, slices.Concat(other[45:50], msg[50:])))
	s.wantSession(s.installed(), msg)
}

// Both readings of pubkey_len; B answers in A's (decision 2).
func TestPubkeyLen(t *testing.T) {
	for _, tep := range []crypto.TEP{crypto.TEPP256, crypto.TEPP521} {
		for _, short := range []bool{false, true} {
			s := newScript(t, Config{})
			s.passive(tep)
			msg := s.init1(tep, short, nil)
			s.outer(s.data(0, 0, msg))
			e := s.installed()
			s.wantSession(e, msg)
			m, err := crypto.ParseInit2(tep, e.TxInit)
			if err != nil {
				t.Fatal(err)
			}
			if _, got, _ := s.priv.Shared(m.Pub); got != short {
				t.Errorf("%v: short %v answered by short %v", tep, short, got)
			}
		}
	}
}

// A small MSS and window of the peer cut the Init messages.
func TestSmallPeer(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	s.peerENO = AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})
	x := synack(s.peerENO)
	x.wnd = 50
	x.opts = withENO([]byte{2, 4, 0, 68, 1, 3, 3, 0}, s.peerENO)
	s.outer(x)
	segs := s.sent(SendOuter)
	if len(segs) != 2 || segs[1].Len() != 50 || segs[1].Flags&packet.PSH != 0 {
		t.Fatalf("sent %d segments", len(segs))
	}
	s.localInit = s.payload()
	// The window opens: the rest follows, cut to the MSS less the ENO option.
	y := s.data(0, 20, nil)
	y.flags, y.opts, y.wnd = packet.ACK, nil, 400
	s.outer(y)
	segs = s.sent(SendOuter)
	for i, p := range segs {
		if p.Len() > 68 || hasENO(p.Options()) || (p.Flags&packet.PSH != 0) != (i == len(segs)-1) {
			t.Errorf("segment %d: %d bytes, flags %x", i, p.Len(), p.Flags)
		}
	}
	s.localInit = append(s.localInit, s.payload()...)
	if n, err := crypto.InitLen(s.localInit, crypto.Init1Magic); n != len(s.localInit) || err != nil {
		t.Fatalf("Init1 %d bytes, message_len %d, %v", len(s.localInit), n, err)
	}
	msg := s.init2(crypto.TEPX25519, nil)
	z := s.data(0, len(s.localInit), msg)
	z.opts = nil
	s.outer(z)
	e := s.installed()
	s.wantSession(e, msg)
	if e.TxAcked != len(s.localInit) || e.PeerMSS != 68 || e.PeerWnd != 1000 || e.TSOK || e.SACKOK {
		t.Errorf("established %+v", e)
	}
	if o := readSYNOptions(s.one(SendInner).Options()); o.mss != 48 {
		t.Errorf("MSS shown %d", o.mss)
	}
}

// A zero window is probed by the retransmission timer.
func TestZeroWindow(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	x := synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519}))
	x.wnd = 0
	s.outer(x)
	if p := s.one(SendOuter); p.Len() != 0 {
		t.Fatalf("%d bytes sent into a zero window", p.Len())
	}
	at, ok := s.m.Deadline()
	if !ok {
		t.Fatal("no timer")
	}
	s.tick(at - s.now)
	if p := s.one(SendOuter); p.Len() != 1 {
		t.Fatalf("probe of %d bytes", p.Len())
	}
	// A peer that says so may stay shut for longer than one that says nothing.
	shut := s.data(0, 0, nil)
	shut.wnd = 0
	for start := s.now; s.now-start < 2*DefaultDeadline; {
		s.outer(shut)
		at, _ := s.m.Deadline()
		s.tick(at - s.now)
		if p := s.one(SendOuter); p.Len() != 1 {
			t.Fatalf("probe of %d bytes", p.Len())
		}
	}
	s.outer(s.data(0, 0, nil))
	if b := s.payload(); len(b) != 79 {
		t.Errorf("%d bytes sent when it opened", len(b))
	} else if _, err := crypto.ParseInit1(crypto.TEPX25519, b); err != nil {
		t.Error(err)
	}
}

// Init1 is sent again, with ENO and twice the pause at first, until the
// deadline; then both sides are reset and the peer is remembered (T19).
func TestActiveTimeout(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	s.now += 100 * time.Millisecond
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	start, first := s.now, s.payload()
	pauses := []time.Duration{300, 600, 800, 800}
	last := start
	for i := 0; ; i++ {
		at, _ := s.m.Deadline()
		s.tick(at - s.now)
		if s.m.Len() == 0 {
			break
		}
		if want := pauses[i] * time.Millisecond; s.now-last != want {
			t.Errorf("pause %d is %v, want %v", i, s.now-last, want)
		}
		last = s.now
		if !bytes.Equal(s.payload(), first) || !hasENO(s.sent(SendOuter)[0].Options()) {
			t.Errorf("retransmission %d differs", i)
		}
	}
	if s.now-start != DefaultDeadline {
		t.Errorf("gave up after %v", s.now-start)
	}
	s.wantKinds(SendOuter, SendInner)
	s.wantReport(StateFailed, ReasonTimeout)
	if p := s.one(SendOuter); p.Flags != packet.RST|packet.ACK || p.Seq != localISS+1+uint32(len(first)) || p.Ack != peerISS+1 {
		t.Errorf("outer reset %+v", p)
	}
	if p := s.one(SendInner); p.Flags != packet.RST|packet.ACK || p.Ack != localISS+1 {
		t.Errorf("inner reset %+v", p)
	}
	// The diversion outlives the resets, so that nothing slips through.
	at, _ := s.m.Deadline()
	s.tick(at - s.now)
	s.wantKinds(Undivert)
	// The next attempt is plain.
	s.inner(tcp{seq: 77777, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
	s.wantKinds(SendOuter)
	s.wantReport(StatePlain, ReasonRemembered)
	// Later the peer gets another chance.
	s.tick(2 * time.Minute)
	s.inner(tcp{seq: 88888, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
	s.wantReport(StateOffered, "")
}

// The peer is not blamed for an exchange that this host slept through.
func TestActiveTimeoutStalled(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	if k := s.m.seg.Key; !s.m.Opens(k) {
		t.Errorf("%v is not half-open", k)
	}
	// It begins where it was interrupted.
	s.m.Stalled(DefaultDeadline)
	s.tick(DefaultDeadline)
	if s.m.Len() != 1 {
		t.Fatalf("ended by a stall of this host: %+v", s.acts)
	}
	s.tick(DefaultDeadline)
	s.wantReport(StateFailed, ReasonTimeout)
	s.tick(2 * DefaultTombstoneFor)
	s.inner(tcp{seq: 77777, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
	s.wantReport(StateOffered, "")
}

func TestPassiveTimeout(t *testing.T) {
	s := newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	msg := s.init1(crypto.TEPX25519, false, nil)
	s.outer(s.data(0, 0, msg[:40]))
	s.tick(deadlineHeard * DefaultDeadline)
	s.wantReport(StateFailed, ReasonTimeout)
	if p := s.one(SendOuter); p.Flags != packet.RST|packet.ACK || p.Seq != localISS+1 || p.Ack != peerISS+41 {
		t.Errorf("outer reset %+v", p)
	}
	if p := s.one(SendInner); p.Flags != packet.RST || p.Seq != peerISS+1 {
		t.Errorf("inner reset %+v", p)
	}
	// The inner stack missed it: its SYN-ACK is answered by another.
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 12, 21)})
	s.wantKinds(SendInner)
	if p := s.one(SendInner); p.Flags != packet.RST || p.Seq != peerISS+1 {
		t.Errorf("inner reset %+v", p)
	}
	// What the peer still sends gets no further.
	s.outer(s.data(40, 0, msg[40:]))
	s.wantKinds(SendOuter)
	if p := s.one(SendOuter); p.Flags != packet.RST || p.Seq != localISS+1 {
		t.Errorf("outer reset %+v", p)
	}
}

// While segments of the peer come it has time to send them again after a pause of
// a second, two and four (RFC 6298), but not without end, and less where many flows
// are half-open.
func TestPatience(t *testing.T) {
	waited := func(s *script) time.Duration {
		start := s.now
		for s.m.Len() > 0 {
			at, _ := s.m.Deadline()
			s.tick(at - s.now)
		}
		s.wantReport(StateFailed, ReasonTimeout)
		return s.now - start
	}
	s := newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	if d := waited(s); d != 3*DefaultDeadline {
		t.Errorf("waited %v for Init1", d)
	}
	s = newScript(t, Config{MaxHalfOpen: 4})
	s.passive(crypto.TEPX25519)
	if d := waited(s); d != DefaultDeadline {
		t.Errorf("waited %v for Init1 while pressed", d)
	}
	s = newScript(t, Config{})
	s.active(crypto.TEPX25519)
	s.tick(2 * time.Second)
	ack := s.data(0, len(s.localInit), nil)
	s.outer(ack)
	s.tick(2 * time.Second)
	s.outer(ack) // brings nothing new
	if d := waited(s); d != 3*DefaultDeadline-2*time.Second {
		t.Errorf("waited %v for Init2", d)
	}
	s = newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	start, msg := s.now, s.init1(crypto.TEPX25519, false, nil)
	for i := range 12 {
		s.outer(s.data(i, 0, msg[i:i+1]))
		s.tick(2 * time.Second)
	}
	if waited(s); s.now-start != deadlineFactor*DefaultDeadline {
		t.Errorf("waited %v for Init1 byte by byte", s.now-start)
	}
}

// Every reason for which an exchange is aborted.
func TestAborts(t *testing.T) {
	lengthOf := func(msg []byte, n uint32) []byte {
		b := bytes.Clone(msg)
		binary.BigEndian.PutUint32(b[4:], n)
		return b
	}
	for _, x := range []struct {
		name   string
		tep    crypto.TEP
		reason string
		init2  func(*crypto.Init2)
		init1  func(*crypto.Init1)
		raw    func([]byte) []byte
		fin    bool
	}{
		{name: "magic", reason: ReasonBadMagic, raw: func(b []byte) []byte { b[3] ^= 1; return b }},
		{name: "first byte of the magic", reason: ReasonBadMagic, raw: func([]byte) []byte { return []byte{'G'} }},
		{name: "plaintext", reason: ReasonBadMagic, raw: func([]byte) []byte { return []byte("HTTP/1.1 200 OK") }},
		{name: "own message reflected", reason: ReasonBadMagic, raw: func(b []byte) []byte {
			if b[0] == 0x15 {
				return []byte{0x09, 0x71, 0x05, 0xe0}
			}
			return []byte{0x15, 0x10, 0x1a, 0x0e}
		}},
		{name: "message_len 0", reason: ReasonBadInit, raw: func(b []byte) []byte { return lengthOf(b, 0) }},
		{name: "message_len 8", reason: ReasonBadInit, raw: func(b []byte) []byte { return lengthOf(b, 8) }},
		{name: "message_len too short for the key", tep: crypto.TEPP521, reason: ReasonBadInit, raw: func(b []byte) []byte { return lengthOf(b, uint32(len(b)-1)) }},
		{name: "message_len above the limit", reason: ReasonBadInit, raw: func(b []byte) []byte { return lengthOf(b, crypto.MaxInitLen+1) }},
		{name: "message_len largest", reason: ReasonBadInit, raw: func(b []byte) []byte { return lengthOf(b, 0xffffffff) }},
		{name: "zero shared secret", reason: ReasonBadKey,
			init2: func(m *crypto.Init2) { clear(m.Pub) }, init1: func(m *crypto.Init1) { clear(m.Pub) }},
		{name: "zero shared secret of x448", tep: crypto.TEPX448, reason: ReasonBadKey,
			init2: func(m *crypto.Init2) { clear(m.Pub) }, init1: func(m *crypto.Init1) { clear(m.Pub) }},
		{name: "pubkey_len", tep: crypto.TEPP256, reason: ReasonBadKey,
			init2: func(m *crypto.Init2) { m.Pub[1]++ }, init1: func(m *crypto.Init1) { m.Pub[1]++ }},
		{name: "hybrid point", tep: crypto.TEPP256, reason: ReasonBadKey,
			init2: func(m *crypto.Init2) { m.Pub[2] = 6 }, init1: func(m *crypto.Init1) { m.Pub[2] = 6 }},
		{name: "not on the curve", tep: crypto.TEPP256, reason: ReasonBadKey,
			init2: func(m *crypto.Init2) { fill(m.Pub[3:]) }, init1: func(m *crypto.Init1) { fill(m.Pub[3:]) }},
		{name: "cipher", reason: "", init2: func(m *crypto.Init2) { m.Cipher = 0x99 },
			init1: func(m *crypto.Init1) { m.Ciphers = []crypto.AEAD{0x99, 0x98} }},
		{name: "no cipher", reason: "", init2: func(m *crypto.Init2) { m.Cipher = 0 },
			init1: func(m *crypto.Init1) { m.Ciphers = nil }},
		{name: "FIN", reason: ReasonTruncated, fin: true, raw: func(b []byte) []byte { return b[:20] }},
		{name: "FIN alone", reason: ReasonTruncated, fin: true, raw: func(b []byte) []byte { return nil }},
	} {
		tep := x.tep
		if tep == 0 {
			tep = crypto.TEPX25519
		}
		run := func(s *script, msg []byte, acked, top int, reason string) {
			if x.raw != nil {
				msg = x.raw(msg)
			}
			d := s.data(0, acked, msg)
			if x.fin {
				d.flags |= packet.FIN
			}
			s.outer(d)
			s.wantKinds(SendOuter, SendInner)
			s.wantReport(StateFailed, reason)
			if p := s.one(SendOuter); p.Flags != packet.RST|packet.ACK || p.Seq != localISS+1+uint32(top) || p.Len() != 0 {
				t.Errorf("outer reset %+v", p)
			}
			if s.m.Len() != 0 {
				t.Error("the flow is still there")
			}
		}
		t.Run("A "+x.name, func(t *testing.T) {
			s := newScript(t, Config{})
			s.active(tep)
			reason := x.reason
			if reason == "" {
				reason = ReasonCipherUnoffered
			}
			run(s, s.init2(tep, x.init2), len(s.localInit), len(s.localInit), reason)
			if p := s.one(SendInner); p.Flags != packet.RST|packet.ACK || p.Ack != localISS+1 {
				t.Errorf("inner reset %+v", p)
			}
		})
		t.Run("B "+x.name, func(t *testing.T) {
			s := newScript(t, Config{})
			s.passive(tep)
			reason := x.reason
			if reason == "" {
				reason = ReasonNoCommonCipher
			}
			run(s, s.init1(tep, false, x.init1), 0, 0, reason)
			if p := s.one(SendInner); p.Flags != packet.RST || p.Seq != peerISS+1 {
				t.Errorf("inner reset %+v", p)
			}
		})
	}
}

func fill(b []byte) {
	for i := range b {
		b[i] = 0xff
	}
}

// The choice of cipher is B's, by its own preference (TC 3.3).
func TestCipherPreference(t *testing.T) {
	a := &Config{AEADs: []crypto.AEAD{crypto.AES128GCM, crypto.ChaCha20Poly1305, crypto.AES256GCM}}
	b := &Config{AEADs: []crypto.AEAD{crypto.ChaCha20Poly1305, crypto.AES128GCM}}
	s := newSim(t, link{}, a, b)
	if got := s.open(); got != "encrypted" {
		t.Fatal(got)
	}
	if got := s.a.est.Session.AEAD(); got != crypto.ChaCha20Poly1305 {
		t.Errorf("chose %v", got)
	}
}

// The FIN of the segment that completes the exchange goes to the fast path.
func TestFINWithInit(t *testing.T) {
	s := newScript(t, Config{})
	s.active(crypto.TEPX25519)
	msg := s.init2(crypto.TEPX25519, nil)
	d := s.data(0, len(s.localInit), append(msg, "frame"...))
	d.flags |= packet.FIN
	s.outer(d)
	s.wantKinds(SendOuter, Install, SendInner, Reinject)
}

// After Install everything of the flow is for the fast path, except a new
// connection on the same ports (T20).
func TestAfterInstall(t *testing.T) {
	s := newScript(t, Config{})
	s.active(crypto.TEPX25519)
	s.outer(s.data(0, len(s.localInit), s.init2(crypto.TEPX25519, nil)))
	s.installed()
	d := s.data(50, len(s.localInit), []byte("late"))
	s.outer(d)
	s.wantKinds(Reinject)
	d.src, d.dst, d.sport, d.dport = 2, 1, serverPort, clientPort
	if !bytes.Equal(s.acts[0].Frame, s.link.frame(d)) || s.acts[0].Dir != packet.FromOuter {
		t.Error("not the frame that came")
	}
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
	s.wantKinds(Reinject)
	s.inner(tcp{seq: localISS + 1, ack: 1, flags: packet.ACK, wnd: 64240})
	s.wantKinds(Reinject)
	// A blind SYN that was queued must not start anything.
	s.outer(tcp{seq: 4711, flags: packet.SYN, wnd: 1000, opts: withENO(nil, AppendOffer(nil, 0, crypto.AllTEPs, Suboption{}))})
	s.wantKinds(Reinject)
	s.inner(tcp{seq: 123456, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
	s.wantKinds(Divert, SendOuter)
	s.wantReport(StateOffered, "")
}

// A new SYN from the peer, some time after the flow was handed on.
func TestPassiveReuse(t *testing.T) {
	s := newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
	s.installed()
	s.tick(time.Second)
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: withENO(nil, AppendOffer(nil, 0, crypto.AllTEPs, Suboption{}))})
	s.wantKinds(Reinject)
	s.outer(tcp{seq: peerISS + 99, flags: packet.SYN, wnd: 1000, opts: withENO(nil, AppendOffer(nil, 0, crypto.AllTEPs, Suboption{}))})
	s.wantKinds(Divert, SendInner)
	// At once, when the fast path has given the flow up.
	s = newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
	s.installed()
	again := tcp{seq: peerISS + 99, flags: packet.SYN, wnd: 1000, opts: withENO(nil, AppendOffer(nil, 0, crypto.AllTEPs, Suboption{}))}
	s.outer(again)
	s.wantKinds(Reinject)
	s.m.Gone(s.link.key(1, clientPort, 2, serverPort))
	s.outer(again)
	s.wantKinds(Divert, SendInner)
	// Once the tombstone is gone nobody knows the flow.
	s = newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
	s.tick(time.Minute)
	s.outer(s.data(500, 0, []byte("x")))
	s.wantKinds()
}

// Bytes that there is no memory for are dropped without an acknowledgement, but
// peers that send what nobody waits for keep no other from its key exchange.
func TestBudgets(t *testing.T) {
	s := newScript(t, Config{})
	s.passive(crypto.TEPX25519)
	msg := s.init1(crypto.TEPX25519, false, nil)
	s.m.rxHeld = rxTotal
	s.outer(s.data(rxFair-100, 0, make([]byte, 101)))
	s.wantKinds()
	if s.m.Counters()[dropLimit] != 1 {
		t.Error("not counted")
	}
	s.m.rxHeld = 0
	// Holes beyond the bound are not filled ...
	for i := range 2 * maxRxSpans {
		s.outer(s.data(1000+2*i, 0, []byte{'x'}))
	}
	if f := s.m.flows[s.link.key(1, clientPort, 2, serverPort)]; len(f.rx.have) != maxRxSpans {
		t.Errorf("%d spans", len(f.rx.have))
	}
	// ... and hold nothing up.
	s.m.rxHeld += rxTotal
	s.outer(s.data(0, 0, msg[:50]))
	s.outer(s.data(50, 0, msg[50:]))
	s.wantSession(s.installed(), msg)
}
