package packet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
)

var (
	src4 = netip.MustParseAddr("10.1.2.3")
	dst4 = netip.MustParseAddr("192.168.77.1")
	src6 = netip.MustParseAddr("fd00::1:2")
	dst6 = netip.MustParseAddr("fd00:5::ffff")
)

// frame builds a TCP segment by hand, independently of Compose, with right
// checksums.
func frame(v6 bool, vlan uint16, opts, payload []byte) []byte {
	f := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	if vlan != 0 {
		f = append(f, 0x81, 0x00, byte(vlan>>8)|0xa0, byte(vlan))
	}
	n := TCPLen + len(opts) + len(payload)
	var ip []byte
	if v6 {
		f = append(f, 0x86, 0xdd)
		ip = []byte{0x6b, 0x91, 0x23, 0x45, byte(n >> 8), byte(n), 6, 60}
		s, d := src6.As16(), dst6.As16()
		ip = append(append(ip, s[:]...), d[:]...)
	} else {
		f = append(f, 0x08, 0x00)
		ip = []byte{0x45, 0xb9, byte((n + 20) >> 8), byte(n + 20), 0x43, 0x21, 0x40, 0, 60, 6, 0, 0}
		s, d := src4.As4(), dst4.As4()
		ip = append(append(ip, s[:]...), d[:]...)
		binary.BigEndian.PutUint16(ip[10:], ^naiveSum(ip))
	}
	f = append(f, ip...)
	t := []byte{0x12, 0x34, 0x01, 0xbb, 1, 2, 3, 4, 5, 6, 7, 8, byte(5+len(opts)/4) << 4, ACK | PSH, 0x20, 0x40, 0, 0, 0, 9}
	t = append(append(t, opts...), payload...)
	binary.BigEndian.PutUint16(t[16:], ^naiveSum(pseudo(v6, 6, len(t)), t))
	return append(f, t...)
}

// pseudo returns the pseudo-header of the frames that frame makes.
func pseudo(v6 bool, proto byte, n int) []byte {
	if v6 {
		s, d := src6.As16(), dst6.As16()
		return append(append(s[:], d[:]...), byte(n>>24), byte(n>>16), byte(n>>8), byte(n), 0, 0, 0, proto)
	}
	s, d := src4.As4(), dst4.As4()
	return append(append(s[:], d[:]...), 0, proto, byte(n>>8), byte(n))
}

// naiveSum is the checksum of RFC 1071 a word at a time, not complemented.
func naiveSum(parts ...[]byte) uint16 {
	var a uint32
	for _, b := range parts {
		for i, c := range b {
			if i&1 == 0 {
				a += uint32(c) << 8
			} else {
				a += uint32(c)
			}
			a = a>>16 + a&0xffff
		}
	}
	return uint16(a)
}

var tsOpts = []byte{1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4}

func TestParse(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, vlan := range []uint16{0, 7, 4094} {
			for _, opts := range [][]byte{nil, tsOpts, {1, 1, 5, 10, 0, 0, 0, 9, 0, 0, 0, 12}} {
				f := frame(v6, vlan, opts, []byte("payload"))
				padded := append(bytes.Clone(f), 0, 0, 0, 0)
				var s Segment
				if err := Parse(padded, FromOuter, &s); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(s.Frame, f) || string(s.Payload()) != "payload" || s.Len() != 7 || !bytes.Equal(s.Options(), opts) {
					t.Errorf("v6 %v vlan %d: frame of %d bytes, payload %q, options %x", v6, vlan, len(s.Frame), s.Payload(), s.Options())
				}
				if s.Seq != 0x01020304 || s.Ack != 0x05060708 || s.Flags != ACK|PSH || s.Wnd != 0x2040 || s.Urg != 9 || s.V6 != v6 || s.TOS != 0xb9 {
					t.Errorf("%+v", s)
				}
				if s.HasTS != (len(opts) == 12 && opts[2] == 8) || s.HasTS && (s.TSval != 0x102 || s.TSecr != 0x304) {
					t.Errorf("timestamps %v %d %d", s.HasTS, s.TSval, s.TSecr)
				}
				if len(opts) > 0 && opts[2] == 5 && (s.NSACK != 1 || s.SACK[0] != [2]uint32{9, 12}) {
					t.Errorf("SACK %v", s.SACK[:s.NSACK])
				}
				src, dst := src4, dst4
				if v6 {
					src, dst = src6, dst6
				}
				want := KeyOf(netip.AddrPortFrom(dst, 443), netip.AddrPortFrom(src, 0x1234))
				want.VLAN = vlan
				if s.Key != want {
					t.Errorf("key %v, want %v", s.Key, want)
				}
				if err := Parse(f, FromInner, &s); err != nil {
					t.Fatal(err)
				}
				want = KeyOf(netip.AddrPortFrom(src, 0x1234), netip.AddrPortFrom(dst, 443))
				want.VLAN = vlan
				if s.Key != want {
					t.Errorf("key from the inner side %v, want %v", s.Key, want)
				}
				if !bytes.Equal(s.Src(), src.AsSlice()) || !bytes.Equal(s.Dst(), dst.AsSlice()) {
					t.Errorf("addresses %x %x", s.Src(), s.Dst())
				}
				if !s.ChecksumOK(false) || !s.ChecksumOK(true) {
					t.Error("checksum refused")
				}
			}
		}
	}
}

func TestParseErrors(t *testing.T) {
	at := func(i int, v ...byte) func(f []byte) []byte {
		return func(f []byte) []byte { copy(f[i:], v); return f }
	}
	cut := func(n int) func(f []byte) []byte { return func(f []byte) []byte { return f[:len(f)-n] } }
	for _, c := range []struct {
		name string
		v6   bool
		opts []byte
		edit func(f []byte) []byte
		want error
	}{
		{"empty", false, nil, func([]byte) []byte { return nil }, ErrTruncated},
		{"Ethernet header cut", false, nil, func(f []byte) []byte { return f[:13] }, ErrTruncated},
		{"ARP", false, nil, at(12, 0x08, 0x06), ErrNotTCP},
		{"two VLAN tags", false, nil, func(f []byte) []byte {
			return append(append(bytes.Clone(f[:12]), 0x81, 0, 0, 1, 0x81, 0, 0, 2), f[12:]...)
		}, ErrNotTCP},
		{"VLAN tag cut", false, nil, func(f []byte) []byte { return append(bytes.Clone(f[:12]), 0x81, 0, 0) }, ErrTruncated},
		{"IPv4 header cut", false, nil, func(f []byte) []byte { return f[:14+19] }, ErrTruncated},
		{"IPv4 version", false, nil, at(14, 0x55), ErrMalformed},
		{"IPv4 header length", false, nil, at(14, 0x44), ErrMalformed},
		{"IPv4 total length below the header", false, nil, at(16, 0, 19), ErrMalformed},
		{"IPv4 total length beyond the frame", false, nil, cut(1), ErrTruncated},
		{"IPv4 first fragment", false, nil, at(20, 0x20, 0), ErrFragment},
		{"IPv4 later fragment", false, nil, at(20, 0, 5), ErrFragment},
		{"IPv4 UDP", false, nil, at(23, 17), ErrNotTCP},
		{"no room for TCP", false, nil, at(16, 0, 39), ErrTruncated},
		{"data offset too small", false, nil, at(14+20+12, 4<<4), ErrMalformed},
		{"data offset beyond the packet", false, nil, at(14+20+12, 15<<4), ErrMalformed},
		{"option without length", false, []byte{1, 1, 1, 8}, nil, nil},
		{"option of length 0", false, []byte{8, 0, 1, 1}, nil, nil},
		{"option of length 1", false, []byte{8, 1, 1, 1}, nil, nil},
		{"option beyond the header", false, []byte{8, 10, 0, 0}, nil, nil},
		{"end of options", false, []byte{0, 8, 0, 0}, nil, nil},
		{"unknown option", false, []byte{77, 4, 0, 0}, nil, nil},
		{"IPv6 header cut", true, nil, func(f []byte) []byte { return f[:14+39] }, ErrTruncated},
		{"IPv6 version", true, nil, at(14, 0x40), ErrMalformed},
		{"IPv6 payload beyond the frame", true, nil, cut(1), ErrTruncated},
		{"IPv6 fragment", true, nil, at(20, 44), ErrFragment},
		{"IPv6 hop-by-hop", true, nil, at(20, 0), ErrExtHeader},
		{"IPv6 routing", true, nil, at(20, 43), ErrExtHeader},
		{"IPv6 destination options", true, nil, at(20, 60), ErrExtHeader},
		{"IPv6 ICMP", true, nil, at(20, 58), ErrNotTCP},
		{"IPv6 no room for TCP", true, nil, at(18, 0, 19), ErrTruncated},
	} {
		f := frame(c.v6, 0, c.opts, []byte("12345678"))
		if c.edit != nil {
			f = c.edit(f)
		}
		var s Segment
		if err := Parse(f, FromOuter, &s); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// IPv4 options are skipped, not taken for TCP.
func TestIPv4Options(t *testing.T) {
	f := frame(false, 0, tsOpts, []byte("data"))
	g := append(bytes.Clone(f[:34]), 1, 1, 1, 0)
	g = append(g, f[34:]...)
	g[14] = 0x46
	binary.BigEndian.PutUint16(g[16:], binary.BigEndian.Uint16(g[16:])+4)
	PutIPv4Checksum(g[14:38])
	var s Segment
	if err := Parse(g, FromOuter, &s); err != nil || string(s.Payload()) != "data" || !s.HasTS || !s.ChecksumOK(false) {
		t.Fatalf("%v %q", err, s.Payload())
	}
	var tm Template
	tm.Learn(&s)
	out := make([]byte, MaxHeaders)
	out = out[:tm.Compose(out, &Header{}, 0)]
	if err := Parse(out, FromOuter, &s); err != nil || s.L4-s.L3 != IPv4Len {
		t.Errorf("composed with options: %v, %d bytes of IP header", err, s.L4-s.L3)
	}
}

func TestSACKOptions(t *testing.T) {
	block := func(n int) (o []byte) {
		o = []byte{1, 1, 5, byte(2 + 8*n)}
		for i := range n {
			o = binary.BigEndian.AppendUint32(o, uint32(10*i))
			o = binary.BigEndian.AppendUint32(o, uint32(10*i+5))
		}
		return o
	}
	for n := 1; n <= 4; n++ {
		var s Segment
		if err := Parse(frame(false, 0, block(n), nil), FromOuter, &s); err != nil || int(s.NSACK) != n || s.SACK[n-1] != [2]uint32{uint32(10*n - 10), uint32(10*n - 5)} {
			t.Errorf("%d blocks: %v, %v", n, err, s.SACK[:s.NSACK])
		}
	}
	// Two options, five blocks together: four are kept.
	o := append(block(2), block(2)...)
	var s Segment
	if err := Parse(frame(false, 0, o, nil), FromOuter, &s); err != nil || s.NSACK != 4 {
		t.Errorf("two options: %v, %d blocks", err, s.NSACK)
	}
	// A length that no SACK option has is not one.
	if err := Parse(frame(false, 0, []byte{5, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, nil), FromOuter, &s); err != nil || s.NSACK != 0 {
		t.Errorf("odd length: %v, %d blocks", err, s.NSACK)
	}
	f := frame(false, 0, block(1), nil)
	f[14+20+13] |= SYN
	if err := Parse(f, FromOuter, &s); err != nil || s.NSACK != 0 {
		t.Errorf("in a SYN: %v, %d blocks", err, s.NSACK)
	}
}

func TestWalkOptions(t *testing.T) {
	o := []byte{OptNOP, OptMSS, 4, 5, 180, OptSACKOK, 2, OptWScale, 3, 7, OptEnd, 99}
	var got []byte
	if err := WalkOptions(o, func(opt []byte) bool {
		got = append(got, opt[0], byte(len(opt)))
		if cap(opt) != len(opt) {
			t.Error("an option can be appended to in place")
		}
		return true
	}); err != nil || !bytes.Equal(got, []byte{OptMSS, 4, OptSACKOK, 2, OptWScale, 3}) {
		t.Errorf("%v %v", err, got)
	}
	n := 0
	if err := WalkOptions(o, func([]byte) bool { n++; return n < 2 }); err != nil || n != 2 {
		t.Errorf("stopped after %d: %v", n, err)
	}
	for _, bad := range [][]byte{{2}, {2, 1}, {2, 0}, {2, 4, 0}, {1, 1, 3}} {
		if err := WalkOptions(bad, func([]byte) bool { return true }); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestSum(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 70000)
	for i := range buf {
		buf[i] = byte(rng.Uint32())
	}
	for i := range 3000 {
		n := rng.IntN(300)
		if i < 200 {
			n = i
		} else if i > 2990 {
			n = 65000 + i
		}
		at := rng.IntN(len(buf) - n)
		b := buf[at : at+n]
		if i%3 == 0 {
			b = bytes.Repeat([]byte{0xff}, n)
		}
		want := naiveSum(b)
		got := Fold(Sum(b, 0))
		if w := got>>8 | got<<8; w != want && !(w == 0xffff && want == 0) && !(w == 0 && want == 0xffff) {
			t.Fatalf("sum of %d bytes %#x, want %#x", n, w, want)
		}
		// Chained over pieces of even length.
		k := 2 * rng.IntN(n/2+1)
		if c := Fold(Sum(b[k:], Sum(b[:k], 0))); c != got {
			t.Fatalf("chained sum %#x, want %#x", c, got)
		}
	}
	if Fold(^uint64(0)) != 0xffff {
		t.Errorf("fold of all ones %#x", Fold(^uint64(0)))
	}
}

func TestChecksums(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, n := range []int{0, 1, 2, 3, 63, 64, 65, 1440, 1441, 60001} {
			payload := bytes.Repeat([]byte{0xa5, 3, 0xff}, n)[:n]
			f := frame(v6, 9, tsOpts, payload)
			var s Segment
			if err := Parse(f, FromOuter, &s); err != nil {
				t.Fatal(err)
			}
			if !s.ChecksumOK(false) {
				t.Errorf("v6 %v, %d bytes: right checksum refused", v6, n)
			}
			want := binary.BigEndian.Uint16(f[s.L4+16:])
			FullChecksum(f, s.L3, s.L4, v6)
			if got := binary.BigEndian.Uint16(f[s.L4+16:]); got != want {
				t.Errorf("v6 %v, %d bytes: checksum %#x, want %#x", v6, n, got, want)
			}
			for _, i := range []int{s.L4, s.L4 + 4, s.L4 + 13, s.L3 + 12 + 4*b2i(v6), len(f) - 1} {
				f[i] ^= 0x10
				if s.ChecksumOK(true) {
					t.Errorf("v6 %v, %d bytes: flipped bit in byte %d accepted", v6, n, i)
				}
				f[i] ^= 0x10
			}
			full := bytes.Clone(f)
			HeadChecksum(f, s.L3, s.L4, v6, Sum(s.Payload(), 0))
			if !bytes.Equal(f, full) {
				t.Errorf("HeadChecksum %x, FullChecksum %x", f[s.L4+16:s.L4+18], full[s.L4+16:s.L4+18])
			}
			PartialChecksum(f, s.L3, s.L4, len(f)-s.L4, v6)
			if got, want := binary.BigEndian.Uint16(f[s.L4+16:]), naiveSum(pseudo(v6, 6, len(f)-s.L4)); got != want {
				t.Errorf("v6 %v, %d bytes: partial checksum %#x, want %#x", v6, n, got, want)
			}
			if !s.ChecksumOK(true) {
				t.Errorf("v6 %v, %d bytes: partial checksum refused", v6, n)
			}
			if s.ChecksumOK(false) {
				t.Errorf("v6 %v, %d bytes: partial checksum accepted from a wire", v6, n)
			}
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestICMPChecksum(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		f := frame(v6, 0, nil, []byte("an ICMP message"))
		l3, l4, proto := 14, 34, byte(1)
		if v6 {
			l4, proto = 54, 58
		}
		ICMPChecksum(f, l3, l4, v6)
		if !ICMPChecksumOK(f, l3, l4, v6) {
			t.Errorf("v6 %v: own checksum refused", v6)
		}
		m := bytes.Clone(f[l4:])
		got := binary.BigEndian.Uint16(m[2:])
		m[2], m[3] = 0, 0
		want := ^naiveSum(m)
		if v6 {
			want = ^naiveSum(pseudo(true, proto, len(m)), m)
		}
		if got != want {
			t.Errorf("v6 %v: %#x, want %#x", v6, got, want)
		}
		f[len(f)-1] ^= 1
		if ICMPChecksumOK(f, l3, l4, v6) {
			t.Errorf("v6 %v: flipped bit accepted", v6)
		}
	}
}

func TestCompose(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, vlan := range []uint16{0, 100} {
			f := frame(v6, vlan, tsOpts, []byte("x"))
			var s, g Segment
			if err := Parse(f, FromInner, &s); err != nil {
				t.Fatal(err)
			}
			var tm Template
			if tm.Set() {
				t.Error("the zero template is set")
			}
			tm.Learn(&s)
			if !tm.Set() || tm.V6() != v6 || tm.L3() != s.L3 || tm.L4() != s.L4 || tm.TOS() != 0xb9 {
				t.Errorf("template of %+v: %v %d %d %#x", s, tm.V6(), tm.L3(), tm.L4(), tm.TOS())
			}
			for _, opts := range [][]byte{nil, tsOpts, bytes.Repeat([]byte{1}, MaxOptions)} {
				h := Header{Seq: 0xfffffffe, Ack: 77, Flags: ACK | FIN | ECE, Wnd: 0xabcd, Urg: 3, Opts: opts}
				data := []byte("some payload")
				buf := make([]byte, MaxHeaders+len(data))
				n := tm.Compose(buf, &h, len(data))
				copy(buf[n:], data)
				buf = buf[:n+len(data)]
				FullChecksum(buf, tm.L3(), tm.L4(), v6)
				if err := Parse(buf, FromInner, &g); err != nil {
					t.Fatal(err)
				}
				if g.Seq != h.Seq || g.Ack != h.Ack || g.Flags != h.Flags || g.Wnd != h.Wnd || g.Urg != h.Urg || !bytes.Equal(g.Options(), opts) || !bytes.Equal(g.Payload(), data) {
					t.Errorf("composed %+v", g)
				}
				if g.Key != s.Key || g.TOS != s.TOS || len(g.Frame) != len(buf) || !g.ChecksumOK(false) {
					t.Errorf("composed key %v, TOS %#x", g.Key, g.TOS)
				}
				if !bytes.Equal(g.Frame[:12], f[:12]) || vlan != 0 && !bytes.Equal(g.Frame[12:16], f[12:16]) {
					t.Error("other Ethernet header")
				}
				if v6 {
					if !bytes.Equal(g.Frame[g.L3:g.L3+4], f[s.L3:s.L3+4]) || g.Frame[g.L3+7] != 60 {
						t.Error("other flow label or hop limit")
					}
				} else if naiveSum(g.Frame[g.L3:g.L4]) != 0xffff || g.Frame[g.L3+8] != 60 || g.Frame[g.L3+6] != 0x40 {
					t.Error("wrong IPv4 checksum, TTL or DF")
				}
			}
			for ecn := range uint8(4) {
				tm.SetECN(ecn)
				buf := make([]byte, MaxHeaders)
				Parse(buf[:tm.Compose(buf, &Header{}, 0)], FromInner, &g)
				if g.TOS != 0xb8|ecn {
					t.Errorf("v6 %v: TOS %#x after ECN %d", v6, g.TOS, ecn)
				}
			}
		}
	}
}

// Identifications of one template differ from packet to packet.
func TestIdentification(t *testing.T) {
	var s Segment
	if err := Parse(frame(false, 0, nil, nil), FromInner, &s); err != nil {
		t.Fatal(err)
	}
	var tm Template
	tm.Learn(&s)
	last := uint16(0x4321)
	for range 3 {
		buf := make([]byte, MaxHeaders)
		tm.Compose(buf, &Header{}, 0)
		if id := binary.BigEndian.Uint16(buf[18:]); id != last+1 {
			t.Fatalf("identification %#x after %#x", id, last)
		}
		last++
	}
}

func TestRewrite(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		f := frame(v6, 5, tsOpts, []byte("old payload"))
		var s, g Segment
		if err := Parse(f, FromOuter, &s); err != nil {
			t.Fatal(err)
		}
		keep := bytes.Clone(f)
		for _, opts := range [][]byte{nil, {1, 1, 1, 1}, bytes.Repeat([]byte{1}, 40)} {
			out := Rewrite([]byte("before"), &s, opts, []byte("new"))
			if string(out[:6]) != "before" {
				t.Fatal("dst was not appended to")
			}
			out = out[6:]
			if err := Parse(out, FromOuter, &g); err != nil {
				t.Fatal(err)
			}
			FullChecksum(out, g.L3, g.L4, v6)
			if string(g.Payload()) != "new" || !bytes.Equal(g.Options(), opts) || g.Seq != s.Seq || g.Flags != s.Flags || g.Key != s.Key || !g.ChecksumOK(false) {
				t.Errorf("rewritten %+v", g)
			}
			if !v6 && naiveSum(g.Frame[g.L3:g.L4]) != 0xffff {
				t.Error("IPv4 checksum")
			}
		}
		if !bytes.Equal(f, keep) {
			t.Error("the original was changed")
		}
	}
}

func TestKey(t *testing.T) {
	a, b := netip.MustParseAddrPort("10.0.0.1:443"), netip.MustParseAddrPort("10.0.0.2:50000")
	k := KeyOf(a, b)
	k.VLAN = 12
	if k.LocalAddr() != a || k.RemoteAddr() != b {
		t.Errorf("%v %v", k.LocalAddr(), k.RemoteAddr())
	}
	if k.String() != "10.0.0.1:443-10.0.0.2:50000 vlan 12" {
		t.Errorf("%s", k)
	}
	if KeyFromBytes(k.Bytes()) != k {
		t.Error("bytes do not lead back")
	}
	raw := k.Bytes()
	if !bytes.Equal(raw[12:16], []byte{10, 0, 0, 1}) || raw[10] != 0xff || !bytes.Equal(raw[32:36], []byte{1, 0xbb, 0xc3, 0x50}) || raw[38]|raw[39] != 0 {
		t.Errorf("layout %x", raw)
	}
	k.VLAN = 0
	if k.String() != "10.0.0.1:443-10.0.0.2:50000" {
		t.Errorf("%s", k)
	}
	k6 := KeyOf(netip.MustParseAddrPort("[fd00::1]:1"), netip.MustParseAddrPort("[fd00::2]:2"))
	if k6.String() != "[fd00::1]:1-[fd00::2]:2" {
		t.Errorf("%s", k6)
	}
	if FromOuter.String() != "outer" || FromInner.String() != "inner" {
		t.Error("directions")
	}
}

// Every field of a key counts for its hash, in all low bits that tables use.
func TestKeyHash(t *testing.T) {
	base := KeyOf(netip.MustParseAddrPort("10.0.0.1:443"), netip.MustParseAddrPort("10.0.0.2:50000"))
	seen := map[uint64]bool{base.Hash(): true}
	raw := base.Bytes()
	for bit := range 38 * 8 {
		r := raw
		r[bit/8] ^= 1 << (bit % 8)
		k := KeyFromBytes(r)
		if seen[k.Hash()] {
			t.Errorf("bit %d does not count", bit)
		}
		seen[k.Hash()] = true
	}
	var buckets [256]int
	for i := range 65536 {
		k := base
		k.RPort = uint16(i)
		buckets[k.Hash()&255]++
	}
	for i, n := range buckets {
		if n < 128 || n > 512 {
			t.Errorf("bucket %d has %d of 65536 ports", i, n)
		}
	}
}

func TestSeqDiff(t *testing.T) {
	for _, c := range []struct {
		a, b uint32
		want int32
	}{{5, 3, 2}, {3, 5, -2}, {0, 0xffffffff, 1}, {0xffffffff, 0, -1}, {1 << 31, 0, -1 << 31}} {
		if got := SeqDiff(c.a, c.b); got != c.want {
			t.Errorf("%#x-%#x: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	f := frame(true, 3, []byte{1, 1, 5, 10, 0, 0, 0, 9, 0, 0, 0, 12}, make([]byte, 1400))
	var s Segment
	var tm Template
	buf := make([]byte, 2048)
	if n := testing.AllocsPerRun(100, func() {
		if Parse(f, FromOuter, &s) != nil || !s.ChecksumOK(true) {
			t.Fatal("refused")
		}
		tm.Learn(&s)
		h := Header{Seq: 1, Opts: tsOpts}
		n := tm.Compose(buf, &h, 100)
		FullChecksum(buf[:n+100], tm.L3(), tm.L4(), true)
	}); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}

func BenchmarkParse(b *testing.B) {
	f := frame(false, 0, tsOpts, make([]byte, 1448))
	var s Segment
	b.ReportAllocs()
	for b.Loop() {
		Parse(f, FromOuter, &s)
	}
}

func BenchmarkSum(b *testing.B) {
	p := make([]byte, 1480)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		Sum(p, 0)
	}
}
