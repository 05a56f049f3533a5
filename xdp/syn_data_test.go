package xdp

import (
	"net/netip"
	"testing"
)

// ENO-4.7-4, ENO-4.7-5: data of a SYN with ENO never reaches the stack, also
// where encryption is disabled by configuration.
func TestSYNDataOfExcludedPort(t *testing.T) {
	c := hostPrograms(t, 0)
	runVerdicts(t, c, "host_xdp", []verdictCase{
		{"SYN with ENO and data to an excluded port",
			segment{src: client4, dst: netip.AddrPortFrom(server4.Addr(), 81), flags: flagSYN, options: eno, payload: []byte("GET")}.frame(),
			verdictRedirect, "xdp_syn_redirected"},
	})
}
