package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Ports of the servers on both hosts. The last two are excluded by one of the
// daemons, for whose peer that host is one without a daemon.
const (
	portEncrypted = 6000
	portPlainA    = 6001
	portPlainB    = 6002
)

// config is what a soak is made of.
type config struct {
	duration time.Duration
	seed     uint64
	binary   string
	workers  int // connections at a time, of either host
	log      func(format string, args ...any)
}

// soak is a run. What it finds wrong it collects, and goes on.
type soak struct {
	config
	ctx   context.Context
	path  *lab.Path
	fwd   *lab.Forwarder
	hosts [2]*host
	begin time.Time

	nextID atomic.Uint64
	paused atomic.Bool
	active atomic.Int64

	mu       sync.Mutex
	plans    map[uint64]*plan
	results  map[uint64]chan error // of the servers
	secret   map[uint64]string     // connections that were seen to be encrypted, and how
	leaked   map[sighting]string   // connections whose stream was seen on the wire, and where first
	problems []string
	sum      summary
}

type summary struct {
	exact, planned, disturbed, explained    uint64
	encrypted, resumed, plain               uint64 // of those that were asked for
	bytes                                   int64
	disturbances, explanations              map[string]uint64
	restarts, kills, hangs, flushes, rekeys uint64
}

func (s *soak) problem(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.log("PROBLEM: %s", text)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.problems) < 1000 {
		s.problems = append(s.problems, text)
	}
}

// run does all of it and returns an error if anything was not as it must be.
func run(ctx context.Context, cfg config) error {
	l, err := lab.New()
	if err != nil {
		return err
	}
	defer l.Close()
	s := &soak{
		config: cfg, ctx: ctx, begin: time.Now(),
		plans: make(map[uint64]*plan), results: make(map[uint64]chan error), secret: make(map[uint64]string), leaked: make(map[sighting]string),
		sum: summary{disturbances: make(map[string]uint64), explanations: make(map[string]uint64)},
	}
	if s.path, err = l.Middle(lab.Options{Neighbours: true}); err != nil {
		return err
	}
	if s.fwd, err = s.path.Forward(lab.ForwarderOptions{Seed: cfg.seed, Tap: s.watch}); err != nil {
		return err
	}
	for i, iface := range []*lab.Iface{s.path.A, s.path.B} {
		h := &host{
			name: "ab"[i : i+1], iface: iface, binary: cfg.binary, log: cfg.log, reasons: make(map[string]uint64),
			flags: []string{"--exclude-ports", strconv.Itoa(portPlainA + i), "--rekey-bytes", "1M", "--rekey-every", "2s", "--drain-timeout", "2s"},
		}
		s.hosts[i] = h
		if err := h.start(ctx); err != nil {
			return err
		}
	}
	if err := s.serve(); err != nil {
		return err
	}
	s.log("begin: duration %v, seed %d, %d connections at a time", cfg.duration, cfg.seed, 2*cfg.workers)
	s.churn()
	return s.report()
}

// churn runs the eras: first daemons hang, which no connection may suffer from
// without a reason, then they also come and go, and then they stay, so that what
// they use can be compared.
func (s *soak) churn() {
	ctx, cancel := context.WithTimeout(s.ctx, s.duration)
	defer cancel()
	var wg sync.WaitGroup
	for i := range s.hosts {
		for w := range s.workers {
			wg.Go(func() { s.work(ctx, i, rand.New(rand.NewPCG(s.seed, uint64(100*i+w)))) })
		}
	}
	wg.Go(func() { s.weather(ctx, rand.New(rand.NewPCG(s.seed, 1000))) })
	wg.Go(func() { s.progress(ctx) })

	rng := rand.New(rand.NewPCG(s.seed, 1001))
	for _, era := range []struct {
		share time.Duration // of the whole, percent
		event func(*rand.Rand) error
		rest  time.Duration // times what an event took
	}{
		// Retransmissions, which become fewer and fewer, have to meet a daemon
		// that runs before patience ends.
		{20, s.hang, 3},
		{40, s.outage, 0},
	} {
		restless, stop := context.WithTimeout(ctx, s.duration*era.share/100)
		s.disturb(restless, rng, era.event, era.rest)
		stop()
	}
	s.log("the daemons stay from here on")
	// Warm, so that what is kept for reuse is there.
	s.calm(ctx, rng, s.duration/10)
	before := s.quiet(ctx)
	s.calm(ctx, rng, time.Until(s.begin.Add(s.duration))-s.duration/20)
	after := s.quiet(ctx)
	for i, h := range s.hosts {
		s.compare(h.name, before[i], after[i])
	}
	wg.Wait()
}

// disturb makes something happen now and then until ctx is done, with pauses of at
// least rest times what it took. It leaves both daemons running.
func (s *soak) disturb(ctx context.Context, rng *rand.Rand, event func(*rand.Rand) error, rest time.Duration) {
	var took time.Duration
	for wait(ctx, max(between(rng, s.duration/360, s.duration/90), rest*took)) {
		began := time.Now()
		// Also after ctx is done: a start is not cut short.
		err := event(rng)
		took = time.Since(began)
		if err != nil {
			s.problem("%v", err)
			for _, h := range s.hosts {
				if h.daemon() == nil {
					return
				}
			}
		}
	}
}

// hang stops a daemon for a while, or both.
func (s *soak) hang(rng *rand.Rand) error {
	s.count(&s.sum.hangs)
	a, z := s.hosts[0], s.hosts[1]
	long, short := between(rng, 100*time.Millisecond, 5*time.Second), between(rng, 100*time.Millisecond, 5*time.Second)
	switch rng.IntN(5) {
	case 0:
		s.count(&s.sum.hangs)
		var wg sync.WaitGroup
		var other error
		wg.Go(func() { other = a.hang(long) })
		err := z.hang(short)
		wg.Wait()
		return errors.Join(err, other)
	case 1, 2:
		return a.hang(long)
	default:
		return z.hang(long)
	}
}

// outage makes daemons restart, die and hang.
func (s *soak) outage(rng *rand.Rand) error {
	h := s.hosts[rng.IntN(2)]
	pause := between(rng, 0, 3*time.Second)
	switch n := rng.IntN(10); {
	case n < 3:
		s.count(&s.sum.restarts)
		return h.restart(s.ctx, pause)
	case n < 6:
		s.count(&s.sum.kills)
		return h.kill(s.ctx, pause)
	case n < 7:
		// Both at once.
		s.count(&s.sum.kills)
		s.count(&s.sum.restarts)
		var wg sync.WaitGroup
		var other error
		wg.Go(func() { other = s.hosts[0].kill(s.ctx, pause) })
		err := s.hosts[1].restart(s.ctx, 0)
		wg.Wait()
		return errors.Join(err, other)
	case n < 9:
		return s.hang(rng)
	default:
		return s.command(rng)
	}
}

// calm gives commands to the daemons and nothing worse, for a time.
func (s *soak) calm(ctx context.Context, rng *rand.Rand, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	for wait(ctx, between(rng, s.duration/360, s.duration/90)) {
		if err := s.command(rng); err != nil && ctx.Err() == nil {
			s.problem("%v", err)
		}
	}
}

func (s *soak) command(rng *rand.Rand) error {
	d := s.hosts[rng.IntN(2)].daemon()
	if d == nil {
		return nil
	}
	if rng.IntN(3) == 0 {
		s.count(&s.sum.flushes)
		_, err := d.FlushCache(s.ctx)
		return err
	}
	s.count(&s.sum.rekeys)
	_, err := d.Rekey(s.ctx)
	return err
}

// weather changes the wire until ctx is done, then makes it perfect.
func (s *soak) weather(ctx context.Context, rng *rand.Rand) {
	defer func() {
		s.fwd.Set(lab.AtoB, lab.Impair{})
		s.fwd.Set(lab.BtoA, lab.Impair{})
	}()
	for wait(ctx, between(rng, 500*time.Millisecond, 8*time.Second)) {
		for _, d := range []lab.Dir{lab.AtoB, lab.BtoA} {
			var im lab.Impair
			switch n := rng.IntN(10); {
			case n < 3:
			case n < 6:
				im.Drop = 0.02 * rng.Float64()
				im.Delay = between(rng, 0, 20*time.Millisecond)
			case n < 8:
				im.Drop, im.Reorder, im.Duplicate = 0.01*rng.Float64(), 0.1*rng.Float64(), 0.05*rng.Float64()
				im.ReorderTime = between(rng, time.Millisecond, 100*time.Millisecond)
			case n < 9:
				im.Cut, im.Coalesce, im.Corrupt = 0.3*rng.Float64(), 0.3*rng.Float64(), 0.01*rng.Float64()
			default:
				im.Drop = 1
			}
			s.fwd.Set(d, im)
			if im.Drop == 1 {
				wait(ctx, between(rng, 50*time.Millisecond, 1500*time.Millisecond))
				s.fwd.Set(d, lab.Impair{})
			}
		}
	}
}

// sighting is the beginning of a stream in clear. The connection's ends belong to
// it: the wire may have made another number of that of a plain connection.
type sighting struct {
	id       uint64
	from, to string // as packet.FromOuter has them
}

// watch looks on the wire for streams of connections that are encrypted.
func (s *soak) watch(l lab.Link, d lab.Dir, b []byte) {
	if l != lab.LinkA {
		return
	}
	var seg packet.Segment
	if packet.Parse(b, packet.FromOuter, &seg) != nil || seg.Len() < headerSize {
		return
	}
	p := seg.Payload()
	i := bytes.Index(p, magicBytes)
	if i < 0 || len(p)-i < headerSize {
		return
	}
	at := sighting{binary.BigEndian.Uint64(p[i+8:]), seg.Key.LocalAddr().String(), seg.Key.RemoteAddr().String()}
	s.mu.Lock()
	if s.leaked[at] == "" {
		s.leaked[at] = fmt.Sprintf("%v %v flags %#x seq %d, %d bytes, at %v", d, seg.Key, seg.Flags, seg.Seq, seg.Len(), time.Since(s.begin))
	}
	s.mu.Unlock()
}

var magicBytes = binary.BigEndian.AppendUint64(nil, magic)

// serve starts the servers of both hosts.
func (s *soak) serve() error {
	for _, h := range s.hosts {
		for _, port := range []int{portEncrypted, portPlainA, portPlainB} {
			for _, ip := range []string{h.iface.Addr4().String(), h.iface.Addr6().String()} {
				ln, err := h.iface.NS.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(port)))
				if err != nil {
					return err
				}
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						go s.answer(c)
					}
				}()
			}
		}
	}
	return nil
}

// answer is a server's side of a connection.
func (s *soak) answer(c net.Conn) {
	// A connection that ends before its number came is the client's to judge.
	id, err := header(c)
	if err != nil {
		c.Close()
		if errors.Is(err, errCorrupt) {
			s.problem("server: %v", err)
		}
		return
	}
	s.mu.Lock()
	p, result := s.plans[id], s.results[id]
	s.mu.Unlock()
	if p == nil {
		// Its client was reset already.
		c.Close()
		if id == 0 || id > s.nextID.Load() {
			s.problem("server: there is no connection %d", id)
		}
		return
	}
	e := newEnd(c, p, true)
	got, err := e.run(s.ctx, headerSize)
	atomic.AddInt64(&s.sum.bytes, got)
	if wrong(err) && s.ctx.Err() == nil {
		s.problem("server of connection %+v, from %v: %v", *p, c.RemoteAddr(), err)
	}
	result <- err
}

// work opens one connection after the other from host i until ctx is done.
func (s *soak) work(ctx context.Context, i int, rng *rand.Rand) {
	// Few connections of a short run would be asked for otherwise, perhaps all of
	// them while no daemon ran.
	each := s.duration < time.Minute
	ports := []int{portEncrypted, portEncrypted, portEncrypted, portEncrypted, portEncrypted, portEncrypted, portPlainA, portPlainB}
	for wait(ctx, between(rng, 0, 300*time.Millisecond)) {
		if s.paused.Load() {
			continue
		}
		p := makePlan(rng, s.nextID.Add(1), ports)
		s.connection(i, &p, rng.IntN(5) == 0 || each)
	}
}

// connection opens a connection from host i to the other, carries the plan out
// and judges what came of it.
func (s *soak) connection(i int, p *plan, ask bool) {
	result := make(chan error, 1)
	s.mu.Lock()
	s.plans[p.id], s.results[p.id] = p, result
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.plans, p.id)
		delete(s.results, p.id)
		s.mu.Unlock()
	}()
	from, to := s.hosts[i], s.hosts[1-i]
	source, addr := from.iface.Addr4(), to.iface.Addr4()
	if p.v6 {
		source, addr = from.iface.Addr6(), to.iface.Addr6()
	}
	begin := time.Now()
	s.active.Add(1)
	defer s.active.Add(-1)
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	c, port, err := from.iface.NS.DialBound(ctx, "tcp", source, net.JoinHostPort(addr.String(), strconv.Itoa(p.port)))
	local := port.String()
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: connect", errStalled)
		}
		s.judge(i, p, begin, local, err, nil)
		return
	}
	if ask && p.port == portEncrypted {
		s.ask(i, p, c)
	}
	e := newEnd(c, p, false)
	got, err := e.run(s.ctx, 0)
	atomic.AddInt64(&s.sum.bytes, got)
	if err != nil {
		// The server may have been told of nothing yet, and judges itself.
		s.judge(i, p, begin, local, err, nil)
		return
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case err = <-result:
	case <-t.C:
		err = fmt.Errorf("%w: the server's end did not end", errStalled)
	case <-s.ctx.Done():
		return
	}
	s.judge(i, p, begin, local, nil, err)
}

// ask finds out whether the connection is encrypted, and whether both daemons
// call it the same.
func (s *soak) ask(i int, p *plan, c net.Conn) {
	a, z := s.hosts[i].daemon(), s.hosts[1-i].daemon()
	if a == nil || z == nil {
		return
	}
	began := time.Now()
	f, err := a.Session(s.ctx, c.LocalAddr(), c.RemoteAddr())
	if err != nil {
		s.count(&s.sum.plain)
		return
	}
	s.count(&s.sum.encrypted)
	if f.Resumed {
		s.count(&s.sum.resumed)
	}
	s.mu.Lock()
	s.secret[p.id] = fmt.Sprintf("%+v, asked at %v", f, began.Sub(s.begin))
	s.mu.Unlock()
	g, err := z.Session(s.ctx, c.RemoteAddr(), c.LocalAddr())
	if err == nil && g.SessionID != f.SessionID {
		s.problem("connection %d from %v: session IDs %s and %s (asked at %v)", p.id, c.LocalAddr(), f.SessionID, g.SessionID, began)
	}
}

func (s *soak) count(n *uint64) { atomic.AddUint64(n, 1) }

// judge says whether a connection ended as it may.
func (s *soak) judge(i int, p *plan, begin time.Time, local string, client, server error) {
	if s.ctx.Err() != nil {
		return // all were ended in the middle of something
	}
	s.mu.Lock()
	ends := []string{local, net.JoinHostPort(s.addr(1-i, p.v6), strconv.Itoa(p.port))}
	asked, leaked := s.secret[p.id], ""
	delete(s.secret, p.id)
	for _, at := range []sighting{{p.id, ends[0], ends[1]}, {p.id, ends[1], ends[0]}} {
		leaked += s.leaked[at]
		delete(s.leaked, at)
	}
	s.mu.Unlock()
	if asked != "" && leaked != "" {
		s.problem("connection %+v from %s %s was encrypted (%s), and its stream is on the wire: %s", *p, s.hosts[i].name, local, asked, leaked)
	}
	for _, err := range []error{client, server} {
		if wrong(err) {
			s.problem("connection %+v from %s %s after %v: client: %v, server: %v", *p, s.hosts[i].name, local, time.Since(begin), client, server)
			return
		}
	}
	if client == nil && server == nil {
		s.count(&s.sum.exact)
		return
	}
	if planned(p, client, server) {
		s.count(&s.sum.planned)
		return
	}
	for _, err := range []error{client, server} {
		if err != nil && !network(err) && !errors.Is(err, net.ErrClosed) {
			s.problem("connection %+v from %s %s: client: %v, server: %v", *p, s.hosts[i].name, local, client, server)
			return
		}
	}
	for _, h := range s.hosts {
		if what := h.disturbed(begin, time.Now()); what != "" {
			s.count(&s.sum.disturbed)
			s.mu.Lock()
			s.sum.disturbances[what]++
			s.mu.Unlock()
			return
		}
	}
	// Nobody touched the daemons: one of them has to say why.
	why := s.hosts[i].reason(s.ctx, ends[0], ends[1])
	if why == "" {
		why = s.hosts[1-i].reason(s.ctx, ends[1], ends[0])
	}
	if why == "" {
		s.problem("connection %+v from %s %s after %v: no reason is known: client: %v, server: %v", *p, s.hosts[i].name, local, time.Since(begin), client, server)
		return
	}
	s.count(&s.sum.explained)
	s.mu.Lock()
	s.sum.explanations[why]++
	s.mu.Unlock()
}

func (s *soak) addr(i int, v6 bool) string {
	if v6 {
		return s.hosts[i].iface.Addr6().String()
	}
	return s.hosts[i].iface.Addr4().String()
}

// planned reports whether the errors are those of a reset that the plan asks for.
func planned(p *plan, client, server error) bool {
	mine, theirs := client, server
	switch p.end {
	case clientReset:
	case serverReset:
		mine, theirs = server, client
	default:
		return false
	}
	return (mine == nil || errors.Is(mine, net.ErrClosed)) && (theirs == nil || network(theirs))
}

// wait waits, and reports whether ctx is not done.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return ctx.Err() == nil
	}
}

func between(rng *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(rng.Int64N(int64(most-least)+1))
}
