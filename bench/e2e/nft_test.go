package e2e

import (
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// netfilter is a table of nftables rules in a namespace. Its chains are gone
// with the namespace.
type netfilter struct {
	t     *testing.T
	conn  *nftables.Conn
	table *nftables.Table
}

func newNetfilter(t *testing.T, ns *lab.Namespace, family nftables.TableFamily) *netfilter {
	t.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(ns.FD()))
	if err != nil {
		t.Fatal(err)
	}
	return &netfilter{t, c, c.AddTable(&nftables.Table{Name: "test", Family: family})}
}

func (n *netfilter) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
	return n.conn.AddChain(&nftables.Chain{Name: name, Table: n.table, Type: typ, Hooknum: hook, Priority: prio, Policy: &policy})
}

// rule adds a rule: matches one after the other, then a counter and what to do.
func (n *netfilter) rule(c *nftables.Chain, parts ...[]expr.Any) *nftables.Rule {
	var es []expr.Any
	for _, p := range parts {
		es = append(es, p...)
	}
	return n.conn.AddRule(&nftables.Rule{Table: n.table, Chain: c, Exprs: es})
}

// apply gives what was added to the kernel.
func (n *netfilter) apply() {
	n.t.Helper()
	if err := n.conn.Flush(); err != nil {
		n.t.Fatal(err)
	}
}

// counts returns the packet counters of the chain's rules, in order; -1 for a
// rule without.
func (n *netfilter) counts(c *nftables.Chain) (counts []int) {
	n.t.Helper()
	rules, err := n.conn.GetRules(n.table, c)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, r := range rules {
		count := -1
		for _, e := range r.Exprs {
			if k, ok := e.(*expr.Counter); ok {
				count = int(k.Packets)
			}
		}
		counts = append(counts, count)
	}
	return counts
}

// Parts of rules.

func equals(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}
}

func protocol(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equals([]byte{p})}
}

func outOf(name string) []expr.Any {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, equals(b)}
}

func into(name string) []expr.Any {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equals(b)}
}

// transport matches bytes behind the IP header.
func transport(at int, data []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: uint32(at), Len: uint32(len(data))},
		equals(data),
	}
}

func toPort(p uint16) []expr.Any {
	return append(protocol(unix.IPPROTO_TCP), transport(2, binaryutil.BigEndian.PutUint16(p))...)
}

// tracked matches states of connection tracking, CtStateBit constants ORed.
func tracked(state uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(state), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func accepted() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}
}

func dropped() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}
