package packet

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// icmpFrame is an error about the TCP segment that frame(v6, 0, nil, nil) is,
// as host src sent it; keep cuts the quoted packet.
func icmpFrame(v6 bool, vlan uint16, typ, code byte, rest uint32, keep int) []byte {
	quoted := frame(v6, 0, nil, nil)[EthLen:]
	f := frame(v6, vlan, nil, make([]byte, 8+keep-TCPLen))
	var x L3Info
	if err := ParseL3(f, &x); err != nil {
		panic(err)
	}
	if v6 {
		f[x.L3+6] = 58
	} else {
		f[x.L3+9] = 1
		PutIPv4Checksum(f[x.L3:x.L4])
	}
	m := f[x.L4:]
	m[0], m[1] = typ, code
	binary.BigEndian.PutUint32(m[4:], rest)
	copy(m[8:], quoted[:keep])
	ICMPChecksum(f, x.L3, x.L4, v6)
	return f
}

func TestParseICMP(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		ip, types, tooBig := IPv4Len, []byte{3, 11, 12}, [2]byte{3, 4}
		if v6 {
			ip, types, tooBig = IPv6Len, []byte{1, 2, 3, 4}, [2]byte{2, 0}
		}
		for _, vlan := range []uint16{0, 7} {
			var s Segment
			if err := Parse(frame(v6, vlan, nil, nil), FromInner, &s); err != nil {
				t.Fatal(err)
			}
			for typ := range 256 {
				f := icmpFrame(v6, vlan, byte(typ), 1, 0, ip+8)
				var e ICMPError
				err := ParseICMP(f, &e)
				if bytes.IndexByte(types, byte(typ)) < 0 {
					if err != ErrMalformed {
						t.Errorf("type %d: %v", typ, err)
					}
					continue
				}
				if err != nil || e.Key != s.Key || e.Seq != s.Seq || e.V6 != v6 || e.TooBig != (v6 && typ == 2) {
					t.Errorf("type %d: %v, %+v", typ, err, e)
				}
				if binary.BigEndian.Uint32(e.Frame[e.TCP+4:]) != s.Seq || len(e.Frame) != len(f) {
					t.Errorf("the quoted segment is not at %d", e.TCP)
				}
			}
			var e ICMPError
			if err := ParseICMP(icmpFrame(v6, vlan, tooBig[0], tooBig[1], 1300, ip+TCPLen), &e); err != nil || !e.TooBig || e.MTU != 1300 {
				t.Errorf("too big: %v, %+v", err, e)
			}
			bad := func(name string, want error, f []byte) {
				t.Helper()
				if err := ParseICMP(f, &e); err != want {
					t.Errorf("%s: %v, want %v", name, err, want)
				}
			}
			ok := icmpFrame(v6, vlan, types[0], 0, 0, ip+8)
			bad("TCP", ErrNotICMP, frame(v6, vlan, nil, nil))
			bad("empty", ErrNotICMP, nil)
			bad("cut", ErrNotICMP, ok[:len(ok)-1])
			bad("7 bytes of TCP", ErrMalformed, icmpFrame(v6, vlan, types[0], 0, 0, ip+7))
			sum := bytes.Clone(ok)
			sum[len(sum)-1] ^= 1
			bad("checksum", ErrMalformed, sum)
			udp := bytes.Clone(ok)
			var x L3Info
			if err := ParseL3(udp, &x); err != nil {
				t.Fatal(err)
			}
			if v6 {
				udp[x.L4+8+6] = 17
			} else {
				udp[x.L4+8+9] = 17
				long := bytes.Clone(ok)
				long[x.L4+8] = 0x4f
				ICMPChecksum(long, x.L3, x.L4, v6)
				bad("IP options that are not there", ErrMalformed, long)
			}
			ICMPChecksum(udp, x.L3, x.L4, v6)
			bad("UDP quoted", ErrMalformed, udp)
		}
	}
}

// FuzzParseICMP: any frame is refused or leads to offsets inside of it.
func FuzzParseICMP(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		f.Add(icmpFrame(v6, 0, 3, 4, 1400, 60))
		f.Add(icmpFrame(v6, 5, 2, 0, 1280, 60))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var e ICMPError
		if ParseICMP(b, &e) != nil {
			return
		}
		if e.L4 < e.L3+IPv4Len || e.TCP < e.L4+8+IPv4Len || e.TCP+8 > len(e.Frame) || len(e.Frame) > len(b) || e.MTU < 0 {
			t.Fatalf("%+v of %d bytes", e, len(b))
		}
	})
}
