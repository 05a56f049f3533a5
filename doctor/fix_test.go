package doctor

import (
	"os"
	"runtime"
	"testing"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// inNamespace moves the test's goroutine into a network namespace of its own.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a network namespace")
	}
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		if netns.Set(orig) == nil { // else the thread ends with the goroutine
			runtime.UnlockOSThread()
		}
		orig.Close()
	})
}

// A feature is switched on a real device, and back by the opposite change.
func TestFeature(t *testing.T) {
	inNamespace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "nic0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "wire0"}); err != nil {
		t.Fatal(err)
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		t.Fatal(err)
	}
	defer tool.Close()
	const name = "rx-vlan-hw-parse"
	for _, want := range []bool{false, true} {
		if err := feature("nic0", name, !want, want).apply(System); err != nil {
			t.Fatal(err)
		}
		if on, err := tool.Features("nic0"); err != nil || on[name] != want {
			t.Errorf("%s is %v, want %v: %v", name, on[name], want, err)
		}
	}
	if err := feature("nosuch0", name, true, false).apply(System); err == nil {
		t.Error("a feature of a device that does not exist was changed")
	}
}

// Facts of real interfaces: a veth that was tried, and one that is down.
func TestGather(t *testing.T) {
	inNamespace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.NumRxQueues, attrs.NumTxQueues = "nic0", 2, 2
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "wire0"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	f, err := Gather(Options{Interface: "nic0", Try: true})
	if err != nil || len(f.Interfaces) != 1 || f.Interfaces[0].NotTried != "it is down" || f.Interfaces[0].Up {
		t.Errorf("down: %+v, %v", f.Interfaces, err)
	}
	if f, err := Gather(Options{}); err != nil || len(f.Interfaces) != 0 {
		t.Errorf("without a name, all down: %+v, %v", f.Interfaces, err)
	}
	peer, err := netlink.LinkByName("wire0")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []netlink.Link{veth, peer} {
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	f, err = Gather(Options{Interface: "nic0", Try: true})
	if err != nil || len(f.Interfaces) != 1 {
		t.Fatalf("%+v, %v", f, err)
	}
	i := f.Interfaces[0]
	if i.Driver != "veth" || !i.Up || !i.Virtual || !i.NativeXDP || i.Channels.RX != 2 || i.XDP != "" || i.Tried == nil ||
		i.Tried.Native != "" || len(i.Tried.Queues) != 2 || i.Tried.Queues[1].Mode != "copy" || i.Tried.Queues[1].ZeroCopy == "" {
		t.Errorf("%+v, tried %+v", i, i.Tried)
	}
	if f, err := Gather(Options{}); err != nil || len(f.Interfaces) != 2 || f.Interfaces[0].Tried != nil {
		t.Errorf("without a name: %+v, %v", f.Interfaces, err)
	}
	if _, err := Gather(Options{Interface: "nosuch0"}); err == nil {
		t.Error("gathered from an interface that does not exist")
	}
}
