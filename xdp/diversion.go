package xdp

import (
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Keys of the control map: enum control of bpf/divert.h.
const (
	controlEnabled = iota
	controlGeneric
	controlBeat
	controlShed
)

// diversion is what the eBPF programs of both modes are told: the maps of
// bpf/divert.h.
type diversion struct {
	collection *ebpf.Collection
	heartbeat  bool

	flows *flowMap
}

// Insert diverts the connection from now on. What of it arrives on a queue
// without socket is dropped. Any goroutine may call Insert and Delete.
func (d *diversion) Insert(key FlowKey) error { return d.flows.insert(key, 0) }

// Delete lets the connection take the kernel's path again. A connection that
// is not inserted is no error.
func (d *diversion) Delete(key FlowKey) error { return d.flows.delete(key) }

// SetPolicy selects the connections whose SYNs are diverted: those from this
// host that are not to be plain, and from the wire those of them that carry an
// ENO option or that the process is to refuse.
func (d *diversion) SetPolicy(p Policy) error { return p.write(d.collection.Maps["policy"]) }

// Enable says whether SYNs are diverted. Inserted connections are in any case.
func (d *diversion) Enable(on bool) error { return d.turn(controlEnabled, on) }

// Shed says whether SYNs from the wire pass to the stack although they offer
// encryption, because there are too many already. Those that the policy requires
// to be encrypted are then refused.
func (d *diversion) Shed(on bool) error { return d.turn(controlShed, on) }

// Flows returns how many connections are inserted. Any goroutine may call it.
func (d *diversion) Flows() int { return int(d.flows.n.Load()) }

// Beat tells the programs that the process works; with
// HostAttachConfig.Heartbeat it must be called several times in that time. Any
// goroutine may call it. It is a system call.
func (d *diversion) Beat() error {
	if !d.heartbeat {
		return nil
	}
	return d.beat()
}

func (d *diversion) beat() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("xdp: read clock: %w", err)
	}
	return d.control(controlBeat, uint64(now.Nano()))
}

// turn sets a control that is 0 or 1.
func (d *diversion) turn(key uint32, on bool) error {
	value := uint64(0)
	if on {
		value = 1
	}
	return d.control(key, value)
}

func (d *diversion) control(key uint32, value uint64) error {
	if err := d.collection.Maps["control"].Put(key, value); err != nil {
		return fmt.Errorf("xdp: write eBPF control map: %w", err)
	}
	return nil
}
