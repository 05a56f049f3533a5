package e2e

import (
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/doctor"
)

type doctorReport struct {
	Status   doctor.Status
	Findings []doctor.Finding
	Fixed    []struct{ Command, Undo, Error string }
	Facts    doctor.Facts
}

// examine runs `tcpcrypt doctor --json` on a host and returns its exit code.
func (b *bed) examine(host *lab.Iface, args ...string) (r doctorReport, code int) {
	b.t.Helper()
	out, err := host.NS.Command(b.ctx, program, append([]string{"doctor", "--json"}, args...)...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		b.t.Fatal(err)
	}
	if len(out) > 0 {
		if err := json.Unmarshal(out, &r); err != nil {
			b.t.Fatalf("%v: %s", err, out)
		}
	}
	return r, code
}

// check returns the finding of a check.
func (r *doctorReport) check(name, subject string) doctor.Finding {
	i := slices.IndexFunc(r.Findings, func(f doctor.Finding) bool { return f.Check == name && f.Subject == subject })
	if i < 0 {
		return doctor.Finding{}
	}
	return r.Findings[i]
}

// The doctor says what a veth can do, no to the loopback interface, and what
// the daemon then finds is the same.
func TestDoctor(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	nic := b.path.A
	r, code := b.examine(nic, nic.Name)
	if code != 0 || r.Status != doctor.Warn {
		t.Errorf("exit code %d, %s: %+v", code, r.Status, r.Findings)
	}
	for name, want := range map[string]doctor.Status{
		"kernel": doctor.OK, "privileges": doctor.OK, "bpf": doctor.OK, "af-xdp": doctor.OK, "tun": doctor.OK,
	} {
		if f := r.check(name, "machine"); f.Status != want {
			t.Errorf("%+v", f)
		}
	}
	for name, want := range map[string]doctor.Status{
		"device": doctor.OK, "native-xdp": doctor.OK, "zero-copy": doctor.Warn, "tx-checksum": doctor.OK, "xdp-program": doctor.OK, "mtu": doctor.OK,
	} {
		if f := r.check(name, nic.Name); f.Status != want {
			t.Errorf("%+v", f)
		}
	}
	if d, g := attached(t, nic); len(d)+len(g) != 0 {
		t.Errorf("the doctor left %v %v", d, g)
	}

	if r, code = b.examine(nic, "lo"); code != 1 || r.check("device", "lo").Status != doctor.Fail || len(r.Facts.Interfaces) != 1 {
		t.Errorf("on lo: exit code %d, %+v", code, r)
	}
	if _, code = b.examine(nic, "nosuch0"); code != 2 {
		t.Errorf("an interface that does not exist: exit code %d", code)
	}
	r, code = b.examine(nic)
	if f := r.check("native-xdp", nic.Name); code != 0 || f.Status != doctor.OK || !strings.Contains(f.Found, "not tried") {
		t.Errorf("without a name: exit code %d, %+v", code, f)
	}

	if r, code = b.examine(nic, nic.Name, "--no-probe", "--fix"); code != 0 || len(r.Fixed) != 0 || r.Facts.Interfaces[0].Tried != nil {
		t.Errorf("with nothing to fix: exit code %d, %+v", code, r)
	}

	// With a daemon it touches nothing.
	a, z := b.both()
	r, code = b.examine(nic, nic.Name)
	if f := r.check("xdp-program", nic.Name); code != 0 || f.Status != doctor.OK || !strings.Contains(f.Found, "it runs") || r.Facts.Interfaces[0].Tried != nil {
		t.Errorf("with a daemon: exit code %d, %+v", code, r.Findings)
	}
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), func() { b.flow(a); b.flow(z) }); err != nil {
		t.Error(err)
	}
}
