package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/gopacket/gopacket/pcapgo"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// A capture shows what tcpdump does not: ciphertext on the wire side, the
// application's bytes on the inner one, both directions of both.
func TestCapture(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, _ := b.both()
	path := filepath.Join(t.TempDir(), "both.pcapng")
	cmd := b.path.A.NS.Command(b.ctx, program, "capture", "--write", path, "--side", "both", "--json", "--control", a.Control)
	var out bytes.Buffer
	cmd.Stdout = &out
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(log).ReadString('\n'); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	up, down := stream(1, 300000), stream(2, 200000)
	if err := b.exchange(false, up, down, func() { b.flow(a) }); err != nil {
		t.Fatal(err)
	}
	b.noFlows(a)
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	var sum struct{ Packets, Lost uint64 }
	if err := json.Unmarshal(out.Bytes(), &sum); err != nil {
		t.Fatalf("%v: %s", err, out.Bytes())
	}

	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v: %v", st.Mode(), err)
	}
	r, err := pcapgo.NewNgReader(f, pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	streams := make(map[[2]int][]byte) // by interface, and direction
	n := uint64(0)
	for {
		frame, ci, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
		var s packet.Segment
		if err := packet.Parse(frame, packet.FromInner, &s); err != nil {
			t.Fatalf("packet %d: %v", n, err)
		}
		dir := 0
		if s.Key.LocalAddr().Addr() == b.path.A.Addr4() {
			dir = 1
			if !s.ChecksumOK(false) {
				t.Errorf("packet %d: TCP checksum", n)
			}
		}
		k := [2]int{ci.InterfaceIndex, dir}
		streams[k] = append(streams[k], s.Payload()...)
	}
	if n != sum.Packets || sum.Lost != 0 {
		t.Errorf("%d packets in the file, summary %+v", n, sum)
	}
	for dir, want := range [][]byte{down, up} {
		if inner := streams[[2]int{1, dir}]; !bytes.Contains(inner, want[:1000]) || len(inner) < len(want) {
			t.Errorf("direction %d: %d bytes on the inner side, which lack the application's", dir, len(inner))
		}
		wire := streams[[2]int{0, dir}]
		if len(wire) <= len(want) {
			t.Errorf("direction %d: %d bytes on the wire", dir, len(wire))
		}
		if bytes.Contains(wire, want[:16]) || bytes.Contains(wire, want[len(want)-16:]) {
			t.Errorf("direction %d: plaintext on the wire side", dir)
		}
	}
}
