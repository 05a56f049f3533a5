package e2e

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// A SYN that offers encryption, with the addresses and ports of a plain connection
// that is there already: a late copy of its own, or made up by somebody who sees
// them. The connection goes on as if it had not come.
func TestSYNOnPlain(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	client, server := b.connected() // before there is a daemon
	z := b.daemon(b.path.B)
	f := b.newFlooder(netip.MustParseAddrPort(server.LocalAddr().String()))
	syn := f.frame(0)
	src := netip.MustParseAddrPort(client.LocalAddr().String())
	a4 := src.Addr().As4()
	ip := syn[packet.EthLen:]
	copy(ip[12:], a4[:])
	binary.BigEndian.PutUint16(syn[f.l4:], src.Port())
	packet.PutIPv4Checksum(ip[:packet.IPv4Len])
	packet.FullChecksum(syn, packet.EthLen, f.l4, false)
	for i := range 3 {
		if _, err := f.sock.Send(syn); err != nil {
			t.Fatal(err)
		}
		b.eventually("the daemon has the SYN", func() (string, bool) {
			return "", b.stats(z).Counters["bpf_xdp_syn_redirected"]+b.stats(z).Counters["bpf_xdp_flow_redirected"] > uint64(i)
		})
		before := b.resends(b.path.A.NS)
		if err := swap(client, server, make([]byte, 1<<20), make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		// A first segment may be lost until the socket has shown that it lives.
		if n := b.resends(b.path.A.NS) - before; n > 20 {
			t.Errorf("%d segments had to be sent again", n)
		}
	}
}
