package e2e

import (
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// When connections are over, however they ended, no map lists them any more: a
// plain connection on their ports would be kept shut, and the maps would fill.
func TestMapsForget(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	for i := range 4 {
		client, server := b.connected()
		if err := swap(client, server, stream(1, 20000), stream(2, 20000)); err != nil {
			t.Fatal(err)
		}
		switch i {
		case 0, 1:
			client.Close()
		case 2:
			client, server = server, client
			fallthrough
		case 3:
			if err := client.(*net.TCPConn).SetLinger(0); err != nil {
				t.Fatal(err)
			}
			client.Close()
		}
		if _, err := io.ReadAll(server); (err == nil) != (i < 2) {
			t.Errorf("connection %d ended with %v", i, err)
		}
		server.Close()
	}
	b.noFlows(a)
	// A keeps what it closed first for a minute, as its kernel does.
	b.eventually("the maps are empty", func() (string, bool) {
		n := [...]int{b.entries(z, "flows"), b.entries(z, "pairs"), b.entries(z, "guard_flows"), b.entries(z, "guard_pairs")}
		return fmt.Sprint(n), n == [len(n)]int{}
	})
}
