package main

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

// stack is what lies over a card, as on servers.
type stack struct {
	name   string
	layers []layer
	on     string // the device that the program runs on, if not the card
	bond   bool   // over both cards
}

type layer struct{ kind, name string }

var stacks = []stack{
	{name: "below a VLAN", layers: []layer{{"vlan", "vlan6"}}},
	{name: "on a VLAN", layers: []layer{{"vlan", "vlan5"}}, on: "vlan5"},
	{name: "on a bond", layers: []layer{{"bond", "bond0"}}, on: "bond0", bond: true},
	{name: "on a VLAN of a bond", layers: []layer{{"bond", "bond1"}, {"vlan", "vlan7"}}, on: "vlan7", bond: true},
}

// stacked boots two guests with two cables between them and runs the program below
// VLAN devices, in zero-copy mode, and on devices over the cards, by generic XDP.
func (t *tester) stacked(boots *booter) error {
	var hosts [2]*host
	var nics [2][]vm.NIC
	for range 2 {
		wireA, wireB, err := vm.Wire()
		if err != nil {
			return err
		}
		defer wireA.Close()
		defer wireB.Close()
		nics[0] = append(nics[0], vm.NIC{Card: vm.IGB, Wire: wireA})
		nics[1] = append(nics[1], vm.NIC{Card: vm.IGB, Wire: wireB})
	}
	for i := range hosts {
		var err error
		if hosts[i], err = boots.boot(i+1, 2, nics[i]...); err != nil {
			return err
		}
		defer hosts[i].end()
	}
	a, b := hosts[0], hosts[1]
	second := make(map[*host]string)
	for _, h := range hosts {
		if err := h.hello(); err != nil {
			return err
		}
		second[h], h.inner = h.inner, "" // it is no gateway
	}
	for _, s := range stacks {
		if err := t.repeat(s.name, func() error { return t.stack(s, a, b, second) }, a, b); err != nil {
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

// stack has the devices on both hosts, and traffic through them.
func (t *tester) stack(s stack, a, b *host, second map[*host]string) (err error) {
	cards := map[*host]string{a: a.iface, b: b.iface}
	strips := make(map[*host]bool)
	for _, h := range []*host{a, b} {
		at, err := h.call(vm.Request{Op: "attached", Interface: h.iface})
		if err != nil {
			return err
		}
		strips[h] = at.Strips
	}
	defer func() {
		unstack := both(a, b, func(h *host) error {
			h.iface = cards[h]
			_, err := h.call(vm.Request{Op: "unstack", Interface: s.layers[0].name})
			return err
		})
		if err == nil { // else the device may not be there
			err = unstack
		}
	}()
	if err := both(a, b, func(h *host) error {
		for i, l := range s.layers {
			args := []string{l.kind, l.name}
			if s.bond && i == 0 {
				args = append(args, second[h])
			}
			if _, err := h.call(vm.Request{Op: "stack", Interface: h.iface, Args: args}); err != nil {
				return err
			}
			h.iface = l.name
		}
		if err := h.configure(0, 0); err != nil {
			return err
		}
		h.iface, h.connections = cmp.Or(s.on, cards[h]), 8
		return h.startStacked(s)
	}); err != nil {
		return err
	}
	before, err := snapshots(a, b)
	if err != nil {
		return err
	}
	if err := both(a, b, func(h *host) error {
		_, err := h.call(vm.Request{Op: "listen", Address: ":" + port})
		return err
	}); err != nil {
		return err
	}
	x := &exchange{a: a, b: b}
	if err := x.round(firstBytes, false); err != nil {
		return err
	}
	if err := both(a, b, (*host).checkFlows); err != nil {
		return err
	}
	t.log("%s: %d connections, %d bytes are right", s.name, 2*a.connections, x.bytes)
	if s.bond {
		for _, up := range []bool{false, true} {
			for _, h := range []*host{a, b} {
				if err := h.SetCarrier(up); err != nil {
					return err
				}
				if _, err := h.call(vm.Request{Op: "carrier", Interface: cards[h], Up: up}); err != nil {
					return err
				}
			}
			if err := x.round(repeatBytes, true); err != nil {
				return fmt.Errorf("with the first card's cable %v: %w", up, err)
			}
		}
		t.log("%s: the connections outlived a change of the card", s.name)
	}
	after, err := snapshots(a, b)
	if err != nil {
		return err
	}
	for i, h := range []*host{a, b} {
		r := h.row(runSpec{name: s.name}, before[i], after[i])
		r.bytes = x.bytes
		t.rows = append(t.rows, r)
	}
	if err := both(a, b, func(h *host) error {
		_, err := h.call(vm.Request{Op: "close"})
		return err
	}); err != nil {
		return err
	}
	return both(a, b, func(h *host) error {
		resp, err := h.call(vm.Request{Op: "stop"})
		if err == nil && resp.Code != 0 {
			err = fmt.Errorf("guest %s: the daemon ended with %d:\n%s", h.Name, resp.Code, resp.Stderr)
		}
		if err != nil {
			return err
		}
		left, err := h.call(vm.Request{Op: "attached", Interface: h.iface})
		if err == nil && (left.XDP || len(left.Bound) > 0 || s.on == "" && left.Strips != strips[h]) {
			err = fmt.Errorf("guest %s: the daemon left XDP program %v, bound queues %v, tags taken off %v", h.Name, left.XDP, left.Bound, left.Strips)
		}
		return err
	})
}

// startStacked starts the daemon, which says what it cannot do, and does what it can.
func (h *host) startStacked(s stack) error {
	if s.on == "" {
		h.now = h.queues
		return h.startDaemon(sleepy)
	}
	flags := append([]string{"--interface", s.on, "--control", control}, sleepy...)
	resp, err := h.call(vm.Request{Op: "start", Args: append(flags, "--mode", "copy")})
	if err == nil {
		return fmt.Errorf("guest %s: the daemon runs on %s in native mode", h.Name, s.on)
	}
	if resp == nil {
		return err
	}
	if resp.Code != 2 || !strings.Contains(resp.Stderr, "mode generic works") {
		return fmt.Errorf("guest %s: exit code %d: %s", h.Name, resp.Code, resp.Stderr)
	}
	if resp, err = h.call(vm.Request{Op: "start", Args: flags}); err != nil {
		if resp != nil {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(resp.Stderr))
		}
		return err
	}
	var st fastpath.Status
	if err := h.ask(&st, "status"); err != nil {
		return err
	}
	queues := 1
	if s.on == s.layers[0].name && s.bond {
		queues = h.queues
	}
	if st.Guard != "active" || st.Mode != "generic" || len(st.Queues) != queues {
		return fmt.Errorf("guest %s: guard %s, mode %s, queues %+v, want %d", h.Name, st.Guard, st.Mode, st.Queues, queues)
	}
	h.now = len(st.Workers)
	return nil
}
