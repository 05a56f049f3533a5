package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// FuzzOuter plays arbitrary segments against a live flow: nothing panics,
// nothing leaks, and the inner stack gets a prefix of what the peer sealed.
func FuzzOuter(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 10, 0, 200, 1, 5, 0, 0, 7})
	f.Add([]byte{2, 0, 0, 0, 0, 0, 0, 0, 0, packet.RST, 0, 0, 0, 4, 0, 100})
	f.Add([]byte{0, 50, 3, 40, 1, 0, 60, 6, 1, 1, 5, 30, 4, 90})
	f.Add(bytes.Repeat([]byte{0, 255, 5, 9, 2, 0, 0, 1, 1, 0, 0, 0, 9, 0x11, 1, 1, 3}, 20))
	f.Fuzz(func(t *testing.T, in []byte) {
		var want []byte
		next := func() byte {
			if len(in) == 0 {
				return 0
			}
			b := in[0]
			in = in[1:]
			return b
		}
		cfg := next()
		r := newRig(t, rigConfig{
			v6: cfg&1 != 0, sack: cfg&2 != 0, ts: cfg&4 != 0, ecn: cfg&8 != 0, shift: cfg >> 4 & 1 * 7,
			init: int(cfg>>5) * 40, chunks: 256, innerWnd: 30000, engine: EngineConfig{Memory: 2 << 20, RekeyFrames: 5},
		})
		fin := false
		sent := uint64(0) // outer offset of the next segment
		var stream []byte
		for k := 0; len(in) > 0 && k < 300; k++ {
			switch op := next(); op % 8 {
			case 0, 1: // the peer seals and sends a frame, whole or not
				n := int(next()) * int(1+op>>5)
				p := content(11, uint64(len(want)), n)
				fl, control := byte(0), byte(0)
				if op&8 != 0 && next()&15 == 0 {
					fl = crypto.FlagFIN
				}
				if op&16 != 0 {
					control = crypto.ControlRekey
				}
				if !fin {
					want = append(want, p...)
				}
				fin = fin || fl != 0
				stream = append(stream, r.sealWith(control, fl, p)...)
				cut := int(next())
				end := max(int(sent), len(stream)-cut)
				for o := int(sent); o < end; o += 1400 {
					r.outer(seg{o: int64(o), data: stream[o:min(o+1400, end)]})
				}
				sent = uint64(end)
			case 2: // a segment with any header
				o := int64(int16(binary.BigEndian.Uint16([]byte{next(), next()})))
				a := int64(int16(binary.BigEndian.Uint16([]byte{next(), next()})))
				s := seg{o: int64(r.f.nxtO) + o, ack: int64(r.f.unaO) + a, flags: next(), wnd: int(next())<<8 | int(next()), noAck: next()&1 != 0, urg: uint16(next()), tos: next() & 3}
				s.garbage = int(next()&3) * 4
				s.data = bytes.Repeat([]byte{next()}, int(next()))
				r.outer(s)
			case 3: // bytes of the stream with some of them changed
				if len(stream) == 0 {
					break
				}
				o := int(binary.BigEndian.Uint16([]byte{next(), next()})) % len(stream)
				b := bytes.Clone(stream[o:min(len(stream), o+1+int(next())*5)])
				b[int(next())%len(b)] ^= next()
				r.outer(seg{o: int64(o), data: b})
			case 4: // a good segment with changed headers or payload, checksum mended or not
				b := r.peerFrame(seg{o: int64(r.f.nxtO), data: content(11, 3, int(next()))})
				for range next() & 7 {
					b[int(next())%len(b)] ^= next()
				}
				var s packet.Segment
				if next()&1 != 0 && packet.Parse(b, packet.FromOuter, &s) == nil {
					packet.FullChecksum(s.Frame, s.L3, s.L4, s.V6)
				}
				if next()&1 != 0 {
					b = b[:int(next())%(len(b)+1)]
				}
				if len(b) > 0 {
					r.outerFrames(b)
				}
			case 5: // the inner stack sends
				n := int(next())
				r.inner(seg{o: int64(r.f.sealI) + int64(int8(next())), data: content(12, 0, n), flags: next() & (packet.FIN | packet.PSH | packet.URG), urg: uint16(next())})
			case 6: // time
				r.advance(time.Duration(next()) * 10 * time.Millisecond)
			case 7:
				r.auto = !r.auto
				if r.auto {
					r.inner(seg{})
				}
			}
			if !bytes.HasPrefix(want, r.got) {
				t.Fatalf("delivered %d bytes that the peer did not seal", len(r.got))
			}
			if r.eof && !(fin && len(r.got) == len(want)) {
				t.Fatalf("end-of-file after %d of %d bytes, FINp %v", len(r.got), len(want), fin)
			}
			for i := range r.outs {
				if bytes.Contains(r.outs[i].Payload(), []byte(canary)) {
					t.Fatal("plaintext on the wire")
				}
			}
			r.outs, r.ins = r.outs[:0], r.ins[:0]
		}
		if r.f.state == flowLive {
			r.readFrames()
			r.e.AbortAll(ReasonShutdown, r.now)
			r.drain()
		}
		r.gone()
	})
}

// byteSource is chance that a fuzzer steers, and a generator once its bytes
// are used up.
type byteSource struct {
	b    []byte
	rest *rand.PCG
}

func (s *byteSource) Uint64() uint64 {
	if len(s.b) < 2 {
		return s.rest.Uint64()
	}
	v := uint64(s.b[0])<<8 | uint64(s.b[1])
	s.b = s.b[2:]
	return v * 0x0001000100010001
}

// FuzzTranslator is the simulator with all decisions taken by the fuzzer: what
// is written and read when, what the network does to each packet. The checks
// are the simulator's.
func FuzzTranslator(f *testing.F) {
	f.Add([]byte{}, uint64(1))
	for i := range uint64(20) {
		rng := rand.NewChaCha8([32]byte{byte(i)})
		b := make([]byte, 50*i)
		rng.Read(b)
		f.Add(b, i)
	}
	f.Fuzz(func(t *testing.T, in []byte, seed uint64) {
		src := &byteSource{in, rand.NewPCG(seed, 0)}
		sc := scenarioFrom(rand.New(src), seed)
		sc.source = src
		if sc.quiet > 0 {
			sc.quiet = min(sc.quiet, 5*time.Second)
		}
		for i := range sc.flows {
			for k := range sc.flows[i].app {
				a := &sc.flows[i].app[k]
				a.total = min(a.total, 20000)
				if a.write < 100 {
					a.total = min(a.total, 300)
				}
			}
		}
		s := newSim(sc, nil)
		defer s.close()
		if err := s.run(); err != "" {
			t.Fatal(err)
		}
	})
}
