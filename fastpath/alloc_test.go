package fastpath

import (
	"runtime"
	"runtime/debug"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// bulk drives one flow's steady state with buffers of its own, so that what is
// counted is the engine's.
type bulk struct {
	r     *rig
	vec   []xdp.Desc
	frame []byte
	buf   []byte
	plain []byte
	n     int
	off   uint64 // inner offset of what is sent next
	key   *crypto.Key
	ts    uint32
}

func newBulk(t testing.TB, batch int) *bulk {
	c := rigConfig{shift: 7, innerWnd: 1 << 20, peerWnd: 1 << 20, ts: true, sack: true}
	b := &bulk{n: batch}
	b.r = newRig(t, c)
	b.vec = make([]xdp.Desc, 0, batch)
	b.frame = make([]byte, 2048)
	b.buf = make([]byte, 1<<16)
	b.plain = make([]byte, 1429)
	b.key = b.r.peer.SendKey(0)
	b.ts = 1 << 20
	return b
}

// drop returns the engine's outputs unread.
func (b *bulk) drop() {
	e := b.r.e
	e.FinishOut(nil)
	for _, d := range e.Out() {
		b.r.u.Free(d.Addr)
	}
	e.ClearOut()
	e.ClearIn()
}

// receive plays a vector of data segments, and the inner stack's answer.
func (b *bulk) receive() {
	r := b.r
	b.vec = b.vec[:0]
	for range b.n {
		addr, _ := r.u.Alloc()
		addr += xdp.Headroom
		f := r.u.Bytes(addr, 1792)
		var opts [12]byte
		b.ts++
		putTS(opts[:], b.ts, r.innerTS)
		h := packet.Header{Seq: seqOf(rigIRS, r.sealed), Ack: seqOf(rigISS, 0), Flags: packet.ACK, Wnd: 8192, Opts: opts[:]}
		hl := r.est.InnerTmpl.Compose(f, &h, 1448)
		b.plain[0] = 0
		n := b.key.Seal(f[hl:], b.plain[:1429], 0, r.sealed)
		r.sealed += uint64(n)
		packet.FullChecksum(f[:hl+n], r.est.InnerTmpl.L3(), r.est.InnerTmpl.L4(), false)
		b.vec = append(b.vec, xdp.Desc{Addr: addr, Len: uint32(hl + n)})
	}
	r.now += 1000
	r.e.OuterIn(b.vec, r.now)
	b.drop()
	b.answer(r.f.dlvI)
}

// answer is an ACK of the inner stack.
func (b *bulk) answer(a uint64) {
	r := b.r
	b.inner(0, packet.ACK, a)
	r.e.Flush(r.now)
	b.drop()
}

func (b *bulk) inner(n int, flags uint8, ack uint64) {
	r := b.r
	var opts [12]byte
	r.innerTS++
	putTS(opts[:], r.innerTS, r.peerTS)
	h := packet.Header{Seq: seqOf(rigISS, b.off), Ack: seqOf(rigIRS, ack), Flags: flags, Wnd: 8192, Opts: opts[:]}
	f := b.buf[xdp.VnetHdrLen:]
	hl := r.est.OuterTmpl.Compose(f, &h, n)
	packet.PartialChecksum(f, r.est.OuterTmpl.L3(), r.est.OuterTmpl.L4(), hl-r.est.OuterTmpl.L4()+n, false)
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(r.est.OuterTmpl.L4()), CsumOffset: 16}
	if n > 1428 {
		v.GSOType, v.GSOSize = xdp.VnetGSOTCPv4, 1428
	}
	v.Put(b.buf)
	b.off += uint64(n)
	r.e.InnerIn(b.buf[:xdp.VnetHdrLen+hl+n], r.now)
}

// send plays a super-segment of the inner stack, and the peer's ACK.
func (b *bulk) send() {
	r := b.r
	b.inner(b.n*1428, packet.ACK, r.f.dlvI)
	r.e.Flush(r.now)
	b.drop()
	addr, _ := r.u.Alloc()
	addr += xdp.Headroom
	f := r.u.Bytes(addr, 128)
	var opts [12]byte
	b.ts++
	putTS(opts[:], b.ts, r.innerTS)
	h := packet.Header{Seq: seqOf(rigIRS, r.sealed), Ack: seqOf(rigISS, r.f.sentO), Flags: packet.ACK, Wnd: 8192, Opts: opts[:]}
	hl := r.est.InnerTmpl.Compose(f, &h, 0)
	packet.FullChecksum(f[:hl], r.est.InnerTmpl.L3(), r.est.InnerTmpl.L4(), false)
	b.vec = append(b.vec[:0], xdp.Desc{Addr: addr, Len: uint32(hl)})
	r.now += 1000
	r.e.OuterIn(b.vec, r.now)
	b.drop()
}

// The steady state of a bulk flow allocates nothing.
func TestNoAllocation(t *testing.T) {
	for _, batch := range []int{1, 32} {
		b := newBulk(t, batch)
		for range 200 {
			b.receive()
			b.send()
		}
		if n := testing.AllocsPerRun(300, b.receive); n != 0 {
			t.Errorf("receiving %d segments allocates %v times", batch, n)
		}
		if n := testing.AllocsPerRun(300, b.send); n != 0 {
			t.Errorf("sending %d segments allocates %v times", batch, n)
		}
		b.r.e.Events()
		if b.r.f.state != flowLive || b.r.f.bytesIn == 0 || b.r.f.unaO != b.r.f.sealO || b.r.f.innerAck != b.r.f.dlvI {
			t.Fatal("the flow did not flow")
		}
	}
}

// No stage of the work on a vector of packets allocates, in either direction, for
// which the heap is looked at as each ends. What a stage allocates is found by it.
func TestNoAllocationByStage(t *testing.T) {
	const few = 3                                    // of a hundred, which other goroutines may have made
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector's own do not count
	for _, batch := range []int{1, 32} {
		b := newBulk(t, batch)
		for range 200 {
			b.receive()
			b.send()
		}
		for _, d := range []struct {
			name string
			run  func()
		}{{"receiving", b.receive}, {"sending", b.send}} {
			for planted := range NumStages + 1 { // the last plants nothing
				const times = 100
				var passed, allocs [NumStages]int
				var m runtime.MemStats
				var last uint64
				var leak *[64]byte
				b.r.e.Measure(&StageTimes{ended: func(stage int) {
					if stage == planted {
						leak = new([64]byte)
					}
					runtime.ReadMemStats(&m)
					passed[stage]++
					allocs[stage] += int(min(m.Mallocs-last, 1))
					last = m.Mallocs
				}})
				runtime.ReadMemStats(&m)
				last = m.Mallocs
				for range times {
					d.run()
				}
				b.r.e.Measure(nil)
				for stage, name := range StageNames {
					switch {
					case passed[stage] < times:
						t.Errorf("%s %d segments passes stage %s %d times in %d rounds", d.name, batch, name, passed[stage], times)
					case stage == planted && allocs[stage] != passed[stage]:
						t.Errorf("%s: %d of %d allocations in stage %s are found", d.name, allocs[stage], passed[stage], name)
					case stage != planted && allocs[stage] > few:
						t.Errorf("%s %d segments: stage %s allocates in %d of %d passes", d.name, batch, name, allocs[stage], passed[stage])
					}
				}
				runtime.KeepAlive(leak)
			}
		}
		if b.r.f.state != flowLive || b.r.f.unaO != b.r.f.sealO || b.r.f.innerAck != b.r.f.dlvI {
			t.Fatal("the flow did not flow")
		}
	}
}

func BenchmarkReceive(b *testing.B) {
	k := newBulk(b, 32)
	b.SetBytes(32 * 1428)
	b.ReportAllocs()
	for b.Loop() {
		k.receive()
	}
}

func BenchmarkSend(b *testing.B) {
	k := newBulk(b, 32)
	b.SetBytes(32 * 1428)
	b.ReportAllocs()
	for b.Loop() {
		k.send()
	}
}
