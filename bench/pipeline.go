package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// PipelineRow is one figure of the Pipeline suite: everything that an engine
// does for one packet, in memory, without a port.
type PipelineRow struct {
	Direction string  `json:"direction"` // seal or open
	Payload   int     `json:"payload"`   // data bytes of a packet
	Flows     int     `json:"flows"`
	Workers   int     `json:"workers"`
	Engine    string  `json:"engine"`
	NsPer     float64 `json:"ns_per_packet"`
	AEADNs    float64 `json:"aead_ns_per_packet"`
	PPS       float64 `json:"pps"`
	Gbps      float64 `json:"gbps"` // of payload
	Allocs    float64 `json:"allocs_per_packet"`
}

// Pipeline measures one worker's engine for the given payload sizes and numbers
// of flows, with AES-128-GCM and checksums in software.
func Pipeline(payloads, flows []int) ([]PipelineRow, error) {
	var rows []PipelineRow
	for _, n := range payloads {
		for _, k := range flows {
			p, err := newPipe(k, n)
			if err != nil {
				return nil, err
			}
			s, o, err := p.measure()
			p.close()
			if err != nil {
				return nil, err
			}
			aeadS, aeadO, err := aeadCost(n)
			if err != nil {
				return nil, err
			}
			s.AEADNs, o.AEADNs = aeadS, aeadO
			rows = append(rows, s, o)
		}
	}
	return rows, nil
}

func aeadCost(n int) (seal, open float64, err error) {
	a, b, err := session(crypto.AES128GCM)
	if err != nil {
		return 0, 0, err
	}
	ks, kr := a.SendKey(0), b.RecvKey(0)
	frame, sealed := make([]byte, n+crypto.Overhead), make([]byte, n+crypto.Overhead)
	src := make([]byte, n+1)
	seal = perOp(100*time.Millisecond, func() { ks.Seal(sealed, src, 0, 0) })
	restore := perOp(100*time.Millisecond, func() { copy(frame, sealed) })
	open = perOp(100*time.Millisecond, func() { copy(frame, sealed); kr.Open(frame, 0) }) - restore
	return seal, open, nil
}

// end is one host: its engine, and per flow what its model stack knows.
type end struct {
	eng  *fastpath.Engine
	umem *xdp.Umem
}

// pipe is a sending and a receiving engine with flows between them.
type pipe struct {
	a, b    end
	n, segs int // payload of a packet, packets of a super-segment
	supers  [][]byte
	seq     []uint32 // next inner sequence number of each flow
	now     time.Duration
	descs   []xdp.Desc
	ack     []byte
}

// Limits of what Pipeline takes.
const (
	MaxPayload = 3400 // a packet must fit a chunk
	MaxFlows   = 1 << 20
)

const pipeMSS = 9000

func newPipe(flows, n int) (*pipe, error) {
	p := &pipe{n: n, segs: max(1, min(40, 60000/n)), seq: make([]uint32, flows), now: time.Second}
	for _, e := range []*end{&p.a, &p.b} {
		u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: 8192, ChunkSize: 4096})
		if err != nil {
			return nil, err
		}
		e.umem = u
		e.eng = fastpath.NewEngine(fastpath.EngineConfig{Umem: u, Memory: 1 << 30})
	}
	for i := range flows {
		sa, sb, err := session(crypto.AES128GCM)
		if err != nil {
			return nil, err
		}
		ca := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 16), 1}), uint16(i))
		cb := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 16), 2}), 80)
		ab, ba := template(ca, cb), template(cb, ca)
		est := func(k packet.Key, s *crypto.Session, role crypto.Role, out, in packet.Template) *slowpath.Established {
			return &slowpath.Established{
				Key: k, Session: s, Role: role, TEP: crypto.TEPX25519, ISS: 1000, IRS: 1000, PeerMSS: pipeMSS, InnerMSS: pipeMSS,
				WScaleOK: true, LocalWScale: 10, RemoteWScale: 10, SACKOK: true, PeerWnd: 32 << 20, RxEdge: 32 << 20, InnerWnd: 32 << 20,
				OuterTmpl: out, InnerTmpl: in,
			}
		}
		p.a.eng.Install(est(packet.KeyOf(ca, cb), sa, crypto.RoleA, ab, ba), p.now)
		p.b.eng.Install(est(packet.KeyOf(cb, ca), sb, crypto.RoleB, ba, ab), p.now)
		p.supers = append(p.supers, super(&ab, n, p.segs))
		p.seq[i] = 1001
	}
	return p, nil
}

func (p *pipe) close() { p.a.umem.Close(); p.b.umem.Close() }

// template makes the headers of packets from src to dst.
func template(src, dst netip.AddrPort) (t packet.Template) {
	f := make([]byte, packet.EthLen+packet.IPv4Len+packet.TCPLen)
	f[12], f[13] = 8, 0
	ip := f[packet.EthLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(ip[2:], packet.IPv4Len+packet.TCPLen)
	s, d := src.Addr().As4(), dst.Addr().As4()
	copy(ip[12:], s[:])
	copy(ip[16:], d[:])
	binary.BigEndian.PutUint16(ip[20:], src.Port())
	binary.BigEndian.PutUint16(ip[22:], dst.Port())
	ip[32] = 5 << 4
	var seg packet.Segment
	if err := packet.Parse(f, packet.FromInner, &seg); err != nil {
		panic(err) // the bytes above are constant but for the addresses
	}
	t.Learn(&seg)
	return t
}

// super makes a super-segment as the TAP delivers it.
func super(t *packet.Template, n, segs int) []byte {
	b := make([]byte, xdp.VnetHdrLen+packet.MaxHeaders+n*segs)
	h := packet.Header{Ack: 1001, Flags: packet.ACK | packet.PSH, Wnd: 32768}
	hl := t.Compose(b[xdp.VnetHdrLen:], &h, n*segs)
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(t.L4()), CsumOffset: 16}
	if segs > 1 {
		v.GSOType, v.GSOSize, v.HdrLen = xdp.VnetGSOTCPv4, uint16(n), uint16(hl)
	}
	v.Put(b)
	return b[:xdp.VnetHdrLen+hl+n*segs]
}

// round sends one super-segment on each of a few flows and returns the time
// that the two engines took, and the number of packets.
func (p *pipe) round(first, flows int) (seal, open time.Duration, packets int, err error) {
	a, b := p.a.eng, p.b.eng
	p.now += 100 * time.Microsecond
	const tcp = xdp.VnetHdrLen + packet.EthLen + packet.IPv4Len
	t := time.Now()
	for i := first; i < first+flows; i++ {
		binary.BigEndian.PutUint32(p.supers[i][tcp+4:], p.seq[i])
		p.seq[i] += uint32(p.n * p.segs)
		a.InnerIn(p.supers[i], p.now)
	}
	a.Flush(p.now)
	a.FinishOut(nil)
	seal += time.Since(t)
	packets = len(a.Out())
	if err := p.carry(&p.a, &p.b); err != nil {
		return 0, 0, 0, err
	}
	a.ClearIn()

	t = time.Now()
	b.OuterIn(p.descs, p.now)
	open += time.Since(t)
	got := 0
	for i := range b.In() {
		q := &b.In()[i]
		for _, d := range q.Data() {
			got += len(d)
		}
	}
	b.ClearIn()
	if want := flows * p.n * p.segs; got != want {
		return 0, 0, 0, fmt.Errorf("bench: %d of %d bytes were delivered", got, want)
	}
	t = time.Now()
	for i := first; i < first+flows; i++ {
		b.InnerIn(p.innerAck(i), p.now)
	}
	b.Flush(p.now)
	b.FinishOut(nil)
	open += time.Since(t)
	if err := p.carry(&p.b, &p.a); err != nil {
		return 0, 0, 0, err
	}
	t = time.Now()
	a.OuterIn(p.descs, p.now)
	seal += time.Since(t)
	a.ClearIn()
	return seal, open, packets, nil
}

// carry moves what one engine transmits into chunks of the other, in p.descs.
func (p *pipe) carry(from, to *end) error {
	p.descs = p.descs[:0]
	for _, d := range from.eng.Out() {
		at, ok := to.umem.Alloc()
		if !ok {
			return errors.New("bench: an engine's chunks ran out")
		}
		at += xdp.Headroom
		copy(to.umem.Bytes(at, int(d.Len)), from.umem.Bytes(d.Addr, int(d.Len)))
		p.descs = append(p.descs, xdp.Desc{Addr: at, Len: d.Len})
		from.umem.Free(d.Addr)
	}
	from.eng.ClearOut()
	return nil
}

// innerAck is the receiving stack's acknowledgement of all that flow i sent.
func (p *pipe) innerAck(i int) []byte {
	const l3 = xdp.VnetHdrLen + packet.EthLen
	if p.ack == nil {
		p.ack = make([]byte, l3+packet.IPv4Len+packet.TCPLen)
	}
	f, s := p.ack, p.supers[i]
	copy(f[xdp.VnetHdrLen:], s[xdp.VnetHdrLen:][:packet.EthLen+packet.IPv4Len+packet.TCPLen])
	ip := f[l3:]
	binary.BigEndian.PutUint16(ip[2:], packet.IPv4Len+packet.TCPLen)
	copy(ip[12:16], s[l3+16:])
	copy(ip[16:20], s[l3+12:])
	copy(ip[20:22], s[l3+22:])
	copy(ip[22:24], s[l3+20:])
	binary.BigEndian.PutUint32(ip[24:], 1001)
	binary.BigEndian.PutUint32(ip[28:], p.seq[i])
	ip[33] = packet.ACK
	return f
}

func (p *pipe) measure() (s, o PipelineRow, err error) {
	flows := len(p.supers)
	batch := min(flows, max(1, 240/p.segs))
	var best [2]float64
	var allocs float64
	for try := range 6 {
		var seal, open time.Duration
		var before, after runtime.MemStats
		packets := 0
		runtime.ReadMemStats(&before)
		for first := 0; packets < 40000; first = (first + batch) % (flows - batch + 1) {
			a, b, n, err := p.round(first, batch)
			if err != nil {
				return s, o, err
			}
			seal, open, packets = seal+a, open+b, packets+n
		}
		runtime.ReadMemStats(&after)
		allocs = float64(after.Mallocs-before.Mallocs) / float64(packets)
		for i, d := range []time.Duration{seal, open} {
			// The first round grows tables and rings.
			if ns := float64(d.Nanoseconds()) / float64(packets); try > 0 && (best[i] == 0 || ns < best[i]) {
				best[i] = ns
			}
		}
	}
	row := func(dir string, ns float64) PipelineRow {
		return PipelineRow{
			Direction: dir, Payload: p.n, Flows: flows, Workers: 1, Engine: crypto.EngineName(), NsPer: ns,
			PPS: 1e9 / ns, Gbps: float64(p.n) * 8 / ns, Allocs: allocs,
		}
	}
	return row("seal", best[0]), row("open", best[1]), nil
}
