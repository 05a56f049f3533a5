package frame

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var (
	macA = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	macB = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

func segments() map[string]Segment {
	v4 := Segment{SrcMAC: macA, DstMAC: macB, Src: netip.MustParseAddrPort("10.0.0.1:1000"), Dst: netip.MustParseAddrPort("10.0.0.2:2000"),
		TOS: 0xb9, ID: 77, Seq: 0xfffffff0, Ack: 99, Flags: ACK | PSH | CWR | FIN, Window: 4321,
		Options: []byte{OptNOP, OptENO, 2}, Payload: []byte("some payload of odd length!")}
	v6 := v4
	v6.Src, v6.Dst = netip.MustParseAddrPort("[fd00::1]:1000"), netip.MustParseAddrPort("[fd00::2]:2000")
	tagged := v4
	tagged.VLAN = 5
	return map[string]Segment{"v4": v4, "v6": v6, "vlan": tagged}
}

// decode is an independent decoder, which verifies checksums.
func decode(t *testing.T, b []byte) gopacket.Packet {
	t.Helper()
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	if p.ErrorLayer() != nil {
		t.Fatal(p.ErrorLayer().Error())
	}
	if tl, ok := p.TransportLayer().(*layers.TCP); ok {
		_ = tl.SetNetworkLayerForChecksum(p.NetworkLayer())
	}
	if ic, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
		_ = ic.SetNetworkLayerForChecksum(p.NetworkLayer())
	}
	if err, mismatches := p.VerifyChecksums(); err != nil || len(mismatches) > 0 {
		t.Errorf("checksums: %v %v", err, mismatches)
	}
	return p
}

// TestAppend compares the bytes with what another decoder reads in them.
func TestAppend(t *testing.T) {
	for name, s := range segments() {
		t.Run(name, func(t *testing.T) {
			b := s.Append(nil)
			p := decode(t, b)
			tcp := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
			if tcp.Seq != s.Seq || tcp.Ack != s.Ack || tcp.Window != s.Window || !tcp.PSH || !tcp.CWR || tcp.SYN {
				t.Errorf("TCP header %+v", tcp)
			}
			if !bytes.Equal(tcp.Payload, s.Payload) {
				t.Errorf("payload %q", tcp.Payload)
			}
			x, ok := Parse(b)
			if !ok || !x.TCP || !x.ChecksumOK(b) {
				t.Fatalf("Parse %+v %v", x, ok)
			}
			if x.Src(b) != s.Src || x.Dst(b) != s.Dst || x.Seq(b) != s.Seq || x.Flags(b) != s.Flags {
				t.Errorf("parsed %v %v", x.Src(b), x.Dst(b))
			}
			if _, ok := FindOption(x.Options(b), OptENO); !ok {
				t.Error("option not found")
			}
			b[x.Data] ^= 1
			if x.ChecksumOK(b) {
				t.Error("a wrong checksum is accepted")
			}
		})
	}
}

func TestCutAndJoin(t *testing.T) {
	for name, s := range segments() {
		t.Run(name, func(t *testing.T) {
			b := s.Append(nil)
			x, _ := Parse(b)
			n := len(s.Payload)
			for at := 1; at < n; at++ {
				p, q := x.Cut(nil, b, 0, at, 0), x.Cut(nil, b, at, n, 1)
				xp, ok1 := Parse(p)
				xq, ok2 := Parse(q)
				if !ok1 || !ok2 || !xp.ChecksumOK(p) || !xq.ChecksumOK(q) {
					t.Fatalf("cut at %d: bad pieces", at)
				}
				if xq.Seq(q) != xp.Seq(p)+uint32(at) || xp.Flags(p) != ACK|CWR || xq.Flags(q) != ACK|PSH|FIN {
					t.Fatalf("cut at %d: sequence %d, flags %#x %#x", at, xq.Seq(q), xp.Flags(p), xq.Flags(q))
				}
				j := xp.Join(nil, p, &xq, q)
				xj, ok := Parse(j)
				if !ok || !xj.ChecksumOK(j) || xj.Seq(j) != s.Seq || xj.Flags(j) != s.Flags || !bytes.Equal(xj.Payload(j), s.Payload) {
					t.Fatalf("join at %d: %+v", at, xj)
				}
			}
		})
	}
}

func TestNeighbour(t *testing.T) {
	a4, b4 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	a6, b6 := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	for name, c := range map[string]struct {
		ask          []byte
		asker, asked netip.Addr
	}{
		"arp": {AppendARPRequest(nil, macA, a4, b4), a4, b4},
		"nd":  {AppendSolicitation(nil, macA, a6, b6), a6, b6},
	} {
		t.Run(name, func(t *testing.T) {
			decode(t, c.ask)
			got, answer := AnswerNeighbour(c.ask, macB, b4, b6)
			if got.Addr != c.asker || !bytes.Equal(got.MAC, macA) || answer == nil {
				t.Fatalf("learned %v, answer %x", got, answer)
			}
			decode(t, answer)
			got, again := AnswerNeighbour(answer, macA, a4, a6)
			if got.Addr != c.asked || !bytes.Equal(got.MAC, macB) || again != nil {
				t.Errorf("learned %v from the answer", got)
			}
			if _, answer := AnswerNeighbour(c.ask, macB, a4, a6); answer != nil {
				t.Error("answered for an address of somebody else")
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range segments() {
		f.Add(s.Append(nil))
	}
	f.Add(AppendSolicitation(nil, macA, netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")))
	f.Fuzz(func(t *testing.T, b []byte) {
		AnswerNeighbour(b, macA, netip.MustParseAddr("fd00::2"), netip.MustParseAddr("10.0.0.2"))
		x, ok := Parse(b)
		if !ok || !x.TCP {
			return
		}
		EachOption(x.Options(b), func(o Option) bool { return o.Len >= 2 })
		n := len(x.Payload(b))
		p := x.Cut(nil, b, n/2, n, 1)
		if y, ok := Parse(p); !ok || !y.TCP || !y.ChecksumOK(p) {
			t.Errorf("cut of %x is %x", b, p)
		}
	})
}
