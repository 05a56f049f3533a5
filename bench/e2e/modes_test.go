package e2e

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// What can be had is used and told; what cannot is an error, not something else.
func TestModes(t *testing.T) {
	for _, mode := range []string{"auto", "copy", "generic"} {
		t.Run(mode, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a, z := b.both("--mode", mode)
			want := mode
			if mode == "auto" {
				want = "copy" // a veth has no zero-copy
			}
			st, err := a.Status(b.ctx)
			if err != nil || st.Mode != want || len(st.Queues) != 1 || st.Queues[0].Mode != want || (st.Queues[0].Refused != "") != (mode == "auto") {
				t.Errorf("status %+v: %v", st, err)
			}
			if err := b.exchange(false, stream(1, 2<<20), stream(2, 2<<20), func() { b.flow(a); b.flow(z) }); err != nil {
				t.Fatal(err)
			}
			b.noFlows(a)
			b.encryptedOnly(a, z, 1)
			if err := errors.Join(a.Stop(), z.Stop()); err != nil {
				t.Error(err)
			}
			if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
				t.Errorf("still attached: %v %v", d, g)
			}
		})
	}
	t.Run("zerocopy", func(t *testing.T) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
		out, err := b.path.A.NS.Command(b.ctx, program, "run", "--interface", b.path.A.Name, "--mode", "zerocopy", "--control", b.path.A.NS.Lab().Dir()+"/zc.sock").CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || strings.Count(strings.TrimSpace(string(out)), "\n") != 0 {
			t.Errorf("zero-copy on a veth: %v\n%s", err, out)
		}
		if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
			t.Errorf("still attached: %v %v", d, g)
		}
	})
}

// A second daemon on the same interface is refused and does not disturb the first.
func TestSecondDaemon(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	if d, err := daemon.Start(ctx, program, b.path.A, nil); err == nil {
		_ = d.Kill()
		t.Error("a second daemon started on the same interface")
	}
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Fatal(err)
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 1)
}

// The plain connections that --require refuses do not come about, in either
// direction; encrypted ones do.
func TestRequire(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, "--require")
	if err := b.exchange(false, stream(1, 1000), stream(2, 1000), nil); err == nil {
		t.Error("a plain connection came about under --require")
	}
	back := bed{t: t, ctx: b.ctx, path: &lab.Path{A: b.path.B, B: b.path.A}}
	if err := back.exchange(false, stream(1, 1000), stream(2, 1000), nil); err == nil {
		t.Error("a plain connection from outside came about under --require")
	}
	z := b.daemon(b.path.B, "--require")
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Error(err)
	}
	if plain, _ := b.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext on the wire", plain)
	}
}
