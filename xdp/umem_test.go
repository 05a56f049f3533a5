package xdp

import (
	"net/netip"
	"testing"
)

func TestUmemPool(t *testing.T) {
	for _, size := range []int{2048, 4096} {
		for _, huge := range []bool{false, true} {
			u, err := NewUmem(UmemConfig{Chunks: 5, ChunkSize: size, HugePages: huge})
			if err != nil {
				t.Fatal(err)
			}
			seen := make(map[uint64]bool)
			for range 5 {
				addr, ok := u.Alloc()
				if !ok || addr%uint64(size) != 0 || seen[addr] {
					t.Fatalf("Alloc: %d, %v", addr, ok)
				}
				seen[addr] = true
				b := u.Bytes(addr+Headroom, 100)
				if len(b) != 100 || cap(b) != size-Headroom {
					t.Fatalf("Bytes: length %d, capacity %d", len(b), cap(b))
				}
				b[0], b[:cap(b)][cap(b)-1] = 1, 2
			}
			if _, ok := u.Alloc(); ok || u.Available() != 0 {
				t.Fatal("Alloc from an empty pool")
			}
			for addr := range seen {
				u.Free(addr + uint64(size) - 1)
			}
			if u.Available() != 5 || u.Chunks() != 5 || u.ChunkSize() != size {
				t.Fatal("chunks were lost")
			}
			if err := u.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestUmemConfigErrors(t *testing.T) {
	for _, cfg := range []UmemConfig{
		{}, {Chunks: 1}, {Chunks: 0, ChunkSize: 2048}, {Chunks: -1, ChunkSize: 2048},
		{Chunks: 1, ChunkSize: 3072}, {Chunks: 1, ChunkSize: 8192}, {Chunks: 1 << 40, ChunkSize: 2048},
	} {
		if u, err := NewUmem(cfg); err == nil {
			u.Close()
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

func TestUmemBytesBeyondChunk(t *testing.T) {
	u, err := NewUmem(UmemConfig{Chunks: 2, ChunkSize: 2048})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	defer func() {
		if recover() == nil {
			t.Error("a slice over two chunks was given")
		}
	}()
	u.Bytes(2000, 100)
}

func TestUmemAllocs(t *testing.T) {
	u, err := NewUmem(UmemConfig{Chunks: 2, ChunkSize: 2048})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if n := testing.AllocsPerRun(100, func() {
		addr, _ := u.Alloc()
		u.Bytes(addr, 10)[0]++
		u.Free(addr)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestMode(t *testing.T) {
	for _, m := range []Mode{ModeAuto, ModeZeroCopy, ModeCopy, ModeGeneric} {
		if got, err := ParseMode(m.String()); err != nil || got != m {
			t.Errorf("%v: %v, %v", m, got, err)
		}
	}
	for _, s := range []string{"", "Auto", "zero-copy"} {
		if _, err := ParseMode(s); err == nil {
			t.Errorf("mode %q was accepted", s)
		}
	}
	if s := Mode(9).String(); s != "Mode(9)" {
		t.Error(s)
	}
}

func TestVnetHdr(t *testing.T) {
	h := VnetHdr{Flags: VnetNeedsCsum, GSOType: VnetGSOTCPv6 | VnetGSOECN, HdrLen: 86, GSOSize: 1428, CsumStart: 54, CsumOffset: 16}
	b := make([]byte, VnetHdrLen)
	h.Put(b)
	want := [VnetHdrLen]byte{1, 0x84, 86, 0, 0x94, 5, 54, 0, 16, 0, 0, 0}
	if [VnetHdrLen]byte(b) != want {
		t.Errorf("% x, want % x", b, want)
	}
	if got := ParseVnetHdr(b); got != h {
		t.Errorf("%+v, want %+v", got, h)
	}
}

func TestFlowKey(t *testing.T) {
	for _, tc := range []struct {
		local, remote string
		vlan          uint16
	}{
		{"10.0.0.1:80", "192.168.3.4:65535", 0},
		{"[fd00::1]:443", "[2001:db8::2]:1", 4094},
	} {
		local, remote := netip.MustParseAddrPort(tc.local), netip.MustParseAddrPort(tc.remote)
		l, r, v := SplitFlowKey(NewFlowKey(local, remote, tc.vlan|0xe000))
		if l != local || r != remote || v != tc.vlan {
			t.Errorf("%v: %v %v %v", tc, l, r, v)
		}
	}
	if k := NewFlowKey(netip.MustParseAddrPort("1.2.3.4:5"), netip.MustParseAddrPort("[::ffff:1.2.3.4]:6"), 0); k[10] != 0xff || [4]byte(k[28:32]) != [4]byte{1, 2, 3, 4} {
		t.Errorf("% x", k)
	}
}
