package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

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
	Payload   int     `json:"payload"`   // data bytes of a packet of the stack, the mean of a mix; see MaxPayload
	Mix       string  `json:"mix,omitempty"`
	Flows     int     `json:"flows"` // of each worker
	Burst     int     `json:"burst"` // packets of a flow that come together; flows take turns in random order
	Workers   int     `json:"workers"`
	Engine    string  `json:"engine"`
	NsPer     float64 `json:"ns_per_packet"`      // of a worker's CPU
	AEADNs    float64 `json:"aead_ns_per_packet"` // sealing or opening alone, of frames of the same flows in the same order
	PPS       float64 `json:"pps"`                // of all workers
	Gbps      float64 `json:"gbps"`               // of payload, of all workers
	Allocs    float64 `json:"allocs_per_packet"`

	// Nanoseconds a packet of each stage by its name, see fastpath.StageNames.
	// They are measured apart, by the wall clock, which costs a little itself.
	Stages map[string]float64 `json:"stage_ns_per_packet"`
}

// PipelineOptions say what Pipeline measures: every combination.
type PipelineOptions struct {
	Payloads []int // data bytes of a packet; IMIX is a mix of sizes
	Flows    []int // of each worker
	Bursts   []int // packets of a flow that come together
	Workers  []int // threads, each with an engine and flows of its own
	Log      func(string)
}

// Limits of what Pipeline takes.
const (
	// MaxPayload is as much as one jumbo frame carries. Packets of more than
	// about 3600 bytes leave in several segments, since a chunk has 4096 bytes.
	MaxPayload = 9000
	MaxFlows   = 1 << 20
	MaxBurst   = 40

	// IMIX stands for payloads of 64, 536 and 1440 bytes, 7:4:1.
	IMIX = 0
)

var imix = [...]int{64, 536, 64, 64, 536, 64, 1440, 64, 536, 64, 536, 64}

// sizes returns the payloads that a payload option stands for, in turn.
func sizes(payload int) []int {
	if payload == IMIX {
		return imix[:]
	}
	return []int{payload}
}

// Pipeline measures engines for every combination of the options, with
// AES-128-GCM and checksums in software. Times are those of the worker's CPU, so
// that other work of the machine does not count.
func Pipeline(o PipelineOptions) ([]PipelineRow, error) {
	var rows []PipelineRow
	for _, workers := range o.Workers {
		for _, flows := range o.Flows {
			for _, n := range o.Payloads {
				for _, burst := range o.Bursts {
					got, err := pipeline(n, flows, burst, workers)
					if err != nil {
						return nil, err
					}
					for i := range got {
						if o.Log != nil {
							name, _ := got[i].benchmark()
							o.Log(fmt.Sprintf("%-70s %6.0f ns, AEAD %5.0f", name, got[i].NsPer, got[i].AEADNs))
						}
					}
					rows = append(rows, got...)
				}
			}
		}
	}
	return rows, nil
}

// pipeline measures one combination: a pipe for each worker, all at once.
func pipeline(n, flows, burst, workers int) ([]PipelineRow, error) {
	pipes := make([]*pipe, workers)
	for i := range pipes {
		p, err := newPipe(flows, sizes(n), burst)
		if err != nil {
			return nil, err
		}
		defer p.close()
		pipes[i] = p
	}
	var wg sync.WaitGroup
	errs := make([]error, workers)
	start := make(chan struct{})
	runtime.GC()
	for i, p := range pipes {
		wg.Go(func() {
			// One thread each, whose CPU time is measured.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			<-start
			errs[i] = p.measure()
		})
	}
	close(start)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	rows := make([]PipelineRow, 2)
	for d, dir := range []string{"seal", "open"} {
		r := PipelineRow{Direction: dir, Payload: pipes[0].mean(), Flows: flows, Burst: burst, Workers: workers, Engine: crypto.EngineName()}
		if n == IMIX {
			r.Mix = "imix"
		}
		for _, p := range pipes {
			r.NsPer += p.best[d] / float64(workers)
			r.AEADNs += p.aead[d] / float64(workers)
			r.PPS += 1e9 / p.best[d]
			r.Gbps += float64(p.mean()) * 8 / p.best[d]
			r.Allocs = max(r.Allocs, p.allocs)
		}
		r.Stages = make(map[string]float64)
		for i, name := range fastpath.StageNames {
			for _, p := range pipes {
				r.Stages[name] += p.stages[d][i] / float64(workers)
			}
		}
		rows[d] = r
	}
	return rows, nil
}

// end is one host: its engine.
type end struct {
	eng  *fastpath.Engine
	umem *xdp.Umem
}

// pipeFlow is what the model stacks on both sides know of a flow.
type pipeFlow struct {
	seq    uint32 // next inner sequence number of the sender
	key    uint32 // its number, from which its addresses follow
	sizeAt uint8
}

// pipe is a sending and a receiving engine with flows between them.
type pipe struct {
	a, b   end
	sizes  []int
	burst  int
	batch  int        // packets that are worked on together
	flows  []pipeFlow // in a random order
	keys   [2][]*crypto.Key
	next   int
	now    time.Duration
	descs  []xdp.Desc
	bufs   [][]byte        // of a vector of packets from a stack
	ab, ba packet.Template // of flow 0

	best, aead [2]float64 // ns a packet, to seal and to open
	stages     [2][fastpath.NumStages]float64
	watch      [2]*fastpath.StageTimes // nil: not measured
	allocs     float64
}

const (
	pipeMSS   = 9000
	pipeBatch = 240 // most packets that are worked on together
)

// pieces returns the number of segments that a packet of n bytes leaves in: what
// is longer than a chunk is cut.
func pieces(n, chunk int) int {
	room := chunk - 2*packet.MaxHeaders - xdp.Headroom
	return (n + crypto.Overhead + room - 1) / room
}

func newPipe(flows int, sizes []int, burst int) (*pipe, error) {
	p := &pipe{sizes: sizes, burst: burst, now: time.Second, flows: make([]pipeFlow, flows)}
	if largest := slices.Max(sizes); burst*largest > 60000 {
		p.burst = max(1, 60000/largest)
	}
	chunk := 2048
	if slices.Max(sizes) > 1500 {
		chunk = 4096
	}
	// The engine's outputs are emptied when all of a batch was worked on.
	p.batch = pipeBatch / pieces(slices.Max(sizes), chunk)
	for _, e := range []*end{&p.a, &p.b} {
		u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: 8192, ChunkSize: chunk, HugePages: true})
		if err != nil {
			return nil, err
		}
		e.umem = u
		e.eng = fastpath.NewEngine(fastpath.EngineConfig{Umem: u, Memory: 4 << 30})
	}
	p.ab, p.ba = template(pipeAddrs(0)), template(swap(pipeAddrs(0)))
	for i := range flows {
		sa, sb, err := session(crypto.AES128GCM)
		if err != nil {
			return nil, err
		}
		p.keys[0] = append(p.keys[0], sa.SendKey(0))
		p.keys[1] = append(p.keys[1], sb.RecvKey(0))
		ca, cb := pipeAddrs(i)
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
		p.flows[i] = pipeFlow{seq: 1001, key: uint32(i), sizeAt: uint8(i % len(sizes))}
	}
	rand.Shuffle(flows, func(i, j int) { p.flows[i], p.flows[j] = p.flows[j], p.flows[i] })
	for range p.batch {
		p.bufs = append(p.bufs, make([]byte, xdp.VnetHdrLen+packet.MaxHeaders+slices.Max(sizes)*p.burst))
	}
	return p, nil
}

func (p *pipe) close() { p.a.umem.Close(); p.b.umem.Close() }

func (p *pipe) mean() (n int) {
	for _, s := range p.sizes {
		n += s
	}
	return n / len(p.sizes)
}

// pipeAddrs returns the ends of flow i.
func pipeAddrs(i int) (a, b netip.AddrPort) {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 16), 1}), uint16(i)),
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 16), 2}), 80)
}

func swap(a, b netip.AddrPort) (x, y netip.AddrPort) { return b, a }

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

// inner composes a packet of flow f as the TAP delivers it: segs segments of n
// bytes from the sender, or with n = 0 the receiver's acknowledgement.
func (p *pipe) inner(buf []byte, f *pipeFlow, n, segs int) []byte {
	t, src, dst := &p.ab, 12, 16
	h := packet.Header{Seq: f.seq, Ack: 1001, Flags: packet.ACK | packet.PSH, Wnd: 32768}
	if n == 0 {
		t, src, dst = &p.ba, 16, 12
		h = packet.Header{Seq: 1001, Ack: f.seq, Flags: packet.ACK, Wnd: 32768}
	}
	frame := buf[xdp.VnetHdrLen:]
	hl := t.Compose(frame, &h, n*segs)
	ip := frame[packet.EthLen:]
	ip[src+2], ip[dst+2] = byte(f.key>>16), byte(f.key>>16)
	port := 20
	if n == 0 {
		port = 22
	}
	binary.BigEndian.PutUint16(ip[port:], uint16(f.key))
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(t.L4()), CsumOffset: 16}
	if segs > 1 {
		v.GSOType, v.GSOSize, v.HdrLen = xdp.VnetGSOTCPv4, uint16(n), uint16(hl)
	}
	v.Put(buf)
	return buf[:xdp.VnetHdrLen+hl+n*segs]
}

// begin starts the clock of a part of a round that counts for sealing (0) or
// opening (1), in the engine e.
func (p *pipe) begin(e *fastpath.Engine, direction int) time.Duration {
	if s := p.watch[direction]; s != nil {
		e.Measure(s)
		s.Begin()
	}
	return cpuTime()
}

// cpuTime is the CPU time of the calling thread.
func cpuTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // does not fail for one's own thread
	return time.Duration(t.Nano())
}

// clockTime is the least that reading cpuTime twice in a row shows: what the clock
// adds to every span that it measures, and what is taken off again.
var clockTime = sync.OnceValue(func() time.Duration {
	least := time.Hour
	for range 1000 {
		t := cpuTime()
		least = min(least, cpuTime()-t)
	}
	return least
})

// cpuSince is the CPU time of the calling thread since cpuTime was t.
func cpuSince(t time.Duration) time.Duration { return cpuTime() - t - clockTime() }

// round has the next flows send a burst each, and their receivers acknowledge.
// It returns the time that the two engines took, and the number of packets.
func (p *pipe) round() (seal, open time.Duration, packets int, err error) {
	a, b := p.a.eng, p.b.eng
	p.now += 100 * time.Microsecond
	count := min(len(p.flows), max(1, p.batch/p.burst))
	if p.next+count > len(p.flows) {
		p.next = 0
	}
	fs := p.flows[p.next : p.next+count]
	p.next += count
	var pkts [pipeBatch][]byte
	want := 0
	for i := range fs {
		f := &fs[i]
		n := p.sizes[f.sizeAt]
		f.sizeAt = uint8((int(f.sizeAt) + 1) % len(p.sizes))
		pkts[i] = p.inner(p.bufs[i], f, n, p.burst)
		f.seq += uint32(n * p.burst)
		want += n * p.burst
		packets += p.burst
	}
	t := p.begin(a, 0)
	a.InnerVec(pkts[:len(fs)], p.now)
	a.Flush(p.now)
	a.FinishOut(nil)
	seal += cpuSince(t)
	if err := p.carry(&p.a, &p.b); err != nil {
		return 0, 0, 0, err
	}
	a.ClearIn()

	t = p.begin(b, 1)
	for v := p.descs; len(v) > 0; v = v[min(len(v), fastpath.VectorSize):] {
		b.OuterIn(v[:min(len(v), fastpath.VectorSize)], p.now)
	}
	open += cpuSince(t)
	got := 0
	for i := range b.In() {
		q := &b.In()[i]
		for _, d := range q.Data() {
			got += len(d)
		}
	}
	if got != want {
		return 0, 0, 0, fmt.Errorf("bench: %d of %d bytes were delivered", got, want)
	}
	t = cpuTime()
	b.ClearIn()
	open += cpuSince(t)
	for i := range fs {
		pkts[i] = p.inner(p.bufs[i], &fs[i], 0, 1)
	}
	t = p.begin(b, 1)
	b.InnerVec(pkts[:len(fs)], p.now)
	b.Flush(p.now)
	b.FinishOut(nil)
	open += cpuSince(t)
	if err := p.carry(&p.b, &p.a); err != nil {
		return 0, 0, 0, err
	}
	t = p.begin(a, 0)
	a.OuterIn(p.descs, p.now)
	a.ClearIn()
	seal += cpuSince(t)
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

// measure fills in the pipe's figures.
func (p *pipe) measure() error {
	var before, after runtime.MemStats
	total := 0
	for try := range 6 {
		var seal, open time.Duration
		packets := 0
		if try == 1 { // the first round grows tables and rings
			runtime.ReadMemStats(&before)
		}
		for packets < max(40000, min(len(p.flows)*p.burst, 200000)) {
			a, b, n, err := p.round()
			if err != nil {
				return err
			}
			seal, open, packets = seal+a, open+b, packets+n
		}
		for i, d := range []time.Duration{seal, open} {
			if ns := float64(d.Nanoseconds()) / float64(packets); try > 0 && (p.best[i] == 0 || ns < p.best[i]) {
				p.best[i] = ns
			}
		}
		if try > 0 {
			total += packets
		}
	}
	runtime.ReadMemStats(&after)
	p.allocs = float64(after.Mallocs-before.Mallocs) / float64(total)
	if err := p.measureStages(); err != nil {
		return err
	}
	p.measureAEAD()
	return nil
}

// measureStages fills in the figures of the stages: of many tries that are short,
// so that some are not interrupted, the least of each stage.
func (p *pipe) measureStages() error {
	defer func() {
		p.watch = [2]*fastpath.StageTimes{}
		p.a.eng.Measure(nil)
		p.b.eng.Measure(nil)
	}()
	for try := range 50 {
		var times [2]fastpath.StageTimes
		p.watch = [2]*fastpath.StageTimes{&times[0], &times[1]}
		packets := 0
		for packets < 4000 {
			_, _, n, err := p.round()
			if err != nil {
				return err
			}
			packets += n
		}
		for d := range times {
			for i, t := range times[d].Times {
				if ns := float64(t.Nanoseconds()) / float64(packets); try == 0 || ns < p.stages[d][i] {
					p.stages[d][i] = ns
				}
			}
		}
	}
	return nil
}

// measureAEAD seals and opens frames with the keys of the flows in their order,
// in vectors as the engine does.
func (p *pipe) measureAEAD() {
	type frame struct{ src, dst, open []byte }
	frames := make([]frame, pipeBatch)
	size := slices.Max(p.sizes)
	for i := range frames {
		n := p.sizes[i%len(p.sizes)]
		frames[i] = frame{make([]byte, n+1, size+1), make([]byte, n+crypto.Overhead), make([]byte, n+crypto.Overhead)}
	}
	seals := make([]crypto.SealOp, pipeBatch)
	opens := make([]crypto.OpenOp, pipeBatch)
	at := 0
	for range 6 {
		var seal, open time.Duration
		n := 0
		for n < 60000 {
			for i := range frames {
				// A burst is of one flow.
				k := p.flows[(at+i/p.burst)%len(p.flows)].key
				seals[i] = crypto.SealOp{Key: p.keys[0][k], Dst: frames[i].dst, Src: frames[i].src, Offset: uint64(i)}
				opens[i] = crypto.OpenOp{Key: p.keys[1][k], Frame: frames[i].open, Offset: uint64(i)}
			}
			at = (at + pipeBatch/p.burst) % len(p.flows)
			t := cpuTime()
			crypto.SealVec(seals)
			seal += cpuSince(t)
			for i := range frames {
				copy(frames[i].open, frames[i].dst)
			}
			t = cpuTime()
			crypto.OpenVec(opens)
			open += cpuSince(t)
			n += pipeBatch
		}
		for i, d := range []time.Duration{seal, open} {
			if ns := float64(d.Nanoseconds()) / float64(n); p.aead[i] == 0 || ns < p.aead[i] {
				p.aead[i] = ns
			}
		}
	}
}
