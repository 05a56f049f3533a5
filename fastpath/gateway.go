package fastpath

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// Gateway mode (design section 3): a bump in the wire between two NICs. It is a
// Host whose local stack is that of whoever is behind the inner NIC. The two NICs
// share each worker's packet memory, so that a translated segment leaves in the
// chunk that it came in; there are no sockets to guard and to destroy, and the
// programs on the NICs keep what was encrypted shut when the daemon is gone.

// diverter is what takes connections to the daemon, and is told of them.
type diverter interface {
	Insert(key xdp.FlowKey) error
	// InsertSteered inserts a connection of the given worker.
	InsertSteered(key xdp.FlowKey, worker int) error
	Delete(key xdp.FlowKey) error
	Enable(on bool) error
	Shed(on bool) error
	Flows() int
	Beat() error
	Counters() (map[string]uint64, error)
	Close() error
}

// gatewayDiverter is the diverter of a gateway.
type gatewayDiverter struct {
	*xdp.Gateway
	log  *slog.Logger
	keep bool // at the end: the programs are the bypass, or were before
}

// InsertSteered inserts a connection: where its packets come out is for the NICs
// to decide.
func (d *gatewayDiverter) InsertSteered(key xdp.FlowKey, _ int) error { return d.Insert(key) }

// Close detaches the programs, or leaves them as the bypass. They stay, too, while
// there are connections that nothing else keeps shut.
func (d *gatewayDiverter) Close() error {
	if n := d.Flows(); n > 0 && !d.keep {
		d.log.Warn("the programs stay on the interfaces: they keep connections shut that an earlier gateway encrypted", "connections", n)
		d.keep = true
	}
	return d.Gateway.Close(d.keep)
}

// pathMTU returns the MTU of the path, as far as it is here.
func (h *Host) pathMTU() int {
	if h.cfg.Inner != "" {
		return min(h.caps.MTU, h.innerNIC.MTU)
	}
	return h.caps.MTU
}

// openGateway is openPorts for gateway mode.
func (h *Host) openGateway(want xdp.Mode, outer []int) (err error) {
	if h.cfg.Inner == h.cfg.Interface {
		return fmt.Errorf("%s cannot be both sides of a gateway", h.cfg.Inner)
	}
	if h.innerNIC, err = probe(h.cfg.Inner); err != nil {
		return err
	}
	if h.innerNIC.RXQueues > maxQueues {
		return fmt.Errorf("%s has %d queues, at most %d are supported: reduce them with ethtool -L", h.cfg.Inner, h.innerNIC.RXQueues, maxQueues)
	}
	inner := make([]int, h.innerNIC.RXQueues)
	for i := range inner {
		inner[i] = i
	}
	if len(inner) < len(h.place.cpus) {
		return fmt.Errorf("%s has %d receive queues, fewer than there are workers: --workers %d", h.cfg.Inner, len(inner), len(inner))
	}
	chunk := chunkSize(want, &h.caps, &h.innerNIC)
	if err := h.makeUmems(len(outer)+len(inner), chunk); err != nil {
		return err
	}
	bind := func(modes []xdp.Mode, refused string) error {
		mode, why, err := firstMode(modes, refused, func(m xdp.Mode) error {
			err := h.bindGateway(m, outer, inner, chunk)
			if err != nil {
				h.unbind()
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("bind %s and %s: %w", h.cfg.Interface, h.cfg.Inner, err)
		}
		h.mode, h.mtuLimit = mode, xdp.MaxTAPMTU
		for _, nic := range []*xdp.Capabilities{&h.caps, &h.innerNIC} {
			if !multiBuffer(nic, mode, chunk) {
				h.mtuLimit = min(h.mtuLimit, largestMTU(chunk, mode == xdp.ModeZeroCopy))
			}
		}
		h.mtu.Store(int64(h.caps.MTU))
		for i := range h.queues {
			h.queues[i].Refused = why
		}
		return nil
	}
	if want == xdp.ModeAuto {
		return bind([]xdp.Mode{xdp.ModeZeroCopy, xdp.ModeCopy, xdp.ModeGeneric}, "")
	}
	return bind([]xdp.Mode{want}, "")
}

// bindGateway attaches the programs and binds all queues of both NICs in one mode.
func (h *Host) bindGateway(m xdp.Mode, outer, inner []int, chunk int) error {
	g, left, err := xdp.AttachGateway(xdp.GatewayConfig{
		Ifindex: [2]int{xdp.Outer: h.caps.Ifindex, xdp.Inner: h.innerNIC.Ifindex}, Mode: m,
		Frags:  multiBuffer(&h.caps, m, chunk) || multiBuffer(&h.innerNIC, m, chunk),
		Policy: h.policy, Flows: h.maxFlows() + mapSlack, Heartbeat: beatStale, Forward: !h.cfg.Block, Shut: h.left,
	})
	// They stay shut over all attempts, also where one takes the programs off.
	if len(left) > 0 {
		h.left = left
	}
	if err != nil {
		return err
	}
	h.gateway, h.bypass = g, &gatewayDiverter{Gateway: g, log: h.log, keep: g.Replaced()}
	h.diverter = h.bypass
	h.ports, h.inner = make([][]port, len(h.umems)), make([][]port, len(h.umems))
	for side, nic := range []struct {
		*xdp.Capabilities
		queues []int
		ports  [][]port
	}{xdp.Outer: {&h.caps, outer, h.ports}, xdp.Inner: {&h.innerNIC, inner, h.inner}} {
		register := func(queue int, s *xdp.Socket) error { return g.RegisterSocket(xdp.Side(side), queue, s) }
		for w := range nic.ports {
			if nic.ports[w], err = h.bindWorker(nic.Capabilities, w, m, nic.queues, chunk, register); err != nil {
				return fmt.Errorf("%s: %w", nic.Interface, err)
			}
		}
		for i, q := range nic.queues {
			h.queues = append(h.queues, QueueStatus{Interface: nic.Interface, Queue: q, Worker: i % len(h.umems), Mode: m.String(), CPU: -1})
		}
	}
	if left, err = g.Adopt(); err != nil {
		return err
	}
	h.dead.add(left, h.diverter)
	if h.ended = len(left); h.ended > 0 {
		h.log.Info("connections whose encryption died with an earlier daemon are reset", "found", h.ended)
	}
	return nil
}

// CleanupGateway removes what a gateway's daemon left on its two interfaces, and
// reports whether there was anything.
func CleanupGateway(outer, inner string) (found bool, err error) {
	if err := xdp.CheckPrivileges(); err != nil {
		return false, err
	}
	return xdp.RemoveGateway([2]string{xdp.Outer: outer, xdp.Inner: inner})
}

// deadFlows are connections whose keys died with an earlier daemon. Neither end
// knows: whatever they send is answered by a reset, and once both ends were told,
// or the inner one begins anew, the connection is forgotten (T22).
type deadFlows struct {
	n  atomic.Int64 // of flows; nearly always 0
	mu sync.Mutex

	diverter diverter
	flows    map[packet.Key]*[2]bool // by direction: that end was told
}

func (d *deadFlows) add(keys []xdp.FlowKey, dv diverter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.diverter, d.flows = dv, make(map[packet.Key]*[2]bool, len(keys))
	for _, k := range keys {
		d.flows[packet.KeyFromBytes(k)] = new([2]bool)
	}
	d.n.Store(int64(len(d.flows)))
}

// reset answers a frame of a dead flow, and reports whether it was of one. It
// runs on a worker's thread.
func (d *deadFlows) reset(e *Engine, ev *Event, now time.Duration) bool {
	if d.n.Load() == 0 {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	told := d.flows[ev.Key]
	if told == nil {
		return false
	}
	if ev.Flags&(packet.SYN|packet.ACK) == packet.SYN {
		if ev.Dir == packet.FromOuter {
			// It may be forged: the inner end has to be told first.
			return !told[packet.FromInner]
		}
		d.forget(ev.Key)
		return false
	}
	var s packet.Segment
	if ev.Flags&packet.RST != 0 || packet.Parse(ev.Frame, ev.Dir, &s) != nil {
		return true
	}
	if f := slowpath.Reset(&s, ev.Dir); f != nil {
		if ev.Dir == packet.FromOuter {
			e.SendOuter(f, now)
		} else {
			e.SendInner(f, now)
		}
		told[ev.Dir] = true
	}
	if told[packet.FromOuter] && told[packet.FromInner] {
		d.forget(ev.Key)
	}
	return true
}

func (d *deadFlows) forget(k packet.Key) {
	delete(d.flows, k)
	d.n.Store(int64(len(d.flows)))
	// Should it fail, the connection stays shut.
	_ = d.diverter.Delete(k.Bytes())
}
