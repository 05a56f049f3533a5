package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// A world and its connections can be made again from the numbers that a finding
// tells, and others are different.
func TestReproducible(t *testing.T) {
	seen := make(map[string]bool)
	for seed := range uint64(50) {
		for k := range 20 {
			of := func() string { w := newWorld(seed); return fmt.Sprint(w, newConnection(w, k)) }
			one, two := of(), of()
			if one != two {
				t.Fatalf("connection %d of world %d is made twice:\n%s\n%s", k, seed, one, two)
			}
			if seen[one] {
				t.Fatalf("connection %d of world %d is like another:\n%s", k, seed, one)
			}
			seen[one] = true
		}
	}
}

// Options are for sockets of their family, and for a time at which they can be set.
func TestChoose(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	met := make(map[string]bool)
	for range 5000 {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			for _, late := range []bool{false, true} {
				for _, c := range choose(rng, family, late) {
					met[c.name] = true
					if c.family != 0 && c.family != family || late && !c.late {
						t.Fatalf("%v for family %d, late %v", c, family, late)
					}
				}
			}
		}
	}
	for _, o := range options {
		if !met[o.name] {
			t.Errorf("%s is never chosen", o.name)
		}
	}
}

func TestWorse(t *testing.T) {
	bad := errors.New("bad")
	for _, c := range []struct {
		encrypted, plain outcome
		want             bool
	}{
		{outcome{time.Second, nil}, outcome{time.Millisecond, nil}, false},
		{outcome{4 * time.Second, nil}, outcome{2 * time.Second, nil}, false},
		{outcome{4 * time.Second, nil}, outcome{time.Second / 2, nil}, true},
		{outcome{time.Second, bad}, outcome{time.Second, nil}, true},
		{outcome{time.Second, bad}, outcome{time.Second, bad}, false},
	} {
		if got := worse(c.encrypted, c.plain); got != c.want {
			t.Errorf("with daemons %v, plain %v: %v", c.encrypted, c.plain, got)
		}
	}
}

// A wrong byte, one too many and one too few are found, wherever they are.
func TestReceiver(t *testing.T) {
	c := &connection{number: 7}
	c.ends[0].send = 5000
	c.ends[1].read = 700
	want := c.data(0)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for name, one := range map[string]struct {
		sent []byte
		err  error
	}{
		"right":     {want, nil},
		"wrong":     {slices.Concat(want[:3000], []byte{^want[3000]}, want[3001:]), errCorrupt},
		"too long":  {slices.Concat(want, []byte{0}), errCorrupt},
		"too short": {want[:len(want)-1], errTruncated},
		"nothing":   {nil, errTruncated},
	} {
		client, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = client.Write(one.sent)
			_ = client.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, client)
		}()
		if err := c.ends[1].receiver(server.(*net.TCPConn), want, rand.New(rand.NewPCG(1, 1))); !errors.Is(err, one.err) {
			t.Errorf("%s: %v, want %v", name, err, one.err)
		}
		client.Close()
		server.Close()
	}
}

// A few worlds, of the number that a test can take.
func TestTwins(t *testing.T) {
	if testing.Short() {
		t.Skip("the daemons are for tests that are not short")
	}
	l, err := lab.New()
	if errors.Is(err, lab.ErrPrivilege) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	binary, err := daemon.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	worlds := 0
	more := func() bool { worlds++; return worlds < 3 }
	if err := run(ctx, config{seed: 1, connections: 30, only: -1, binary: binary, more: more, log: t.Logf}); err != nil {
		t.Error(err)
	}
}
