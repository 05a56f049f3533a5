package fastpath

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

const (
	ringSize    = 4096
	maxRecent   = 1024             // plain and failed flows that are remembered for `flows`
	keepRecent  = 60 * time.Second // and how long
	maxQueues   = 64
	txReserve   = 1024 // chunks that the fill rings leave for transmission
	smallChunk  = 2048
	largeChunk  = 4096
	chunksQueue = 8192 // chunks per queue beside the common ones
	chunksBase  = 16384

	sysfs = "/sys"

	// defaultMemory is for all workers together, minMemory what one of many has
	// of it at least.
	defaultMemory = 256 << 20
	minMemory     = 64 << 20

	// mapSlack is how many flows the maps hold beyond the limit, which workers
	// look at before they insert.
	mapSlack = 256

	// flowsAtOnce is how many flows a worker describes before it turns to its packets
	// again: a few milliseconds.
	flowsAtOnce = 2048

	// How often the heartbeat is given, and how long after the last one the
	// daemon counts as hung: so that the first retransmission of a SYN, a second
	// after it, does not wait for the daemon any more.
	beatEvery = 100 * time.Millisecond
	beatStale = 800 * time.Millisecond

	// mendEvery is how long the guard may be off the interface, and packets come
	// to queues without a socket.
	mendEvery = time.Second
)

// Host is host mode (design section 3): one NIC, one TAP to the local kernel,
// and the workers that translate between them, each with queues of both and a
// slow path of its own. All exported methods may be called from any goroutine.
type Host struct {
	cfg   HostConfig
	log   *slog.Logger
	start time.Time
	caps  xdp.Capabilities

	place     *placement
	umems     []*xdp.Umem // of each worker
	ports     [][]port
	tap       *xdp.TAP
	diverter  diverter
	local     *xdp.Diverter // the diverter, in host mode
	gateway   *xdp.Gateway  // nil in host mode
	bypass    *gatewayDiverter
	inner     [][]port // in gateway mode, of each worker
	innerNIC  xdp.Capabilities
	left      []xdp.FlowKey // of an earlier gateway's daemon
	dead      deadFlows
	guard     *xdp.Guard
	queues    []QueueStatus
	mode      xdp.Mode
	ended     int
	unguarded bool         // the guard could not be put back, and the log says so
	wentDown  atomic.Bool  // the interface was down, and the XDP program not seen to run since
	downAt    *xdpSeen     // of mendXDP, once it has looked since
	mtu       atomic.Int64 // of the interface
	mtuLimit  int          // largest packet that the sockets take

	orphans map[packet.Key]bool // left by an earlier daemon, and could not be ended; fixed after the start

	diagMu sync.Mutex
	diag   *xdp.SocketDiag

	restoreQueues map[string]func() error // by interface
	receiving     map[string]int          // receive queues of each NIC, when last looked

	workers []*worker
	owners  *owners  // nil: there is one worker
	pulses  []uint64 // of each worker, when watch last looked
	shed    shedder
	cache   *slowpath.Cache // nil: nothing is resumed
	limiter *slowpath.Limiter
	pool    *agreement
	policy  xdp.Policy
	release func() // lets the process's threads run anywhere again

	link      chan error // the device is down or gone
	innerLink chan error // the same of a gateway's inner one
	tapLink   chan error // the same of the TAP
	stopLink  func()
	stopVM    func()
	draining  atomic.Bool
	done      chan struct{}
	err       error
	closeOnce sync.Once
	closeErr  error
}

// StartHost attaches to the interface and starts translating. On error nothing
// stays attached; the error is one line that says what a user can change.
func StartHost(ctx context.Context, cfg HostConfig) (_ *Host, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	h := &Host{
		cfg: cfg, log: cfg.Log, start: time.Now(), done: make(chan struct{}), orphans: make(map[packet.Key]bool),
		restoreQueues: make(map[string]func() error), receiving: make(map[string]int),
	}
	defer func() {
		if err != nil {
			h.detach()
		}
	}()
	if !cfg.NoResume {
		h.cache = slowpath.NewCache(0, 0)
	}
	if h.policy, err = cfg.kernelPolicy(); err != nil {
		return nil, err
	}
	want, err := xdp.ParseMode(cfg.Mode)
	if err != nil {
		return nil, err
	}
	if err = xdp.CheckPrivileges(); err != nil {
		return nil, err
	}
	if cfg.GuardCgroup != "" && cfg.Guard != GuardOff {
		// The default may be missing; what was named is there, or a mistake.
		if err = xdp.CheckCgroup(cfg.GuardCgroup); err != nil {
			return nil, fmt.Errorf("guard-cgroup: %w", err)
		}
	}
	if h.caps, err = probe(cfg.Interface); err != nil {
		return nil, err
	}
	if h.caps.VLANStripped {
		h.log.Warn("the interface takes VLAN tags off and cannot be kept from it: connections in its VLANs cannot be encrypted, and may fail: run on the VLAN devices instead", "interface", cfg.Interface)
	}
	if h.diag, err = xdp.OpenSocketDiag(); err != nil {
		return nil, err
	}
	// Encryption is not offered before the kernel's generator is seeded
	// (ENO 5, TC 8): this read blocks until it is.
	if _, err = rand.Read(make([]byte, 32)); err != nil {
		return nil, fmt.Errorf("randomness: %w", err)
	}
	queues, err := h.pickQueues()
	if err != nil {
		return nil, err
	}
	allowed, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	h.place, err = place(&h.cfg, len(queues), readCPUs(sysfs, allowed), deviceNode(sysfs, cfg.Interface))
	if err != nil {
		return nil, err
	}
	if len(h.place.cpus) > 1 {
		h.owners = newOwners()
	}
	if cfg.Inner != "" {
		err = h.openGateway(want, queues)
	} else {
		err = h.openPorts(want, queues)
	}
	if err != nil {
		return nil, err
	}
	if err = h.startWorkers(); err != nil {
		return nil, err
	}
	if err = errors.Join(h.diverter.Beat(), h.diverter.Enable(true)); err != nil {
		h.stopThreads()
		return nil, err
	}
	if h.bypass != nil {
		h.bypass.keep = !cfg.Block
	}
	h.receiving[cfg.Interface] = h.caps.RXQueues
	if h.gateway != nil {
		h.receiving[cfg.Inner] = h.innerNIC.RXQueues
	}
	h.link = make(chan error, 1)
	if h.stopLink, err = xdp.WatchLink(h.caps.Ifindex, h.link); err != nil {
		h.stopThreads()
		return nil, err
	}
	if h.gateway != nil {
		h.innerLink = make(chan error, 1)
		stopOuter := h.stopLink
		stopInner, err := xdp.WatchLink(h.innerNIC.Ifindex, h.innerLink)
		if err != nil {
			h.stopThreads()
			return nil, err
		}
		h.stopLink = func() { stopOuter(); stopInner() }
	} else {
		h.tapLink = make(chan error, 1)
		stopOuter := h.stopLink
		stopTAP, err := xdp.WatchLink(h.tap.Ifindex(), h.tapLink)
		if err != nil {
			h.stopThreads()
			return nil, err
		}
		h.stopLink = func() { stopOuter(); stopTAP() }
	}
	if h.stopVM, err = watchVMGeneration(h.restored); err != nil {
		h.stopThreads()
		return nil, err
	}
	go h.watch()
	return h, nil
}

// probe is xdp.Probe of an interface that has a wire behind it.
func probe(iface string) (xdp.Capabilities, error) {
	c, err := xdp.Probe(iface)
	switch {
	case err != nil:
	case c.Loopback:
		err = fmt.Errorf("%s is the loopback device: its connections do not leave this host, and are not encrypted", iface)
	case c.NoEthernet:
		err = fmt.Errorf("%s has no Ethernet header on its packets, as tunnels have none (%s): its connections cannot be encrypted", iface, c.Driver)
	}
	return c, err
}

// startWorkers makes the workers and starts their threads. On error none runs.
func (h *Host) startWorkers() (err error) {
	n := len(h.place.cpus)
	h.limiter = slowpath.NewLimiter()
	h.pool = newAgreement(n)
	defer func() {
		if err == nil {
			return
		}
		for _, w := range h.workers {
			_ = unix.Close(w.wakeFD)
		}
		h.pool.close()
	}()
	// Workers that never rest must not keep the rest of the process from running.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), n+1))
	for i := range n {
		eng := NewEngine(EngineConfig{
			Umem: h.umems[i], Virtual: h.caps.Virtual, InnerChunks: h.gateway != nil, InnerVirtual: h.innerNIC.Virtual, Memory: h.memory(n),
			RekeyBytes: h.cfg.RekeyBytes, RekeyFrames: h.cfg.RekeyFrames, RekeyEvery: h.cfg.RekeyEvery, TCPKeepalive: h.cfg.TCPKeepalive,
		})
		c := workerConfig{
			id: i, cpu: h.place.cpus[i], own: h.place.own[i], poll: h.cfg.Poll, drive: h.cfg.BusyPoll, start: h.start,
			eng: eng, umem: h.umems[i], ports: h.ports[i], slow: newSlowSide(h, h.place.own[i]), owners: h.owners,
		}
		if h.gateway != nil {
			c.inner = h.inner[i]
		} else {
			c.tap = h.tap.Queue(i)
		}
		w, err := newWorker(c)
		if err != nil {
			return err
		}
		h.workers = append(h.workers, w)
	}
	for i := range h.queues {
		q := &h.queues[i]
		w := h.workers[q.Worker]
		q.CPU, q.Checksum = w.cpu, "software"
		if q.Interface == h.cfg.Interface && w.offload || q.Interface != h.cfg.Interface && w.requestInner != nil {
			q.Checksum = "offload"
		}
	}
	h.pulses = make([]uint64, n)
	// Only now may packets come: the rings are filled and both sides run.
	for _, w := range h.workers {
		w.peers = h.workers
		w.reclaim()
	}
	tids := make(map[int]bool)
	for _, w := range h.workers {
		go w.run()
		select {
		case tid := <-w.tid:
			tids[tid] = true
		case <-w.done:
			err := w.err
			h.stopThreads()
			return err
		}
	}
	if len(h.place.others) > 0 {
		h.release = confine(h.place.others, tids)
	}
	return nil
}

// pickQueues decides which NIC queues to bind. To leave one out would send its
// flows past the daemon, so the NIC must not use it either.
func (h *Host) pickQueues() ([]int, error) {
	n := h.caps.RXQueues
	if n > maxQueues {
		return nil, fmt.Errorf("%s has %d queues, at most %d are supported: reduce them with ethtool -L", h.cfg.Interface, n, maxQueues)
	}
	if len(h.cfg.Queues) == 0 {
		qs := make([]int, n)
		for i := range qs {
			qs[i] = i
		}
		return qs, nil
	}
	var qs []int
	for _, q := range h.cfg.Queues {
		if q < 0 || q >= n {
			return nil, fmt.Errorf("queue %d: %s has queues 0-%d", q, h.cfg.Interface, n-1)
		}
		if !slices.Contains(qs, q) {
			qs = append(qs, q)
		}
	}
	if len(qs) < n {
		if err := h.concentrate(qs, n); err != nil {
			return nil, err
		}
	}
	return qs, nil
}

// concentrate makes the NIC leave the queues alone that are not to be bound.
func (h *Host) concentrate(queues []int, have int) error {
	how, err := h.keepTo(h.cfg.Interface, queues)
	if err != nil {
		return fmt.Errorf("%s has %d receive queues, only %d are named, and flows of the others could not be decrypted: %w", h.cfg.Interface, have, len(queues), err)
	}
	h.log.Info("packets are kept away from the other queues", "interface", h.cfg.Interface, "by", how)
	h.caps, err = xdp.Probe(h.cfg.Interface)
	return err
}

// keepTo makes a NIC receive on the given queues alone until detach, which puts
// back what was there the first time: later it may be of this program's making.
func (h *Host) keepTo(iface string, queues []int) (how string, err error) {
	how, restore, err := xdp.Concentrate(iface, queues)
	if err == nil && h.restoreQueues[iface] == nil {
		h.restoreQueues[iface] = restore
	}
	return how, err
}

// mendQueues sees to it that no NIC that was given more queues receives on those
// that have no socket: segments of encrypted connections are lost there, and SYNs
// make plain ones.
func (h *Host) mendQueues() {
	for iface, before := range h.receiving {
		n, err := xdp.ReceiveQueues(iface)
		if err != nil || n == before {
			continue // the end of the interface is told of otherwise
		}
		h.receiving[iface] = n
		var bound []int
		for _, q := range h.queues {
			if q.Interface == iface {
				bound = append(bound, q.Queue)
			}
		}
		if n <= len(bound) {
			continue
		}
		how, err := h.keepTo(iface, bound)
		if err != nil {
			h.log.Error("the interface was given receive queues that the daemon does not serve: restart it", "interface", iface, "queues", n, "served", len(bound), "err", err)
			continue
		}
		h.log.Warn("the interface was given more receive queues: packets are kept to those that the daemon serves until it is restarted", "interface", iface, "queues", n, "served", len(bound), "by", how)
		if n, err = xdp.ReceiveQueues(iface); err == nil {
			h.receiving[iface] = n
		}
	}
}

// openPorts binds the NIC queues and makes the TAP, then attaches the diverter,
// which is still disabled, and the guard.
func (h *Host) openPorts(want xdp.Mode, queues []int) error {
	chunk := chunkSize(want, &h.caps)
	n := len(h.place.cpus)
	err := h.makeUmems(len(queues), chunk)
	if err != nil {
		return err
	}
	// Never below the MTU of the interface, which may grow.
	h.tap, err = xdp.OpenTAP(xdp.TAPConfig{Queues: n, MTU: xdp.MaxTAPMTU})
	if err != nil {
		return err
	}
	if err := h.bind(want, queues, chunk); err != nil {
		return fmt.Errorf("bind %s: %w", h.cfg.Interface, err)
	}
	h.mtu.Store(int64(h.caps.MTU))
	if n > 1 {
		if err := h.tap.SetSteering(h.local.SteeringProgram()); err != nil {
			return err
		}
	}
	h.guard, err = h.openGuard()
	return err
}

// chunkSize chooses chunks that hold a packet of any of the NICs.
func chunkSize(want xdp.Mode, nics ...*xdp.Capabilities) int {
	for _, nic := range nics {
		if !fits(nic, smallChunk, want != xdp.ModeCopy && want != xdp.ModeGeneric && nic.ZeroCopy) {
			return largeChunk
		}
	}
	return smallChunk
}

// makeUmems makes each worker's packet memory, for so many queues of NICs.
func (h *Host) makeUmems(queues, chunk int) error {
	n := len(h.place.cpus)
	for i := range n {
		own := (queues - i + n - 1) / n
		u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: cmp.Or(h.cfg.UmemChunks, chunksBase+chunksQueue*own), ChunkSize: chunk, TXMetadata: true})
		if err != nil {
			return err
		}
		h.umems = append(h.umems, u)
	}
	return nil
}

// bind attaches the diverter and binds all queues. Natively attached, the queues
// of each worker get the best mode that they all can have; generic XDP is the
// last resort, and only of ModeAuto.
func (h *Host) bind(want xdp.Mode, queues []int, chunk int) error {
	if want != xdp.ModeAuto {
		return h.bindQueues([]xdp.Mode{want}, queues, chunk, "")
	}
	err := h.bindQueues([]xdp.Mode{xdp.ModeZeroCopy, xdp.ModeCopy}, queues, chunk, "")
	if err == nil || errors.Is(err, xdp.ErrXDPBusy) { // in every mode
		return err
	}
	return h.bindQueues([]xdp.Mode{xdp.ModeGeneric}, queues, chunk, err.Error())
}

// bindQueues does it with the first of modes that works; they are all native, or
// generic. refused says why better ones are not among them.
func (h *Host) bindQueues(modes []xdp.Mode, queues []int, chunk int, refused string) (err error) {
	defer func() {
		if err != nil {
			h.unbind()
			if refused != "" {
				err = fmt.Errorf("%s; %w", refused, err)
			}
		}
	}()
	weakest := modes[len(modes)-1]
	h.local, err = xdp.AttachHost(xdp.HostAttachConfig{
		Ifindex: h.caps.Ifindex, TAPIfindex: h.tap.Ifindex(), Mode: weakest,
		Frags:     slices.ContainsFunc(modes, func(m xdp.Mode) bool { return multiBuffer(&h.caps, m, chunk) }),
		Heartbeat: beatStale, Policy: h.policy, Flows: h.maxFlows() + mapSlack,
	})
	if err != nil {
		return fmt.Errorf("%v: %w", weakest, err)
	}
	h.diverter = h.local
	h.ports = make([][]port, len(h.umems))
	h.queues = make([]QueueStatus, len(queues))
	h.mode, h.mtuLimit = modes[0], xdp.MaxTAPMTU
	for w := range h.umems {
		mode, why, err := firstMode(modes, refused, func(m xdp.Mode) (err error) {
			h.ports[w], err = h.bindWorker(&h.caps, w, m, queues, chunk, h.local.RegisterSocket)
			return err
		})
		if err != nil {
			return err
		}
		h.mode = max(h.mode, mode)
		if !multiBuffer(&h.caps, mode, chunk) {
			h.mtuLimit = min(h.mtuLimit, largestMTU(chunk, mode == xdp.ModeZeroCopy))
		}
		for i := w; i < len(queues); i += len(h.umems) {
			h.queues[i] = QueueStatus{Interface: h.cfg.Interface, Queue: queues[i], Worker: w, Mode: mode.String(), Refused: why, CPU: -1}
		}
	}
	return nil
}

// firstMode tries modes, best first, and returns the first that works, with why
// those before it, and those that were refused earlier, did not.
func firstMode(modes []xdp.Mode, refused string, try func(xdp.Mode) error) (xdp.Mode, string, error) {
	var earlier, reasons []string
	if refused != "" {
		earlier = append(earlier, refused)
	}
	for _, m := range modes {
		err := try(m)
		if err == nil {
			return m, strings.Join(append(earlier, reasons...), "; "), nil
		}
		if errors.Is(err, xdp.ErrXDPBusy) { // in every mode
			return 0, "", err
		}
		reasons = append(reasons, fmt.Sprintf("%v: %v", m, err))
	}
	return 0, "", errors.New(strings.Join(reasons, "; "))
}

// bindWorker binds a worker's queues of a NIC, all in one mode: they share its
// packet memory. register is told of each.
func (h *Host) bindWorker(nic *xdp.Capabilities, w int, m xdp.Mode, queues []int, chunk int, register func(queue int, s *xdp.Socket) error) (ports []port, err error) {
	defer func() {
		if err != nil {
			for i := range ports {
				_ = ports[i].sock.Close()
			}
			ports = nil
		}
	}()
	for i := w; i < len(queues); i += len(h.umems) {
		q := queues[i]
		s, err := xdp.NewSocket(h.umems[w], xdp.SocketConfig{
			Ifindex: nic.Ifindex, Queue: q, Mode: m,
			FillSize: ringSize, CompletionSize: ringSize, RXSize: ringSize, TXSize: ringSize, Reserve: txReserve,
			MultiBuffer: multiBuffer(nic, m, chunk), BusyPoll: h.cfg.BusyPoll,
		})
		if err != nil {
			return ports, fmt.Errorf("queue %d: %w", q, err)
		}
		ports = append(ports, port{queue: q, sock: s})
		if err := register(q, s); err != nil {
			return ports, err
		}
	}
	return ports, nil
}

// multiBuffer reports whether packets may be larger than a chunk: by the MTU,
// or because a virtual device hands merged ones to generic XDP.
func multiBuffer(nic *xdp.Capabilities, m xdp.Mode, chunk int) bool {
	return !fits(nic, chunk, m == xdp.ModeZeroCopy) || m == xdp.ModeGeneric && nic.Virtual
}

// fits reports whether a packet of the MTU's size is received in one chunk.
func fits(nic *xdp.Capabilities, chunk int, zeroCopy bool) bool {
	return nic.MTU <= largestMTU(chunk, zeroCopy)
}

// largestMTU is the size of the largest IP packet that is received in one chunk.
// In zero-copy mode that is decided by the driver: several (igb, igc, some
// ixgbe) tell the hardware a length in KiB, rounded down, and what is longer
// comes in pieces that look like packets.
func largestMTU(chunk int, zeroCopy bool) int {
	room := chunk - xdp.Headroom
	if zeroCopy {
		room &^= 1023
	}
	return room - packet.EthLen - packet.VLANLen
}

func (h *Host) unbind() {
	_ = h.closePorts()
	if h.diverter != nil {
		_ = h.diverter.Close()
		h.diverter, h.local, h.gateway = nil, nil, nil
	}
}

func (h *Host) closePorts() error {
	var errs []error
	for _, ps := range slices.Concat(h.ports, h.inner) {
		for i := range ps {
			errs = append(errs, ps[i].sock.Close())
		}
	}
	h.ports, h.inner, h.queues = nil, nil, nil
	return errors.Join(errs...)
}

// openGuard takes over the guard that a killed daemon left, or makes one, and
// ends the sockets whose encryption died with that daemon (T22).
func (h *Host) openGuard() (*xdp.Guard, error) {
	if h.cfg.Guard == GuardOff {
		_, ended, err := xdp.RemoveGuard(h.caps.Ifindex, h.cfg.GuardPins, xdp.DestroySocket)
		h.ended = ended
		h.log.Warn("the guard is off: forged segments can enter encrypted connections by side doors, and plaintext can leave by them")
		return nil, err
	}
	g, left, err := xdp.OpenGuard(xdp.GuardConfig{
		Ifindex: h.caps.Ifindex, Mark: h.local.Mark(), Policy: h.policy,
		Cgroup: h.cfg.GuardCgroup, Pins: h.cfg.GuardPins, Complete: h.cfg.Guard == GuardOn,
	})
	if err != nil {
		return nil, err
	}
	h.leftovers(g, left)
	for _, l := range g.Layers() {
		if l.Reason != "" {
			h.log.Warn("a layer of the guard is not complete", "layer", l.Name, "active", l.Active, "why", l.Reason)
		}
	}
	return g, nil
}

// guardState tells of the guard as Status does.
func (h *Host) guardState() (state string, layers []GuardLayer) {
	state, layers = "active", []GuardLayer{}
	if h.gateway != nil {
		return state, append(layers, GuardLayer{Layer: "gateway", Active: true, Persistent: true})
	}
	if h.guard == nil {
		state = GuardOff
	}
	for _, l := range h.guard.Layers() {
		layers = append(layers, GuardLayer{Layer: l.Name, Active: l.Active, Persistent: l.Persistent, Reason: l.Reason})
		if !l.Active || !l.Persistent {
			state = "partial"
		}
	}
	return state, layers
}

// Cleanup removes what a killed daemon, or one that was told to keep it, left on
// the interface: the guard, and the sockets of the connections that it keeps
// shut. pins is HostConfig.GuardPins. It reports whether there was one, and how
// many connections it ended.
func Cleanup(iface, pins string) (found bool, ended int, err error) {
	if err := xdp.CheckPrivileges(); err != nil {
		return false, 0, err
	}
	caps, err := xdp.Probe(iface)
	if err != nil {
		return false, 0, err
	}
	if xdp.GatewayOn(caps.Ifindex) {
		return false, 0, fmt.Errorf("a gateway's program is on %s: name its other interface with --inner-interface", iface)
	}
	return xdp.RemoveGuard(caps.Ifindex, pins, xdp.DestroySocket)
}

func (h *Host) leftovers(g *xdp.Guard, left []xdp.FlowKey) {
	for _, k := range left {
		key := packet.KeyFromBytes(k)
		if err := h.destroy(k); err != nil {
			// The guard keeps it shut until it is gone.
			h.log.Warn("a connection left by a killed daemon could not be ended", "flow", key.String(), "err", err)
			h.orphans[key] = true
			continue
		}
		if err := g.Delete(k); err != nil {
			h.log.Warn("a connection left by a killed daemon is still guarded", "flow", key.String(), "err", err)
			continue
		}
		h.ended++
		if err := nudge(key); err != nil {
			h.log.Debug("the peer of an ended connection was not told", "flow", key.String(), "err", err)
		}
	}
	if len(left) > 0 {
		h.log.Info("ended connections whose encryption died with an earlier daemon", "found", len(left), "ended", h.ended)
	}
}

// watch gives the heartbeat, and ends the host when its worker or its device
// ends.
func (h *Host) watch() {
	defer close(h.done)
	stop, mended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(mended)
		h.mend(stop)
	}()
	defer func() {
		close(stop)
		<-mended
	}()
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	ended := make(chan *worker, len(h.workers))
	for _, w := range h.workers {
		go func() {
			<-w.done
			ended <- w
		}()
	}
	for {
		select {
		case err := <-h.link:
			if errors.Is(err, xdp.ErrDeviceDown) {
				h.log.Warn("the interface is down", "interface", h.cfg.Interface)
				h.wentDown.Store(true)
				continue
			}
			if mtu := xdp.DeviceMTU(0); errors.As(err, &mtu) {
				h.setMTU(int(mtu))
				continue
			}
			h.err = fmt.Errorf("%s: %w", h.cfg.Interface, err)
		case err := <-h.innerLink:
			if mtu := xdp.DeviceMTU(0); errors.Is(err, xdp.ErrDeviceDown) || errors.As(err, &mtu) {
				h.log.Warn("the inner interface has changed", "interface", h.cfg.Inner, "change", err)
				continue
			}
			h.err = fmt.Errorf("%s: %w", h.cfg.Inner, err)
		case err := <-h.tapLink:
			// Everything to and from the local stack goes through it.
			if errors.Is(err, xdp.ErrDeviceDown) {
				if err = h.tap.SetUp(); err == nil {
					h.log.Warn("the TAP device was set down by another program, and is up again", "device", h.tap.Name())
				}
			}
			if mtu := xdp.DeviceMTU(0); err == nil || errors.As(err, &mtu) {
				continue
			}
			h.err = fmt.Errorf("%s: %w", h.tap.Name(), err)
		case <-beat.C:
			h.beat()
			if err := h.shed.tick(time.Now(), h.passedSYNs, h.diverter.Shed); err != nil {
				h.log.Warn("SYNs still pass to the stack", "err", err)
			}
			if h.cache != nil {
				h.cache.Expire(time.Since(h.start))
			}
			continue
		case w := <-ended:
			h.err = w.err
		}
		return
	}
}

// mend puts right, until stop is closed, what other programs change. It has a
// goroutine of its own: what it asks the kernel for waits while any device of the
// machine is being configured (the RTNL lock), for seconds with some drivers, and
// the heartbeat must not.
func (h *Host) mend(stop <-chan struct{}) {
	tick := time.NewTicker(mendEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			h.mendGuard()
			h.mendQueues()
			h.mendXDP()
		case <-stop:
			return
		}
	}
}

// mendGuard sees to it that the guard's filters stay on the interface. Without
// them nothing that is injected would reach a socket, or all that is forged would.
func (h *Host) mendGuard() {
	gone, err := h.guard.Mend()
	switch {
	case errors.Is(err, unix.ENODEV):
		return // the end of the interface is told of otherwise
	case err != nil && !h.unguarded:
		h.log.Error("the guard is not on the interface", "err", err)
	case err == nil && gone:
		h.log.Warn("the guard was taken off the interface by another program, and put back", "interface", h.cfg.Interface)
	}
	h.unguarded = err != nil
}

// mendXDP sees to it that the driver runs the XDP program again after the interface
// was down: vmxnet3 does not. What should have been diverted comes to the guard then.
// While the program was seen to run since, nothing that arrives can bring it to act.
func (h *Host) mendXDP() {
	if h.local == nil || !h.wentDown.Load() {
		return
	}
	// In this order: what the guard drops the program has seen before.
	counters, err := h.guard.Counters()
	runs, err2 := h.local.Runs()
	if errors.Join(err, err2) != nil {
		return
	}
	dropped := counters["guard_in_flow_dropped"]
	last := h.downAt
	h.downAt = &xdpSeen{runs, dropped}
	switch {
	case last == nil: // the first look since
		return
	case runs != last.runs:
	case dropped == last.dropped:
		return
	default:
		if err := h.local.Reattach(); err != nil {
			h.log.Error("the driver does not run the XDP program any more: restart the daemon", "interface", h.cfg.Interface, "err", err)
		} else {
			h.log.Warn("the driver did not run the XDP program any more after the interface was down: it was attached again", "interface", h.cfg.Interface)
		}
	}
	h.wentDown.Store(false)
	h.downAt = nil
}

// xdpSeen is what mendXDP compares.
type xdpSeen struct{ runs, dropped uint64 }

// passedSYNs returns how many SYNs from the wire did not come to the slow path:
// those that a host passed to its stack, or a gateway forwarded or refused.
func (h *Host) passedSYNs() (uint64, error) {
	c, err := h.diverter.Counters()
	return c["xdp_syn_passed_shed"] + c["outer_syn_forwarded"] + c["outer_syn_refused"], err
}

// setMTU follows the MTU of the interface. What the sockets take was decided when
// they were bound: above that, encrypted connections keep to smaller segments.
func (h *Host) setMTU(mtu int) {
	h.mtu.Store(int64(mtu))
	use := min(mtu, h.mtuLimit)
	if h.gateway != nil {
		use = min(use, h.innerNIC.MTU)
	}
	h.each(func(w *worker) {
		w.slow.m.SetMTU(use)
		w.eng.SetMTU(use)
	})
	if use < mtu {
		h.log.Warn("the MTU of the interface was raised beyond what its sockets take: encrypted connections use smaller segments until the daemon is restarted", "mtu", mtu, "used", use)
		return
	}
	h.log.Info("the MTU of the interface was changed", "mtu", mtu)
}

// restored ends what may have been copied with this virtual machine: sessions,
// keys and nonces (T23).
func (h *Host) restored() {
	h.log.Warn("this virtual machine was cloned or restored: encrypted connections end, sessions are erased")
	h.CacheFlush(netip.Addr{})
	h.each(func(w *worker) {
		now := w.now()
		w.slow.carryOut(w.slow.m.AbortAll(ReasonRestored, now), now)
		w.eng.AbortAll(ReasonRestored, now)
	})
	// What ended meanwhile may have been put back.
	h.CacheFlush(netip.Addr{})
}

// each runs fn on the thread of every worker, one after the other.
func (h *Host) each(fn func(*worker)) {
	for _, w := range h.workers {
		w.call(fn)
	}
}

// destroy ends the local socket of a connection.
func (h *Host) destroy(k xdp.FlowKey) error {
	h.diagMu.Lock()
	defer h.diagMu.Unlock()
	return h.diag.Destroy(k)
}

func (h *Host) maxFlows() int { return cmp.Or(h.cfg.MaxFlows, MostFlows) }

// memory is what each of n workers may use.
func (h *Host) memory(n int) int {
	if h.cfg.Memory != 0 {
		return h.cfg.Memory / n
	}
	return max(defaultMemory/n, minMemory)
}

// beat tells the BPF programs that the daemon works, as long as the rounds of
// all workers go on. Without it they take it for hung, and divert no more SYNs.
func (h *Host) beat() {
	hung := false
	for i, w := range h.workers {
		n := w.pulse.Load()
		hung = hung || n == h.pulses[i] && !w.asleep.Load()
		h.pulses[i] = n
	}
	if hung {
		return
	}
	if err := h.diverter.Beat(); err != nil {
		h.log.Warn("heartbeat", "err", err)
	}
}

// Done is closed when the host has ended by itself, see Err. Close must still
// be called.
func (h *Host) Done() <-chan struct{} { return h.done }

// Err tells after Done why the host ended by itself, nil if it did not.
func (h *Host) Err() error { return h.err }

// Drain stops new offers and waits until all encrypted flows have ended or ctx
// is done; what is left is then aborted on both sides.
func (h *Host) Drain(ctx context.Context) {
	h.draining.Store(true)
	// Where encryption is required the alternative to an offer is not a plain
	// connection.
	if !h.cfg.requires() {
		if err := h.diverter.Enable(false); err != nil {
			h.log.Warn("new connections are still offered encryption", "err", err)
		}
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		live, half := h.counts()
		if live+half == 0 {
			break
		}
		select {
		case <-ctx.Done():
		case <-h.done:
		case <-tick.C:
			continue
		}
		break
	}
	h.each(func(w *worker) {
		now := w.now()
		w.slow.carryOut(w.slow.m.AbortAgreed(ReasonShutdown, now), now)
		w.eng.AbortAll(ReasonShutdown, now)
		w.transmit()
		w.slow.round(now)
	})
}

func (h *Host) counts() (live, half int) {
	h.each(func(w *worker) {
		n, _ := w.eng.Flows()
		live += n
		half += w.slow.m.Len()
	})
	return live, half
}

// Close stops everything and leaves nothing attached. Flows that still live
// are ended on this host: their sockets are destroyed.
func (h *Host) Close() error {
	h.closeOnce.Do(func() {
		h.Drain(expired())
		h.stopThreads()
		<-h.done
		for _, w := range h.workers {
			w.slow.finish()
		}
		h.closeErr = h.detach()
	})
	return h.closeErr
}

func expired() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func (h *Host) stopThreads() {
	for _, w := range h.workers {
		w.stop.Store(true)
		w.wake()
	}
	for _, w := range h.workers {
		<-w.done
	}
	h.pool.close()
	for _, w := range h.workers {
		_ = unix.Close(w.wakeFD)
	}
	if h.release != nil {
		h.release()
	}
}

func (h *Host) detach() error {
	if h.stopVM != nil {
		h.stopVM()
	}
	if h.stopLink != nil {
		h.stopLink()
	}
	stranded := h.stranded()
	if h.diag != nil {
		h.diag.Close()
	}
	var errs []error
	if h.diverter != nil {
		errs = append(errs, h.diverter.Close())
	}
	errs = append(errs, h.closePorts())
	for _, restore := range h.restoreQueues {
		errs = append(errs, restore())
	}
	if h.tap != nil {
		errs = append(errs, h.tap.Close())
	}
	if stranded > 0 {
		h.log.Warn("the guard stays: encrypted connections could not be ended on this host, and would send plaintext", "connections", stranded)
	}
	if h.cfg.KeepGuard || stranded > 0 {
		h.guard.Close()
	} else {
		errs = append(errs, h.guard.Remove())
	}
	for _, u := range h.umems {
		errs = append(errs, u.Close())
	}
	return errors.Join(errs...)
}

// stranded tries once more to end the sockets that could not be ended, and returns
// how many there are still. No worker runs any more.
func (h *Host) stranded() (n int) {
	sets := []map[packet.Key]bool{h.orphans}
	for _, w := range h.workers {
		if w.slow != nil {
			sets = append(sets, w.slow.orphans)
		}
	}
	for _, set := range sets {
		for k := range set {
			if h.destroy(k.Bytes()) != nil {
				n++
			}
		}
	}
	return n
}

// Status describes the daemon.
func (h *Host) Status() Status {
	guard, layers := h.guardState()
	st := Status{
		Interface: h.cfg.Interface, Driver: h.caps.Driver, MTU: int(h.mtu.Load()), Mode: h.mode.String(),
		Queues: slices.Clone(h.queues), Guard: guard, Layers: layers, Engine: crypto.EngineName(), PID: os.Getpid(), Uptime: time.Since(h.start).Seconds(),
		Draining: h.draining.Load(), Ended: h.ended, Poll: h.cfg.Poll.String(),
	}
	if h.gateway != nil {
		st.Inner, st.Bypass = h.cfg.Inner, "forward"
		if h.cfg.Block {
			st.Bypass = "block"
		}
	} else {
		st.Inner = h.tap.Name()
	}
	ports, inner := make(map[int]QueueStatus), make(map[int]QueueStatus) // their counters
	h.each(func(w *worker) {
		live, _ := w.eng.Flows()
		ws := WorkerStatus{
			Worker: w.id, CPU: w.cpu, Flows: live, HalfOpen: w.slow.m.Len(),
			HandedOver: w.st.handedOuter + w.st.handedInner, Received: w.st.handedIn,
		}
		for i := range w.ports {
			p := &w.ports[i]
			ws.Queues = append(ws.Queues, p.queue)
			q := QueueStatus{HandedOver: p.handed}
			if x, err := p.sock.Statistics(); err == nil {
				q.Received, q.Transmitted = x.Received, x.Transmitted
			}
			ports[p.queue] = q
		}
		for i := range w.inner {
			if x, err := w.inner[i].sock.Statistics(); err == nil {
				inner[w.inner[i].queue] = QueueStatus{Received: x.Received, Transmitted: x.Transmitted}
			}
		}
		st.Workers = append(st.Workers, ws)
		st.Flows += ws.Flows
		st.HalfOpen += ws.HalfOpen
	})
	for i := range st.Queues {
		q := &st.Queues[i]
		counted := ports[q.Queue]
		if q.Interface != h.cfg.Interface {
			counted = inner[q.Queue]
		}
		q.Received, q.Transmitted, q.HandedOver = counted.Received, counted.Transmitted, counted.HandedOver
	}
	return st
}

// Flows lists the flows that are being opened, the encrypted ones, and those
// that became plain or failed within the last minute.
func (h *Host) Flows() []FlowInfo {
	var fs []FlowInfo
	var others []FlowInfo
	for _, w := range h.workers {
		var left []*flow
		w.call(func(w *worker) { left = w.eng.all() })
		for len(left) > 0 {
			part := left[:min(len(left), flowsAtOnce)]
			left = left[len(part):]
			got := make([]FlowInfo, 0, len(part))
			w.call(func(w *worker) { got = w.eng.describe(got, part) })
			for i := range got {
				got[i].Worker = w.id
			}
			fs = append(fs, got...)
		}
		w.call(func(w *worker) { others = append(others, w.slow.describe(w.now())...) })
	}
	seen := make(map[[2]string]bool, len(fs))
	for i := range fs {
		seen[[2]string{fs[i].Local, fs[i].Remote}] = true
	}
	for _, f := range others {
		if !seen[[2]string{f.Local, f.Remote}] {
			fs = append(fs, f)
		}
	}
	return fs
}

// CacheList describes the cached sessions, oldest first.
func (h *Host) CacheList() []slowpath.CacheEntry {
	if h.cache == nil {
		return nil
	}
	return h.cache.List(time.Since(h.start))
}

// CacheFlush erases the cached sessions of a peer, or all of them when peer is
// the zero Addr, and returns how many there were.
func (h *Host) CacheFlush(peer netip.Addr) int {
	if h.cache == nil {
		return 0
	}
	return h.cache.Flush(peer)
}

// Rekey initiates rekeying (RFC 8548 section 3.8) on the encrypted flow between
// two endpoints, or on all flows when both are zero, and returns on how many: a
// flow that has a rekeying under way is left alone. It fails with ErrNoFlow.
func (h *Host) Rekey(local, remote netip.AddrPort) (n int, err error) {
	if local == remote {
		h.each(func(w *worker) { n += w.eng.Rekey(nil, w.now()) })
		return n, nil
	}
	f, err := h.Session(local, remote)
	if err != nil {
		return 0, err
	}
	k := packet.KeyOf(local, remote)
	k.VLAN = f.VLAN
	h.each(func(w *worker) { n += w.eng.Rekey(&k, w.now()) })
	return n, nil
}

// ErrNoFlow: there is no encrypted flow between the endpoints.
var ErrNoFlow = errors.New("no encrypted flow between these endpoints: flows lists those that there are, LOCAL is this host's")

// Session returns the live encrypted flow between two endpoints (ENO 5.1: an
// error when there is none).
func (h *Host) Session(local, remote netip.AddrPort) (FlowInfo, error) {
	k := packet.KeyOf(local, remote)
	f, err := FlowInfo{}, ErrNoFlow
	h.each(func(w *worker) {
		if found, ok := w.eng.Lookup(&k); ok {
			f, err = found, nil
			f.Worker = w.id
		}
	})
	return f, err
}

// Stats returns the counters of all parts.
func (h *Host) Stats() Stats {
	c := make(map[string]uint64)
	out := Stats{Counters: c, Reasons: make(map[string]uint64)}
	h.each(func(w *worker) {
		st := w.eng.Stats()
		st.add(c)
		w.st.add(c)
		for k, v := range w.slow.m.Counters() {
			c["slowpath_"+k] += v
		}
		c["slow_path_shed"] += w.slow.shed
		c["map_full"] += w.slow.mapFull
		c["stale_syns"] += w.slow.stale
		c["half_open_moved"] += w.slow.moved
		for k, v := range w.slow.reasons {
			out.Reasons[k] += v
		}
		c["umem_free_chunks"] += uint64(w.umem.Available())
		for _, ps := range [][]port{w.ports, w.inner} {
			for i := range ps {
				if x, err := ps[i].sock.Statistics(); err == nil {
					addRing(c, &x)
				}
			}
		}
	})
	c["diverted_flows"] = uint64(h.diverter.Flows())
	if d, err := h.diverter.Counters(); err == nil {
		for k, v := range d {
			c["bpf_"+k] = v
		}
	}
	if d, err := h.guard.Counters(); err == nil {
		maps.Copy(c, d)
	}
	return out
}

func addRing(c map[string]uint64, s *xdp.Statistics) {
	c["xsk_rx_dropped"] += s.RXDropped
	c["xsk_rx_ring_full"] += s.RXRingFull
	c["xsk_fill_ring_empty"] += s.FillRingEmpty
	c["xsk_tx_invalid"] += s.TXInvalid
	c["xsk_received"] += s.Received
	c["xsk_transmitted"] += s.Transmitted
	c["xsk_completed"] += s.Completed
	c["xsk_kicks"] += s.Kicks
	c["xsk_kick_stalls"] += s.KickStalls
}

func (s *EngineStats) add(c map[string]uint64) {
	for _, x := range []struct {
		name string
		v    uint64
	}{
		{"outer_packets", s.OuterIn}, {"inner_packets", s.InnerIn}, {"segments_out", s.SegmentsOut}, {"acks_out", s.AcksOut},
		{"retransmits", s.Retransmits}, {"inner_segments", s.InnerSegments}, {"inner_acks", s.InnerAcks}, {"inner_resends", s.InnerResends},
		{"frames_sealed", s.Sealed}, {"frames_opened", s.Opened}, {"bad_checksum", s.BadChecksum}, {"malformed", s.Malformed},
		{"paws", s.PAWS}, {"bad_seq", s.BadSeq}, {"bad_ack", s.BadAck}, {"beyond_window", s.BeyondWindow}, {"over_budget", s.OverBudget}, {"duplicates", s.Duplicates},
		{"out_of_order", s.OutOfOrder}, {"ooo_drops", s.OOODrops}, {"inner_gaps", s.InnerGaps}, {"inner_gap_drops", s.InnerGapDrops},
		{"no_chunk", s.NoChunk}, {"no_memory", s.NoMemory}, {"challenge_acks", s.Challenges}, {"resets_ignored", s.ResetsIgnored},
		{"in_place_out", s.InPlaceOut}, {"small_out", s.SmallOut}, {"copied_out", s.CopiedOut},
		{"in_place_in", s.InPlaceIn}, {"small_in", s.SmallIn}, {"copied_in", s.CopiedIn},
		{"icmp_in", s.ICMPIn}, {"icmp_dropped", s.ICMPDropped}, {"to_slow_path", s.ToSlow}, {"unknown_dropped", s.Unknown},
	} {
		c[x.name] += x.v
	}
}

func (s *workerStats) add(c map[string]uint64) {
	c["worker_rounds"] += s.rounds
	c["worker_sleeps"] += s.sleeps
	c["tx_ring_full"] += s.txFull
	c["tap_errors"] += s.tapErrors
	c["multi_buffer_packets"] += s.multiBuffer
	c["worker_stalls"] += s.stalls
	c["handed_over_outer"] += s.handedOuter
	c["handed_over_inner"] += s.handedInner
	c["handed_over_received"] += s.handedIn
	c["handed_over_dropped"] += s.handoverFull
}
