package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// What a user gets wrong is told in one line that says what to do, with exit
// code 2, and leaves nothing attached.
func TestStartRefusals(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	nic := b.path.A
	refused := func(want string, args ...string) {
		t.Helper()
		out, err := nic.NS.Command(b.ctx, program, append([]string{"run", "--control", t.TempDir() + "/c.sock"}, args...)...).CombinedOutput()
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), want) {
			t.Errorf("%v: %v, want %q:\n%s", args, err, want, out)
		}
	}
	refused("there is no interface nosuch0", "--interface", "nosuch0")
	refused("there is no interface nosuch0", "--interface", nic.Name, "--inner-interface", "nosuch0")
	refused("lo is the loopback device", "--interface", "lo")
	refused("lo is the loopback device", "--interface", nic.Name, "--inner-interface", "lo")
	tunnel := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun9"}, Mode: netlink.TUNTAP_MODE_TUN}
	if err := nic.NS.Do(func() error { return netlink.LinkAdd(tunnel) }); err != nil {
		t.Fatal(err)
	}
	refused("tun9 has no Ethernet header", "--interface", "tun9")
	if err := nic.NS.Netlink().LinkDel(tunnel); err != nil {
		t.Fatal(err)
	}
	refused("guard-cgroup: /proc is not a directory of cgroup version 2", "--interface", nic.Name, "--guard-cgroup", "/proc")
	refused("queue 7: "+nic.Name+" has queues", "--interface", nic.Name, "--queues", "7")
	if d, g := attached(t, nic); len(d)+len(g) != 0 {
		t.Errorf("attached: %v %v", d, g)
	}
	a := b.daemon(nic)
	refused(": a tcpcrypt daemon runs on "+nic.Name+")", "--interface", nic.Name)
	if st, err := a.Status(b.ctx); err != nil || st.Interface != nic.Name {
		t.Errorf("the daemon that runs: %+v, %v", st, err)
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}
