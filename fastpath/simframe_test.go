package fastpath

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

func addr16(v6 bool, host, flow int) (b [16]byte) {
	if v6 {
		b = [16]byte{0: 0xfd, 15: byte(host + 1), 14: byte(flow)}
	} else {
		b = [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 7, 14: byte(flow), 15: byte(host + 1)}
	}
	return b
}

// makeFrame builds a frame with zero payload for templates and scripted peers.
func makeFrame(src, dst [16]byte, v6 bool, vlan uint16, sp, dp uint16, tos uint8) []byte {
	f := make([]byte, 0, packet.MaxHeaders)
	f = append(f, 2, 0, 0, 0, 0, dst[15], 2, 0, 0, 0, 0, src[15])
	if vlan != 0 {
		f = append(f, 0x81, 0)
		f = binary.BigEndian.AppendUint16(f, vlan)
	}
	if v6 {
		f = append(f, 0x86, 0xdd, 0x60|tos>>4, tos<<4, 0x12, 0x34, 0, packet.TCPLen, 6, 61)
		f = append(f, src[:]...)
		f = append(f, dst[:]...)
	} else {
		f = append(f, 0x08, 0, 0x45, tos, 0, packet.IPv4Len+packet.TCPLen, 0x12, 0x34, 0x40, 0, 61, 6, 0, 0)
		f = append(f, src[12:]...)
		f = append(f, dst[12:]...)
		packet.PutIPv4Checksum(f[len(f)-packet.IPv4Len:])
	}
	f = binary.BigEndian.AppendUint16(f, sp)
	f = binary.BigEndian.AppendUint16(f, dp)
	f = append(f, 0, 0, 0, 0, 0, 0, 0, 0, 5<<4, packet.ACK, 0, 0, 0, 0, 0, 0)
	return f
}

func makeTemplate(src, dst [16]byte, v6 bool, vlan uint16, sp, dp uint16, tos uint8) (t packet.Template) {
	var s packet.Segment
	if err := packet.Parse(makeFrame(src, dst, v6, vlan, sp, dp, tos), packet.FromInner, &s); err != nil {
		panic(err)
	}
	t.Learn(&s)
	return t
}

// sessionPair makes the sessions of both roles over made-up Init messages.
func sessionPair(rng *rand.Rand, aead crypto.AEAD, n int) (init [2][]byte, sess func(role crypto.Role) *crypto.Session) {
	fill := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	init[0], init[1] = fill(n), fill(n+3)
	nonce, es := fill(32), fill(32)
	return init, func(role crypto.Role) *crypto.Session {
		return crypto.NewSession(role, aead, byte(crypto.TEPX25519), []byte("transcript"), init[0], init[1], nonce, es)
	}
}

// release makes the segment that ends the handshake of node k's stack.
func release(f *simFlow, k int) []byte {
	c := f.cfg
	local, remote := f.key[k].Local, f.key[k].Remote
	b := makeFrame(remote, local, c.v6, c.vlan, f.key[k].RPort, f.key[k].LPort, 0)
	t := b[len(b)-packet.TCPLen:]
	seq := c.iss[1-k]
	t[13] = packet.SYN | packet.ACK
	if c.active != k {
		seq++
		t[13] = packet.ACK
	}
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], c.iss[k]+1)
	return b
}

func segText(b []byte) string {
	var g packet.Segment
	if err := packet.Parse(b, packet.FromInner, &g); err != nil {
		return err.Error()
	}
	var fl strings.Builder
	for i, c := range "FSRPAUEC" {
		if g.Flags>>i&1 != 0 {
			fl.WriteRune(c)
		}
	}
	return fmt.Sprintf("%d>%d %s seq %d len %d ack %d wnd %d urg %d ts %d/%d sack %v tos %#x", g.Key.LPort, g.Key.RPort, fl.String(), g.Seq, g.Len(), g.Ack, g.Wnd, g.Urg, g.TSval, g.TSecr, g.SACK[:g.NSACK], g.TOS)
}
