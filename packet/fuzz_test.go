package packet

import (
	"bytes"
	"testing"
)

// FuzzParse: any frame is refused or leads to a consistent view of itself.
func FuzzParse(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		f.Add(frame(v6, 0, nil, []byte("payload")), true)
		f.Add(frame(v6, 5, tsOpts, nil), false)
		f.Add(frame(v6, 0, []byte{1, 1, 5, 10, 0, 0, 0, 9, 0, 0, 0, 12}, []byte("x")), true)
		f.Add(frame(v6, 0, []byte{2, 4, 5, 180, 69, 4, 1, 2}, nil), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, outer bool) {
		dir := FromInner
		if outer {
			dir = FromOuter
		}
		keep := bytes.Clone(b)
		var s Segment
		if err := Parse(b, dir, &s); err != nil {
			return
		}
		var x L3Info
		if err := ParseL3(b, &x); err != nil || x.L3 != s.L3 || x.L4 != s.L4 || x.End != len(s.Frame) || x.Proto != 6 || x.V6 != s.V6 || x.VLAN != s.Key.VLAN {
			t.Fatalf("ParseL3 %+v %v, Parse %+v", x, err, s)
		}
		if s.L4 < s.L3+IPv4Len || s.Data < s.L4+TCPLen || s.Data > len(s.Frame) || len(s.Frame) > len(b) || s.NSACK > 4 || len(s.Options()) > MaxOptions {
			t.Fatalf("offsets %d %d %d of %d", s.L3, s.L4, s.Data, len(s.Frame))
		}
		ok := s.ChecksumOK(false)
		if ok && !s.ChecksumOK(true) {
			t.Fatal("a right checksum is refused from a virtual device")
		}
		if !bytes.Equal(b, keep) {
			t.Fatal("parsing changed the frame")
		}
		// What is composed from it leads back to it.
		var tm Template
		tm.Learn(&s)
		h := Header{Seq: s.Seq, Ack: s.Ack, Flags: s.Flags, Wnd: s.Wnd, Urg: s.Urg, Opts: s.Options()}
		out := make([]byte, MaxHeaders+s.Len())
		n := tm.Compose(out, &h, s.Len())
		out = append(out[:n], s.Payload()...)
		FullChecksum(out, tm.L3(), tm.L4(), s.V6)
		var g Segment
		if err := Parse(out, dir, &g); err != nil {
			t.Fatalf("composed: %v", err)
		}
		if g.Key != s.Key || g.Seq != s.Seq || g.Ack != s.Ack || g.Flags != s.Flags || g.Wnd != s.Wnd || g.Urg != s.Urg || g.TOS != s.TOS ||
			!bytes.Equal(g.Options(), s.Options()) || !bytes.Equal(g.Payload(), s.Payload()) || !g.ChecksumOK(false) {
			t.Fatalf("composed %+v from %+v", g, s)
		}
		r := Rewrite(nil, &s, s.Options(), s.Payload())
		if err := Parse(r, dir, &g); err != nil || g.Key != s.Key || !bytes.Equal(g.Payload(), s.Payload()) {
			t.Fatalf("rewritten: %v %+v", err, g)
		}
	})
}
