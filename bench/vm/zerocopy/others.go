package main

import (
	"fmt"
	"strings"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

// others boots two guests with cards that have no zero-copy, and runs the program
// in the best mode that they have.
func (t *tester) others(boots *booter) error {
	wireA, wireB, err := vm.Wire()
	if err != nil {
		return err
	}
	defer wireA.Close()
	defer wireB.Close()
	a, err := boots.boot(1, 2, vm.NIC{Card: vm.E1000E, Wire: wireA})
	if err != nil {
		return err
	}
	defer a.end()
	b, err := boots.boot(2, 2, vm.NIC{Card: vm.VMXNet3, Wire: wireB})
	if err != nil {
		return err
	}
	defer b.end()
	for _, h := range []*host{a, b} {
		if err := h.hello(); err != nil {
			return err
		}
	}
	if err := t.repeat("best mode", func() error { return t.other("best mode", a, b) }, a, b); err != nil {
		return err
	}
	for _, h := range []*host{a, b} {
		if _, err := h.call(vm.Request{Op: "poweroff"}); err != nil {
			return err
		}
	}
	return nil
}

// other is one start of the daemons, traffic with link flaps of both cards, and
// their end. vmxnet3 does not run XDP programs any more when it was down, which the
// daemon has to notice.
func (t *tester) other(name string, a, b *host) error {
	mode := map[*host]string{a: "generic", b: "copy"}
	if err := both(a, b, func(h *host) error {
		h.connections = 8
		if err := h.configure(0, 0); err != nil {
			return err
		}
		resp, err := h.call(vm.Request{Op: "start", Args: append([]string{"--interface", h.iface, "--control", control}, sleepy...)})
		if err != nil {
			if resp != nil {
				err = fmt.Errorf("%w: %s", err, strings.TrimSpace(resp.Stderr))
			}
			return err
		}
		var st fastpath.Status
		if err := h.ask(&st, "status"); err != nil {
			return err
		}
		h.now = len(st.Workers)
		if st.Guard != "active" || st.Mode != mode[h] || len(st.Queues) != h.queues {
			return fmt.Errorf("guest %s: guard %s, mode %s, queues %+v", h.Name, st.Guard, st.Mode, st.Queues)
		}
		return h.waitCarrier(true)
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
	if err := both(a, b, func(h *host) error {
		_, err := h.encrypted() // vmxnet3, as it is emulated, receives on its first queue alone
		return err
	}); err != nil {
		return err
	}
	for _, flap := range []func(*host) error{(*host).unplug, (*host).downAndUp} {
		for _, h := range []*host{a, b} {
			if err := flap(h); err != nil {
				return err
			}
		}
		if err := x.round(repeatBytes, true); err != nil {
			return fmt.Errorf("after a link flap: %w", err)
		}
	}
	t.log("%s: %d connections, %d bytes are right, after link flaps of both cards", name, 2*a.connections, x.bytes)
	after, err := snapshots(a, b)
	if err != nil {
		return err
	}
	for i, h := range []*host{a, b} {
		r := h.row(runSpec{name: name}, before[i], after[i])
		r.bytes = x.bytes
		t.rows = append(t.rows, r)
	}
	if err := both(a, b, func(h *host) error {
		_, err := h.call(vm.Request{Op: "close"})
		return err
	}); err != nil {
		return err
	}
	return both(a, b, (*host).stopDaemon)
}
