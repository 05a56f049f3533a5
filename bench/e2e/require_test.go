package e2e

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// requireRule is the rule for what --require says of all connections.
const requireRule = "[[rule]]\naction = \"require\"\n"

// refused opens a connection from A to a listener on B. It must fail at once,
// by a reset and not after a retransmission, and without a byte of data on the
// wire.
func (b *bed) refused(what string, v6 bool) {
	b.t.Helper()
	ip, _ := b.addr(v6)
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write(canary)
			c.Close()
		}
	}()
	before, err := b.path.A.NS.TCPCounters()
	if err != nil {
		b.t.Fatal(err)
	}
	c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
	if err == nil {
		_, _ = c.Write(canary)
		c.Close()
		b.t.Errorf("%s: the connection was opened", what)
	} else if !errors.Is(err, unix.ECONNREFUSED) {
		b.t.Errorf("%s: connect: %v, want a refusal", what, err)
	}
	after, err := b.path.A.NS.TCPCounters()
	if err != nil {
		b.t.Fatal(err)
	}
	if n := after["TcpExt.TCPSynRetrans"] - before["TcpExt.TCPSynRetrans"]; n != 0 {
		b.t.Errorf("%s: %d SYNs were retransmitted before connect failed", what, n)
	}
	if n := b.wire.data(); n != 0 {
		b.t.Errorf("%s: %d bytes of data on the wire", what, n)
	}
}

// A host that requires encryption opens no connection to one that has none, nor
// lets it in: connect fails at once, and no data leaves.
func TestRequireWithoutPeer(t *testing.T) {
	for _, how := range []struct {
		name  string
		flags []string
	}{
		{"flag", []string{"--require"}},
		{"rule", config(t, requireRule)},
	} {
		t.Run(how.name, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			b.daemon(b.path.A, how.flags...)
			eachIP(t, func(t *testing.T, v6 bool) {
				b.refused("outwards", v6)
				b.turned().refused("inwards", v6)
			})
		})
	}
}

// Nor does it do so while its daemon is dead, until the next one encrypts again.
func TestRequireKilled(t *testing.T) {
	for _, how := range []struct {
		name  string
		flags []string
	}{
		{"flag", []string{"--require"}},
		{"rule", config(t, requireRule)},
	} {
		t.Run(how.name, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a := b.daemon(b.path.A, how.flags...)
			if err := a.Kill(); err != nil {
				t.Fatal(err)
			}
			eachIP(t, func(t *testing.T, v6 bool) {
				b.refused("outwards", v6)
				b.turned().refused("inwards", v6)
			})
			a, z := b.daemon(b.path.A, how.flags...), b.daemon(b.path.B)
			b.meet(a, z, b.echo())
			b.idle(a, z)
			b.encryptedOnly(a, z, 1)
		})
	}
}

// The first rule that matches decides, before the flags.
func TestRules(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	text := `
exclude-ports = "6040"
[[rule]]
local-ports = "6041"
action = "plain"
[[rule]]
remote-ports = "6041"
action = "plain"
[[rule]]
local-ports = "6040-6042"
action = "encrypt"
[[rule]]
remote-ports = "6040-6042"
action = "encrypt"
[[rule]]
remote = "` + b.path.A.IP6.Masked().String() + `"
action = "plain"
`
	a, z := b.both(config(t, text)...)
	for _, c := range []struct {
		name  string
		port  string
		v6    bool
		crypt bool
	}{
		{"a rule before the excluded ports", "6040", false, true},
		{"an earlier rule before a later one", "6041", false, false},
		{"a rule that matches", "6042", true, true},
		{"a rule by prefix", "6043", true, false},
		{"no rule", "6043", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			ip, _ := b.addr(c.v6)
			ln := b.echoServer(net.JoinHostPort(ip.String(), c.port))
			_, before := b.wire.seen()
			if c.crypt {
				b.meet(a, z, ln)
				b.idle(a, z)
				return
			}
			b.plainMeet(ln)
			if _, enos := b.wire.seen(); enos != before {
				t.Errorf("%d SYNs with ENO", enos-before)
			}
		})
	}
}
