package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// gateway boots a guest with two cards as a gateway between a host without the
// daemon and one that has it.
func (t *tester) gateway(boots *booter) error {
	var wires [4]*os.File
	for i := 0; i < len(wires); i += 2 {
		near, far, err := vm.Wire()
		if err != nil {
			return err
		}
		defer near.Close()
		defer far.Close()
		wires[i], wires[i+1] = near, far
	}
	behind, err := boots.boot(3, 2, vm.NIC{Card: vm.Virtio, Wire: wires[0]})
	if err != nil {
		return err
	}
	defer behind.end()
	gw, err := boots.boot(4, 4, vm.NIC{Card: vm.IGB, Wire: wires[2]}, vm.NIC{Card: vm.IGB, Wire: wires[1]})
	if err != nil {
		return err
	}
	defer gw.end()
	peer, err := boots.boot(5, 2, vm.NIC{Card: vm.Virtio, Wire: wires[3]})
	if err != nil {
		return err
	}
	defer peer.end()
	hosts := []*host{behind, gw, peer}
	for _, h := range hosts {
		if err := h.hello(); err != nil {
			return err
		}
	}
	for _, queues := range []int{1, 2} {
		b := &bump{behind: behind, gw: gw, peer: peer, queues: queues}
		if err := t.repeat(b.name(), b.once, hosts...); err != nil {
			return err
		}
	}
	for _, h := range hosts {
		if _, err := h.call(vm.Request{Op: "poweroff"}); err != nil {
			return err
		}
	}
	return nil
}

// bump is a run of a gateway with so many queues on each of its cards.
type bump struct {
	behind, gw, peer *host
	queues           int
}

func (b *bump) name() string { return fmt.Sprintf("gateway, %d", b.queues) }

func (b *bump) once() error {
	t := b.gw.t
	log := func(format string, args ...any) { t.log(b.name()+": "+format, args...) }
	for _, h := range []*host{b.behind, b.peer} {
		h.now, h.connections = 1, max(8, perQueue*b.queues)
		if err := h.configure(0, 1500); err != nil {
			return err
		}
	}
	b.gw.now = b.queues
	for _, name := range []string{b.gw.iface, b.gw.inner} {
		if _, err := b.gw.call(vm.Request{Op: "net", Interface: name, Queues: b.queues, MTU: 1500}); err != nil {
			return err
		}
	}
	if err := both(b.gw, b.peer, func(h *host) error {
		if h == b.gw {
			return b.start()
		}
		return h.startDaemon(sleepy)
	}); err != nil {
		return err
	}
	log("the gateway and the peer's daemon are ready")
	if err := both(b.behind, b.peer, func(h *host) error {
		_, err := h.call(vm.Request{Op: "listen", Address: ":" + port})
		return err
	}); err != nil {
		return err
	}
	before, err := snapshots(b.gw)
	if err != nil {
		return err
	}
	x := &exchange{a: b.behind, b: b.peer}
	if err := x.round(repeatBytes, false); err != nil {
		return err
	}
	// Segments that open a resumed connection have an option more, and are not
	// what its frames were made for.
	var opening fastpath.Stats
	if err := b.gw.ask(&opening, "stats"); err != nil {
		return err
	}
	opened := x.bytes
	if err := x.round(firstBytes, true); err != nil {
		return err
	}
	log("%d connections, %d bytes are right", 2*b.peer.connections, x.bytes)
	after, err := snapshots(b.gw)
	if err != nil {
		return err
	}
	if err := errors.Join(b.peer.checkFlows(), b.sameSessions()); err != nil {
		return err
	}
	r := b.gw.row(runSpec{name: b.name()}, before[0], after[0])
	r.bytes = x.bytes
	r.segments, err = b.checkCopies(x.bytes-opened, opening.Counters)
	t.rows = append(t.rows, r)
	if err != nil {
		return err
	}
	if slices.Contains(r.packets, 0) {
		return fmt.Errorf("one of the gateway's queues carried nothing: %v", r.packets)
	}
	if err := b.hangUp(); err != nil {
		return err
	}
	return b.past(x, log)
}

// hangUp ends all connections in order.
func (b *bump) hangUp() error {
	return both(b.behind, b.peer, func(h *host) error {
		_, err := h.call(vm.Request{Op: "close"})
		return err
	})
}

// start starts the gateway and checks that it is what it was asked to be.
func (b *bump) start() error {
	g := b.gw
	var cpus []string
	for cpu := range b.queues {
		cpus = append(cpus, strconv.Itoa(cpu))
	}
	resp, err := g.call(vm.Request{Op: "start", Args: append([]string{
		"--interface", g.iface, "--inner-interface", g.inner, "--mode", "zerocopy", "--cpus", strings.Join(cpus, ","), "--control", control,
	}, sleepy...)})
	if err != nil {
		if resp != nil {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(resp.Stderr))
		}
		return err
	}
	sockets, err := g.call(vm.Request{Op: "sockets"})
	if err != nil {
		return err
	}
	var st fastpath.Status
	if err := g.ask(&st, "status"); err != nil {
		return err
	}
	want := 2 * b.queues // on both cards
	if st.Mode != "zerocopy" || st.Inner != g.inner || len(st.Queues) != want || len(sockets.Sockets) != want || len(st.Workers) != b.queues {
		return fmt.Errorf("guest %s: mode %s, queues %+v, sockets %+v", g.Name, st.Mode, st.Queues, sockets.Sockets)
	}
	if slices.ContainsFunc(sockets.Sockets, func(s vm.SocketInfo) bool { return !s.ZeroCopy }) {
		return fmt.Errorf("guest %s: XDP_OPTIONS tell of no zero-copy: %+v", g.Name, sockets.Sockets)
	}
	for _, name := range []string{g.iface, g.inner} {
		if _, err := g.call(vm.Request{Op: "carrier", Interface: name, Up: true}); err != nil {
			return err
		}
	}
	return nil
}

// sameSessions wants the gateway to have the connections that the peer has, with
// their session IDs.
func (b *bump) sameSessions() error {
	var ids [2][]string
	for i, h := range []*host{b.gw, b.peer} {
		var flows []fastpath.FlowInfo
		if err := h.ask(&flows, "flows"); err != nil {
			return err
		}
		for _, f := range flows {
			if f.State == slowpath.StateEncrypted {
				ids[i] = append(ids[i], f.SessionID)
			}
		}
		slices.Sort(ids[i])
	}
	if missing := 2*b.peer.connections - len(ids[0]); missing != 0 {
		return &notEncrypted{missing, fmt.Sprintf("the gateway encrypts %d of %d connections", len(ids[0]), 2*b.peer.connections)}
	}
	if !slices.Equal(ids[0], ids[1]) {
		return fmt.Errorf("session IDs of the gateway and of the peer: %v", ids)
	}
	return nil
}

// checkCopies wants the bytes since the given counters, half of which went in each
// direction, to have gone from card to card in the memory in which they came,
// except what is small, what is sent once more, and what came to another worker.
func (b *bump) checkCopies(bytes int64, since map[string]uint64) (string, error) {
	var stats fastpath.Stats
	if err := b.gw.ask(&stats, "stats"); err != nil {
		return "", err
	}
	c := stats.Counters
	for name := range c {
		c[name] -= since[name]
	}
	text := fmt.Sprintf("in %d, %d, %d; out %d, %d, %d", c["in_place_in"], c["small_in"], c["copied_in"], c["in_place_out"], c["small_out"], c["copied_out"])
	const whole = 1500
	least := uint64(bytes) / 2 / whole // segments in each direction
	elsewhere := c["handed_over_received"]
	switch {
	case c["in_place_in"]+elsewhere < least, c["in_place_out"]+elsewhere < least:
		return text, fmt.Errorf("of %d bytes too few went through the gateway without a copy: %s; handed over %d", bytes, text, elsewhere)
	case c["copied_in"] > c["inner_resends"]+elsewhere, c["copied_out"] > c["retransmits"]+elsewhere:
		return text, fmt.Errorf("segments were copied: %s; resent %d and %d, handed over %d", text, c["inner_resends"], c["retransmits"], elsewhere)
	case c["bad_checksum"] > 0, c["malformed"] > 0, c["xsk_tx_invalid"] > 0:
		return text, fmt.Errorf("the gateway met what it must not: %v", c)
	}
	return text, nil
}

// past ends the gateway, whose programs go on to forward, has plain connections
// pass, and removes the programs.
func (b *bump) past(x *exchange, log func(string, ...any)) error {
	resp, err := b.gw.call(vm.Request{Op: "stop"})
	if err != nil {
		return err
	}
	if resp.Code != 0 {
		return fmt.Errorf("guest %s: the gateway ended with %d:\n%s", b.gw.Name, resp.Code, resp.Stderr)
	}
	if err := x.round(repeatBytes, false); err != nil {
		return fmt.Errorf("past a gateway that has ended: %w", err)
	}
	if err := errors.Join(b.hangUp(), b.peer.stopDaemon(), b.gw.cleanUp()); err != nil {
		return err
	}
	log("plain connections passed the gateway that had ended")
	for _, name := range []string{b.gw.iface, b.gw.inner} {
		left, err := b.gw.call(vm.Request{Op: "attached", Interface: name})
		if err != nil {
			return err
		}
		if left.XDP || len(left.Bound) > 0 {
			return fmt.Errorf("guest %s: the gateway left XDP program %v and bound queues %v on %s", b.gw.Name, left.XDP, left.Bound, name)
		}
	}
	return nil
}
