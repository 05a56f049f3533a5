package e2e

import (
	"io"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Who takes the qdisc off that the guard's filters are on, as some tools do when they
// tidy up, does not end encryption: the filters are put back.
func TestQdiscTakenAway(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, _ := b.both()
	client, server := b.connected()
	ns := b.path.A.NS
	dev, err := ns.Netlink().LinkByIndex(b.path.A.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Netlink().QdiscDel(&netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: dev.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := server.Write([]byte("still there")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, 11)); err != nil {
			t.Fatal(err)
		}
	}
	b.encryptsAgain(a, false)
	if st, err := a.Status(b.ctx); err != nil || st.Guard != "active" {
		t.Errorf("guard %q, %v", st.Guard, err)
	}
}
