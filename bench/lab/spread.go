package lab

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

const (
	skbQueueMapping = 12 // offset of __sk_buff.queue_mapping
	tcxNext         = -1
)

// AlternateQueues has packets that a packet socket or a forwarder sends through
// the interface, which has two transmit queues, change the queue with every
// 2^shift IPv4 packets of a flow (by their identification), so that a flow
// arrives at both receive queues of the other end. It lasts until the returned
// function is called.
func (i *Iface) AlternateQueues(shift uint) (stop func() error, err error) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "alternate", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadAbs(frame.EthLen+4, asm.Half),
			asm.RSh.Imm(asm.R0, int32(shift)),
			asm.And.Imm(asm.R0, 1),
			// What the kernel takes for the queue that a packet was received
			// on, plus one, is what it sends it from.
			asm.Add.Imm(asm.R0, 1),
			asm.StoreMem(asm.R6, skbQueueMapping, asm.R0, asm.Word),
			asm.Mov.Imm(asm.R0, tcxNext),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, privilege(fmt.Errorf("lab: load program for %s: %w", i.Name, err))
	}
	defer program.Close()
	var attached link.Link
	err = i.NS.Do(func() error {
		attached, err = link.AttachTCX(link.TCXOptions{Program: program, Interface: i.Index, Attach: ebpf.AttachTCXEgress})
		return err
	})
	if err != nil {
		return nil, i.wrap("alternate queues", err)
	}
	return attached.Close, nil
}
