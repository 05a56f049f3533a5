// Command demo shows the program at work: two hosts in network namespaces, a
// daemon in each, an ordinary HTTP download between them, what each side says
// about the flow, and what crosses the wire. It needs root, and leaves nothing
// behind.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

const (
	port     = 8080
	canary   = "the-known-plaintext-canary"
	deadline = 150 * time.Second
)

func main() {
	binary := flag.String("binary", "bin/tcpcrypt", "the `PROGRAM` to show")
	megabytes := flag.Int("mb", 128, "size of the download in `MIB`")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := run(ctx, *binary, int64(*megabytes)<<20); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// wire keeps the first payload bytes of the connection from A to B, and
// looks for the canary in everything that crosses.
type wire struct {
	mu    sync.Mutex
	head  []byte
	bytes int64
	found bool
}

func (w *wire) see(link lab.Link, dir lab.Dir, frame []byte) {
	if link != lab.LinkA {
		return // the same frame a second time
	}
	var s packet.Segment
	if packet.Parse(frame, packet.FromOuter, &s) != nil || s.Key.LPort != port && s.Key.RPort != port {
		return
	}
	p := s.Payload()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bytes += int64(len(p))
	if dir == lab.AtoB && len(w.head) < 192 {
		w.head = append(w.head, p[:min(len(p), 192-len(w.head))]...)
	}
	if bytes.Contains(p, []byte(canary)) {
		w.found = true
	}
}

func (w *wire) reset() {
	w.mu.Lock()
	w.head, w.bytes, w.found = nil, 0, false
	w.mu.Unlock()
}

func run(ctx context.Context, binary string, size int64) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	l, err := lab.New()
	if err != nil {
		return err
	}
	defer l.Close()
	path, err := l.Middle(lab.Options{Neighbours: true})
	if err != nil {
		return err
	}
	w := &wire{}
	if _, err = path.Forward(lab.ForwarderOptions{Seed: 1, Tap: w.see}); err != nil {
		return err
	}
	fmt.Printf("two hosts: %s (client, %s) and %s (server, %s)\n\n", path.A.NS.Name(), path.A.Addr4(), path.B.NS.Name(), path.B.Addr4())

	srv, sum, err := serve(path.B, size)
	if err != nil {
		return err
	}
	defer srv.Close()

	fmt.Println("== 1. without the daemons: plain TCP")
	if _, _, err = download(ctx, path, 1<<20, nil); err != nil {
		return fmt.Errorf("plain download: %w", err)
	}
	w.show()
	if !w.found {
		return errors.New("the canary was not seen in the plain request: the capture does not work")
	}

	fmt.Println("\n== 2. with a daemon on each host")
	show := func(line string) { fmt.Println("  " + line) }
	a, err := daemon.Start(ctx, binary, path.A, show)
	if err != nil {
		return err
	}
	b, err := daemon.Start(ctx, binary, path.B, show)
	if err != nil {
		return err
	}
	w.reset()
	var fa, fb fastpath.FlowInfo
	begin := time.Now()
	n, got, err := download(ctx, path, size, func() error {
		if fa, err = a.Flow(ctx); err != nil {
			return err
		}
		fb, err = b.Flow(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("encrypted download: %w", err)
	}
	took := time.Since(begin)
	fmt.Printf("downloaded %d MiB in %.1f s\n  SHA-256 of what the server sent  %x\n  SHA-256 of what the client got   %x\n", n>>20, took.Seconds(), sum(), got)
	if sum() != got {
		return errors.New("the two differ")
	}
	fmt.Printf("\nclient: tcpcrypt flows --json\n%s\nserver: tcpcrypt flows --json\n%s\n", pretty(fa), pretty(fb))
	if fa.SessionID == "" || fa.SessionID != fb.SessionID {
		return errors.New("the two sides do not have the same session ID")
	}
	fmt.Println("both sides have the same session ID.")
	fmt.Println("\nthe first bytes from the client on the wire:")
	w.show()
	if w.found {
		return errors.New("plaintext was seen on the wire")
	}
	fmt.Printf("the canary %q occurs nowhere in the %d bytes that crossed the wire.\n", canary, w.bytes)
	return errors.Join(a.Stop(), b.Stop())
}

func (w *wire) show() {
	w.mu.Lock()
	defer w.mu.Unlock()
	fmt.Print(hex.Dump(w.head))
}

// serve answers every GET with size random bytes (or as many as ?n= asks for)
// and remembers the hash of the last full answer.
func serve(host *lab.Iface, size int64) (*http.Server, func() [32]byte, error) {
	ln, err := host.NS.Listen("tcp", fmt.Sprintf("%s:%d", host.Addr4(), port))
	if err != nil {
		return nil, nil, err
	}
	block := make([]byte, 1<<20)
	if _, err := rand.Read(block); err != nil {
		return nil, nil, err
	}
	var mu sync.Mutex
	var sum [32]byte
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		want := size
		fmt.Sscan(r.URL.Query().Get("n"), &want)
		h := sha256.New()
		for left := want; left > 0; {
			p := block[:min(left, int64(len(block)))]
			h.Write(p)
			if left -= int64(len(p)); left == 0 {
				mu.Lock()
				h.Sum(sum[:0])
				mu.Unlock()
			}
			if _, err := rw.Write(p); err != nil {
				return
			}
		}
	})}
	go srv.Serve(ln)
	return srv, func() [32]byte { mu.Lock(); defer mu.Unlock(); return sum }, nil
}

// download gets n bytes over a fresh connection and calls during while the
// connection is still open.
func download(ctx context.Context, p *lab.Path, n int64, during func() error) (got int64, sum [32]byte, err error) {
	tr := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return p.A.NS.Dial(ctx, "tcp", addr)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("http://%s:%d/%s?n=%d", p.B.Addr4(), port, canary, n), nil)
	if err != nil {
		return 0, sum, err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return 0, sum, err
	}
	defer resp.Body.Close()
	h := sha256.New()
	got, err = io.Copy(h, resp.Body)
	if err == nil && got != n {
		err = fmt.Errorf("got %d bytes of %d", got, n)
	}
	if err == nil && during != nil {
		err = during()
	}
	h.Sum(sum[:0])
	return got, sum, err
}

func pretty(f fastpath.FlowInfo) string {
	b, err := json.MarshalIndent(f, "  ", "  ")
	if err != nil {
		return err.Error()
	}
	return "  " + string(b)
}
