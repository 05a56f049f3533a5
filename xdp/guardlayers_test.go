package xdp

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// spare makes a device in the current namespace that nothing comes through.
func spare(t *testing.T, name string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}); err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// sendsTo writes to a connection until it has arrived, or until a counter of
// the guard has moved.
func sendsTo(t *testing.T, from, to net.Conn, g *Guard, counter string) {
	t.Helper()
	if counter == "" {
		if err := exchange(from, to, 5000); err != nil {
			t.Errorf("open: %v", err)
		}
		return
	}
	before := guardCount(t, g, counter)
	if _, err := from.Write([]byte("plain")); err != nil {
		t.Fatal(err)
	}
	waitCount(t, g, counter, before)
	to.SetReadDeadline(time.Now().Add(time.Millisecond))
	if n, err := to.Read(make([]byte, 10)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: %d bytes, %v", counter, n, err)
	}
}

// Each of the inner layers alone keeps a listed connection shut that comes and
// goes by another interface than the guarded one, and no other.
func TestGuardInnerLayers(t *testing.T) {
	for _, layer := range []string{LayerNetfilter, LayerCgroup} {
		for _, v6 := range []bool{false, true} {
			t.Run(layer+map[bool]string{false: "/v4", true: "/v6"}[v6], func(t *testing.T) {
				l := newLab(t, 1, 1500)
				host, peer := hostAddr4, peerAddr4
				if v6 {
					host, peer = hostAddr6, peerAddr6
				}
				g, _, err := OpenGuard(guardOf(t, spare(t, "other0").Attrs().Index, 7))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { g.Remove() })
				if layer == LayerNetfilter {
					g.inner.detach(4)
				} else {
					slices.Reverse(g.inner.links)
					g.inner.detach(2)
				}
				ln := listen(l, peer, true)
				from := netip.AddrPortFrom(host, 45001)
				a, b := connect(l, from, ln, false)
				c, d := connect(l, netip.AddrPortFrom(host, 45002), ln, false)
				key := NewFlowKey(from, addrPort(ln.Addr()), 0)

				sendsTo(t, a, b, g, "")
				if err := g.Insert(key); err != nil {
					t.Fatal(err)
				}
				sendsTo(t, b, a, g, "guard_"+layer+"_in_flow_dropped")
				sendsTo(t, a, b, g, "guard_"+layer+"_out_flow_dropped")
				sendsTo(t, c, d, g, "")

				// Unlisted, it goes on where it was.
				if err := g.Delete(key); err != nil {
					t.Fatal(err)
				}
				for _, c := range []net.Conn{a, b} {
					got := make([]byte, 5)
					c.SetReadDeadline(time.Now().Add(testDeadline))
					if _, err := io.ReadFull(c, got); err != nil || string(got) != "plain" {
						t.Errorf("%q, %v", got, err)
					}
				}

				// A connection that is being opened has no socket yet.
				in := listen(l, host, false)
				half := NewFlowKey(addrPort(in.Addr()), netip.AddrPortFrom(peer, 45003), 0)
				if err := g.Insert(half); err != nil {
					t.Fatal(err)
				}
				before := guardCount(t, g, "guard_"+layer+"_in_flow_dropped")
				l.inPeer(func() error {
					d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(peer, 45003)), Timeout: 50 * time.Millisecond}
					if c, err := d.Dial("tcp", in.Addr().String()); err == nil {
						c.Close()
						t.Error("a listed connection was opened")
					}
					return nil
				})
				if guardCount(t, g, "guard_"+layer+"_in_flow_dropped") == before {
					t.Error("its SYN was not dropped by the layer")
				}
			})
		}
	}
}

// The programs at the cgroup meet the sockets of all network namespaces, and
// pass those of others, whatever is listed.
func TestGuardForeignNamespace(t *testing.T) {
	l := newLab(t, 1, 1500)
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer orig.Close()
	third, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	g, _, err := OpenGuard(guardOf(t, spare(t, "other0").Attrs().Index, 7))
	if err := errors.Join(err, netns.Set(orig)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(netns.Set(third), g.Remove(), netns.Set(orig)); err != nil {
			t.Error(err)
		}
	}()
	for _, v6 := range []bool{false, true} {
		host, peer := hostAddr4, peerAddr4
		if v6 {
			host, peer = hostAddr6, peerAddr6
		}
		ln := listen(l, peer, true)
		from := netip.AddrPortFrom(host, 45001)
		to := addrPort(ln.Addr())
		if err := errors.Join(g.Insert(NewFlowKey(from, to, 0)), g.Insert(NewFlowKey(to, from, 0))); err != nil {
			t.Fatal(err)
		}
		a, b := connect(l, from, ln, false)
		if err := exchange(a, b, 100_000); err != nil {
			t.Error(err)
		}
	}
	counters, err := g.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range counters {
		if n != 0 {
			t.Errorf("%s is %d", name, n)
		}
	}
}

// Several guards, of one network namespace and of several, do not clash, and
// each removes only what is its own.
func TestGuardsSideBySide(t *testing.T) {
	l := newLab(t, 1, 1500)
	one, err := guardsOpen(t, "one", "two")
	if err != nil {
		t.Fatal(err)
	}
	var other []*Guard
	l.inPeer(func() (err error) {
		other, err = guardsOpen(t, "three")
		return err
	})
	all := append(slices.Clone(one), other...)
	dirs := make(map[string]bool)
	for _, g := range all {
		if dirs[g.inner.pins] {
			t.Errorf("two guards have %s", g.inner.pins)
		}
		dirs[g.inner.pins] = true
	}
	for i, g := range all {
		if err := g.Remove(); err != nil {
			t.Fatal(err)
		}
		for j, g := range all {
			if _, err := os.Stat(g.inner.pins); (err != nil) != (j <= i) {
				t.Errorf("after %d were removed, %d: %v", i+1, j, err)
			}
		}
	}
	p, _ := testPlace()
	if left, _ := filepath.Glob(filepath.Join(p.pins, pinsDir, "*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func guardsOpen(t *testing.T, devices ...string) (gs []*Guard, err error) {
	for _, name := range devices {
		g, _, err := OpenGuard(guardOf(t, spare(t, name).Attrs().Index, 7))
		if err != nil {
			return nil, err
		}
		gs = append(gs, g)
	}
	return gs, nil
}

// The inner layers outlive the process, even the interface, until the next
// guard of the namespace takes over what they list, or a clean-up.
func TestGuardPinned(t *testing.T) {
	for _, how := range []string{"next", "cleanup"} {
		t.Run(how, func(t *testing.T) {
			l := newLab(t, 1, 1500)
			gone := spare(t, "gone0")
			g, _, err := OpenGuard(guardOf(t, gone.Attrs().Index, 7))
			if err != nil {
				t.Fatal(err)
			}
			for _, layer := range g.Layers() {
				if !layer.Active || !layer.Persistent || layer.Reason != "" {
					t.Errorf("%+v", layer)
				}
			}
			ln := listen(l, peerAddr4, true)
			from := netip.AddrPortFrom(hostAddr4, 45001)
			a, b := connect(l, from, ln, false)
			key := NewFlowKey(from, addrPort(ln.Addr()), 0)
			if err := g.Insert(key); err != nil {
				t.Fatal(err)
			}
			counters, err := g.collection.Maps["guard_counters"].Clone()
			if err != nil {
				t.Fatal(err)
			}
			defer counters.Close()
			g.Close()
			if err := netlink.LinkDel(gone); err != nil {
				t.Fatal(err)
			}
			count := func(name string) uint64 {
				c, err := readCounters(counters, guardCounters)
				if err != nil {
					t.Fatal(err)
				}
				return c[name]
			}
			for _, w := range []struct {
				from, to net.Conn
				counter  string
			}{{a, b, "guard_netfilter_out_flow_dropped"}, {b, a, "guard_netfilter_in_flow_dropped"}} {
				before := count(w.counter)
				if _, err := w.from.Write([]byte("plain")); err != nil {
					t.Fatal(err)
				}
				for deadline := time.Now().Add(testDeadline); count(w.counter) == before; time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("%s does not move", w.counter)
					}
				}
			}
			index := spare(t, "next0").Attrs().Index
			if how == "cleanup" {
				found, ended, err := RemoveGuard(index, guardOf(t, index, 7).Pins, DestroySocket)
				if !found || ended != 1 || err != nil {
					t.Errorf("found %v, ended %d: %v", found, ended, err)
				}
				if found, _, err := RemoveGuard(index, guardOf(t, index, 7).Pins, DestroySocket); found || err != nil {
					t.Errorf("again: found %v, %v", found, err)
				}
			} else {
				g, left, err := OpenGuard(guardOf(t, index, 7))
				if err != nil || len(left) != 1 || left[0] != key {
					t.Fatalf("leftovers %v, %v", left, err)
				}
				if err := errors.Join(DestroySocket(key), g.Delete(key), g.Remove()); err != nil {
					t.Fatal(err)
				}
			}
			a.SetReadDeadline(time.Now().Add(testDeadline))
			if _, err := a.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("read from an ended socket: %v", err)
			}
			p, _ := testPlace()
			if left, _ := filepath.Glob(filepath.Join(p.pins, pinsDir, "*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
			// The same ports again: nothing is listed any more.
			a.Close()
			b.Close()
			if c, d := connect(l, from, ln, false); exchange(c, d, 1000) != nil {
				t.Error("a new connection is shut")
			}
		})
	}
}

// What cannot be had is named, and is an error only where it must be had.
func TestGuardIncomplete(t *testing.T) {
	newLab(t, 1, 1500)
	index := spare(t, "other0").Attrs().Index
	cfg := guardOf(t, index, 7)
	cfg.Cgroup = t.TempDir()
	if _, _, err := OpenGuard(cfg); !errors.Is(err, ErrGuardIncomplete) {
		t.Errorf("a cgroup that is none: %v", err)
	}
	nothingAttached(t, index)
	cfg.Complete = false
	g, _, err := OpenGuard(cfg)
	if err != nil {
		t.Fatal(err)
	}
	layers := g.Layers()
	if len(layers) != 3 || !layers[0].Active || !layers[1].Active || layers[2].Active || layers[2].Name != LayerCgroup || layers[2].Reason == "" {
		t.Errorf("%+v", layers)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	cfg = guardOf(t, index, 7)
	cfg.Pins = t.TempDir()
	if _, _, err := OpenGuard(cfg); err == nil {
		t.Error("pins outside of a BPF file system")
	}
	nothingAttached(t, index)
	p, _ := testPlace()
	if left, _ := filepath.Glob(filepath.Join(p.pins, pinsDir, "*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The mark opens the interface's filter only: over loopback it does nothing.
func TestGuardMarkOverLoopback(t *testing.T) {
	l := newLab(t, 1, 1500)
	const mark = 0x1234567
	g, _, err := OpenGuard(guardOf(t, l.nic.Attrs().Index, mark))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Remove()
	ln := listen(l, peerAddr4, true)
	from, to := netip.AddrPortFrom(hostAddr4, 45001), addrPort(ln.Addr())
	a, _ := connect(l, from, ln, false)
	if err := g.Insert(NewFlowKey(from, to, 0)); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, m := range []int{0, mark} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, m); err != nil {
			t.Fatal(err)
		}
		before := guardCount(t, g, "guard_netfilter_in_flow_dropped")
		reset := segment{src: to, dst: from, flags: flagRST}
		if err := unix.Sendto(fd, reset.ip(6, reset.tcp()), 0, &unix.SockaddrInet4{Addr: from.Addr().As4()}); err != nil {
			t.Fatal(err)
		}
		if moved := guardCount(t, g, "guard_netfilter_in_flow_dropped") - before; moved != 1 {
			t.Errorf("mark %x: %d dropped", m, moved)
		}
	}
	a.Close()
}

// Devices that send through the guarded one are ways out, tunnels are not.
func TestExits(t *testing.T) {
	attrs := func(index, parent, master, netns int) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Index, a.ParentIndex, a.MasterIndex, a.NetNsID = index, parent, master, netns
		return a
	}
	links := []netlink.Link{
		&netlink.GenericLink{LinkAttrs: attrs(1, 0, 0, -1), LinkType: "loopback"},
		&netlink.Veth{LinkAttrs: attrs(2, 9, 7, 0)}, // the guarded one, its peer elsewhere
		&netlink.Vlan{LinkAttrs: attrs(3, 2, 0, -1)},
		&netlink.Macvlan{LinkAttrs: attrs(4, 3, 0, -1)},
		&netlink.Vxlan{LinkAttrs: attrs(5, 2, 0, -1)},
		&netlink.Veth{LinkAttrs: attrs(6, 2, 0, 1)}, // of another namespace's device 2
		&netlink.Bridge{LinkAttrs: attrs(7, 0, 0, -1)},
		&netlink.Vlan{LinkAttrs: attrs(8, 2, 0, 1)},
		&netlink.Vlan{LinkAttrs: attrs(10, 1, 0, -1)},
		&netlink.Vlan{LinkAttrs: attrs(11, 7, 0, -1)},
	}
	got := exits(links, 2)
	slices.Sort(got)
	if want := []uint32{2, 3, 4, 7, 11}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A device that is made later is a way out as soon as it is there.
func TestExitsFollow(t *testing.T) {
	l := newLab(t, 1, 1500)
	g, _, err := OpenGuard(guardOf(t, l.nic.Attrs().Index, 7))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Remove()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "mac0", l.nic.Attrs().Index
	if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		t.Fatal(err)
	}
	made, err := netlink.LinkByName("mac0")
	if err != nil {
		t.Fatal(err)
	}
	wait := func(present bool) {
		t.Helper()
		var value uint32
		for deadline := time.Now().Add(testDeadline); ; time.Sleep(time.Millisecond) {
			if err := g.collection.Maps["guard_exits"].Lookup(uint32(made.Attrs().Index), &value); (err == nil) == present {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("present is not %v", present)
			}
		}
	}
	wait(true)
	if err := netlink.LinkDel(made); err != nil {
		t.Fatal(err)
	}
	wait(false)
}

func TestCgroupMount(t *testing.T) {
	table := filepath.Join(t.TempDir(), "mountinfo")
	for _, tc := range []struct{ line, want string }{
		{"30 25 0:27 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw", "/sys/fs/cgroup"},
		{`30 25 0:27 / /a\040b rw - cgroup2 none rw`, "/a b"},
		{"30 25 0:27 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw", ""},
		{"30 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu", ""},
		{"", ""},
	} {
		if err := os.WriteFile(table, bytes.Join([][]byte{[]byte("1 0 8:1 / / rw - ext4 /dev/x rw"), []byte(tc.line)}, []byte("\n")), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := cgroupMount(table); got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%q: %q, %v", tc.line, got, err)
		}
	}
}
