package xdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// Verdict is what is to become of a new connection.
type Verdict uint32

// The verdicts, with the numbers of bpf/policy.h.
const (
	VerdictEncrypt Verdict = iota // the process gets its SYN
	VerdictRequire                // the same, and the guard refuses it without the process
	VerdictPlain                  // the kernel's alone
)

// MaxRules is how many rules a Policy may have.
const MaxRules = 64

// ErrTooManyRules: a Policy has more than MaxRules.
var ErrTooManyRules = fmt.Errorf("xdp: more than %d rules", MaxRules)

// Rule decides on the connections that match all of its conditions.
type Rule struct {
	Local, Remote           netip.Prefix // the zero Prefix matches every address
	LocalPorts, RemotePorts [2]uint16    // inclusive
	Verdict                 Verdict
}

// Policy decides on new connections: the first rule that matches, or else
// Require or Encrypt for those with the local or the remote port in Ports and
// neither in Exclude. No Ports means all. The ranges are inclusive.
type Policy struct {
	Rules          []Rule
	Ports, Exclude [][2]uint16
	Require        bool
}

// requires reports whether any connection may be one that must be encrypted.
func (p *Policy) requires() bool {
	return p.Require || slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Verdict == VerdictRequire })
}

// write puts the policy into a map of bpf/policy.h. While it runs, SYNs may be
// judged by a mixture of the old policy and the new one.
func (p *Policy) write(m *ebpf.Map) error {
	if len(p.Rules) > MaxRules {
		return ErrTooManyRules
	}
	v := bpf.HostPolicy{Rules: uint32(len(p.Rules))}
	if p.Require {
		v.Selected = uint32(VerdictRequire)
	}
	for i := range p.Rules {
		r, to := &p.Rules[i], &v.Rule[i]
		to.Local, to.LocalMask = words(r.Local)
		to.Remote, to.RemoteMask = words(r.Remote)
		to.Lport, to.Rport, to.Verdict = r.LocalPorts, r.RemotePorts, uint32(r.Verdict)
	}
	include := p.Ports
	if len(include) == 0 {
		include = [][2]uint16{{0, 65535}}
	}
	if err := errors.Join(setPorts(&v.Include, include), setPorts(&v.Exclude, p.Exclude)); err != nil {
		return err
	}
	if err := m.Put(uint32(0), &v); err != nil {
		return fmt.Errorf("xdp: write eBPF policy map: %w", err)
	}
	return nil
}

func setPorts(bits *[1024]uint64, ranges [][2]uint16) error {
	for _, r := range ranges {
		if r[0] > r[1] {
			return fmt.Errorf("xdp: port range %d-%d is empty", r[0], r[1])
		}
		for p := int(r[0]); p <= int(r[1]); p++ {
			bits[p/64] |= 1 << (p % 64)
		}
	}
	return nil
}

// words returns a prefix and its mask as a flow key has addresses: IPv4 in IPv6.
func words(p netip.Prefix) (address, mask [4]uint32) {
	if !p.IsValid() {
		return address, mask
	}
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	var m [16]byte
	for i := range bits {
		m[i/8] |= 0x80 >> (i % 8)
	}
	a := p.Masked().Addr().As16()
	for i := range address {
		address[i], mask[i] = binary.NativeEndian.Uint32(a[4*i:]), binary.NativeEndian.Uint32(m[4*i:])
	}
	return address, mask
}
