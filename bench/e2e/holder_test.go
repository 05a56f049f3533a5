package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// A process may have so many files open that it cannot hold many connections, and
// not every machine lets root raise that. Holders are processes of this test
// binary that hold some each.
const (
	holderEnv = "TCPCRYPT_TEST_HOLDER" // listen ADDR, or dial ADDR N
	perHolder = 8000
)

// holder is the main function of such a process.
func holder(what string) error {
	words := strings.Fields(what)
	var mu sync.Mutex
	var conns []net.Conn
	switch words[0] {
	case "listen":
		ln, err := net.Listen("tcp", words[1])
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				conns = append(conns, c)
				mu.Unlock()
			}
		}()
		fmt.Println(ln.Addr())
	case "dial":
		n, err := strconv.Atoi(words[2])
		if err != nil {
			return err
		}
		var d net.Dialer
		d.SetMultipathTCP(false)
		var wg sync.WaitGroup
		var failed error
		for range 8 {
			wg.Go(func() {
				for {
					mu.Lock()
					done := len(conns) >= n || failed != nil
					if !done {
						conns = append(conns, nil)
					}
					i := len(conns) - 1
					mu.Unlock()
					if done {
						return
					}
					c, err := d.Dial("tcp", words[1])
					mu.Lock()
					if conns[i] = c; err != nil {
						failed = err
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if failed != nil {
			return failed
		}
		fmt.Println("open")
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "write": // all can be written to
			for _, c := range conns {
				if _, err := c.Write([]byte("x")); err != nil {
					return err
				}
			}
			fmt.Println("written")
		case "ended": // all end with an error
			for _, c := range conns {
				if _, err := io.ReadAll(c); err == nil {
					return fmt.Errorf("%v: end of file", c.LocalAddr())
				}
			}
			fmt.Println("ended")
		}
	}
	return nil
}

// holding is a holder as the test sees it.
type holding struct {
	in  io.WriteCloser
	out *bufio.Scanner
	cmd *lab.Cmd
}

// hold starts a holder in a namespace.
func (b *bed) hold(ctx context.Context, ns *lab.Namespace, format string, args ...any) *holding {
	b.t.Helper()
	h := &holding{cmd: ns.Command(ctx, os.Args[0])}
	h.cmd.Env = append(os.Environ(), holderEnv+"="+fmt.Sprintf(format, args...))
	h.cmd.Stderr = os.Stderr
	out, err := h.cmd.StdoutPipe()
	if err == nil {
		h.in, err = h.cmd.StdinPipe()
	}
	if err == nil {
		err = h.cmd.Start()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	h.out = bufio.NewScanner(out)
	b.t.Cleanup(func() { h.in.Close(); _ = h.cmd.Wait() })
	return h
}

// answer reads a line of a holder.
func (h *holding) answer(t *testing.T) string {
	t.Helper()
	if !h.out.Scan() {
		t.Fatalf("a process that holds connections ended: %v", h.cmd.Wait())
	}
	return h.out.Text()
}

// ask gives holders a command, and waits until all have carried it out.
func ask(t *testing.T, hs []*holding, what string) {
	t.Helper()
	for _, h := range hs {
		if _, err := fmt.Fprintln(h.in, what); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range hs {
		h.answer(t)
	}
}
