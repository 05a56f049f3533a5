package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// option is a socket option that applications set. Those that fill a socket's error
// queue are left out: they make reads of Go programs fail.
type option struct {
	name       string
	level, opt int
	values     []int
	texts      []string // instead of values
	family     int      // AF_INET or AF_INET6; 0: both
	late       bool     // also while the connection is in use
}

// Not in package unix.
const (
	soTxRehash    = 74
	soReserveMem  = 73
	tcpTxDelay    = 37
	tcpRTOMaxMS   = 44
	tcpRTOMinUS   = 45
	tcpDelackMax  = 46
	maxOptionsSet = 4
)

var options = []option{
	{name: "IP_TTL", level: unix.IPPROTO_IP, opt: unix.IP_TTL, values: []int{1, 2, 255}, family: unix.AF_INET},
	{name: "IP_TOS", level: unix.IPPROTO_IP, opt: unix.IP_TOS, values: []int{0x10, 0xb8, 0xff, 3}, family: unix.AF_INET, late: true},
	{name: "IP_MTU_DISCOVER", level: unix.IPPROTO_IP, opt: unix.IP_MTU_DISCOVER, values: []int{0, 1, 2, 3, 4, 5}, family: unix.AF_INET, late: true},
	{name: "IP_TRANSPARENT", level: unix.IPPROTO_IP, opt: unix.IP_TRANSPARENT, values: []int{1}, family: unix.AF_INET},
	{name: "IP_FREEBIND", level: unix.IPPROTO_IP, opt: unix.IP_FREEBIND, values: []int{1}, family: unix.AF_INET},
	{name: "IP_OPTIONS", level: unix.IPPROTO_IP, opt: unix.IP_OPTIONS, family: unix.AF_INET, late: true,
		texts: []string{"\x01\x01\x01\x01", "\x07\x0b\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00", "\x94\x04\x00\x00"}},
	{name: "IPV6_UNICAST_HOPS", level: unix.IPPROTO_IPV6, opt: unix.IPV6_UNICAST_HOPS, values: []int{1, 2, 255}, family: unix.AF_INET6},
	{name: "IPV6_TCLASS", level: unix.IPPROTO_IPV6, opt: unix.IPV6_TCLASS, values: []int{0x10, 0xb8, 0xff}, family: unix.AF_INET6, late: true},
	{name: "IPV6_MTU_DISCOVER", level: unix.IPPROTO_IPV6, opt: unix.IPV6_MTU_DISCOVER, values: []int{0, 1, 2, 3, 4}, family: unix.AF_INET6, late: true},
	{name: "IPV6_AUTOFLOWLABEL", level: unix.IPPROTO_IPV6, opt: unix.IPV6_AUTOFLOWLABEL, values: []int{0, 1}, family: unix.AF_INET6},
	{name: "IPV6_DONTFRAG", level: unix.IPPROTO_IPV6, opt: unix.IPV6_DONTFRAG, values: []int{0, 1}, family: unix.AF_INET6},
	{name: "SO_PRIORITY", level: unix.SOL_SOCKET, opt: unix.SO_PRIORITY, values: []int{1, 6}, late: true},
	{name: "SO_MARK", level: unix.SOL_SOCKET, opt: unix.SO_MARK, values: []int{1, 0x7fffffff}},
	{name: "SO_DONTROUTE", level: unix.SOL_SOCKET, opt: unix.SO_DONTROUTE, values: []int{1}},
	{name: "SO_KEEPALIVE", level: unix.SOL_SOCKET, opt: unix.SO_KEEPALIVE, values: []int{1}},
	{name: "SO_SNDBUF", level: unix.SOL_SOCKET, opt: unix.SO_SNDBUF, values: []int{1, 5000, 20000}, late: true},
	{name: "SO_RCVBUF", level: unix.SOL_SOCKET, opt: unix.SO_RCVBUF, values: []int{1, 5000, 20000}},
	{name: "SO_RCVLOWAT", level: unix.SOL_SOCKET, opt: unix.SO_RCVLOWAT, values: []int{2000, 100000}},
	{name: "SO_TIMESTAMPNS", level: unix.SOL_SOCKET, opt: unix.SO_TIMESTAMPNS, values: []int{1}},
	{name: "SO_MAX_PACING_RATE", level: unix.SOL_SOCKET, opt: unix.SO_MAX_PACING_RATE, values: []int{2000000, 10000000}, late: true},
	{name: "SO_BUSY_POLL", level: unix.SOL_SOCKET, opt: unix.SO_BUSY_POLL, values: []int{50}, late: true},
	{name: "SO_PREFER_BUSY_POLL", level: unix.SOL_SOCKET, opt: unix.SO_PREFER_BUSY_POLL, values: []int{1}},
	{name: "SO_OOBINLINE", level: unix.SOL_SOCKET, opt: unix.SO_OOBINLINE, values: []int{1}},
	{name: "SO_TXREHASH", level: unix.SOL_SOCKET, opt: soTxRehash, values: []int{0, 1}},
	{name: "SO_RESERVE_MEM", level: unix.SOL_SOCKET, opt: soReserveMem, values: []int{100000}},
	{name: "TCP_MAXSEG", level: unix.IPPROTO_TCP, opt: unix.TCP_MAXSEG, values: []int{88, 200, 536, 1200, 1460}, late: true},
	{name: "TCP_NODELAY", level: unix.IPPROTO_TCP, opt: unix.TCP_NODELAY, values: []int{0, 1}, late: true},
	{name: "TCP_CORK", level: unix.IPPROTO_TCP, opt: unix.TCP_CORK, values: []int{1}, late: true},
	{name: "TCP_QUICKACK", level: unix.IPPROTO_TCP, opt: unix.TCP_QUICKACK, values: []int{0, 1}, late: true},
	{name: "TCP_WINDOW_CLAMP", level: unix.IPPROTO_TCP, opt: unix.TCP_WINDOW_CLAMP, values: []int{1000, 3000, 10000}},
	{name: "TCP_USER_TIMEOUT", level: unix.IPPROTO_TCP, opt: unix.TCP_USER_TIMEOUT, values: []int{5000}},
	{name: "TCP_SYNCNT", level: unix.IPPROTO_TCP, opt: unix.TCP_SYNCNT, values: []int{2}},
	{name: "TCP_THIN_LINEAR_TIMEOUTS", level: unix.IPPROTO_TCP, opt: unix.TCP_THIN_LINEAR_TIMEOUTS, values: []int{1}},
	{name: "TCP_CONGESTION", level: unix.IPPROTO_TCP, opt: unix.TCP_CONGESTION, texts: []string{"reno", "cubic", "bbr", "dctcp"}, late: true},
	{name: "TCP_NOTSENT_LOWAT", level: unix.IPPROTO_TCP, opt: unix.TCP_NOTSENT_LOWAT, values: []int{1, 4000}},
	{name: "TCP_SAVE_SYN", level: unix.IPPROTO_TCP, opt: unix.TCP_SAVE_SYN, values: []int{1, 2}},
	{name: "TCP_TX_DELAY", level: unix.IPPROTO_TCP, opt: tcpTxDelay, values: []int{1000, 20000}, late: true},
	{name: "TCP_INQ", level: unix.IPPROTO_TCP, opt: unix.TCP_INQ, values: []int{1}},
	{name: "TCP_RTO_MAX_MS", level: unix.IPPROTO_TCP, opt: tcpRTOMaxMS, values: []int{1000}},
	{name: "TCP_RTO_MIN_US", level: unix.IPPROTO_TCP, opt: tcpRTOMinUS, values: []int{5000}},
	{name: "TCP_DELACK_MAX_US", level: unix.IPPROTO_TCP, opt: tcpDelackMax, values: []int{1000, 100000}},
	{name: "TCP_KEEPIDLE", level: unix.IPPROTO_TCP, opt: unix.TCP_KEEPIDLE, values: []int{1}},
	{name: "TCP_KEEPINTVL", level: unix.IPPROTO_TCP, opt: unix.TCP_KEEPINTVL, values: []int{1}},
}

// choice is an option with a value.
type choice struct {
	*option
	value int
	text  string
}

func (c choice) String() string {
	if c.texts != nil {
		return fmt.Sprintf("%s=%q", c.name, c.text)
	}
	return fmt.Sprintf("%s=%d", c.name, c.value)
}

// choose draws options of a socket of the family, for before or for while it is
// connected.
func choose(rng *rand.Rand, family int, late bool) (cs []choice) {
	for n := rng.IntN(maxOptionsSet + 1); len(cs) < n; {
		o := &options[rng.IntN(len(options))]
		if o.family != 0 && o.family != family || late && !o.late {
			continue
		}
		c := choice{option: o}
		if o.texts != nil {
			c.text = pick(rng, o.texts...)
		} else {
			c.value = pick(rng, o.values...)
		}
		cs = append(cs, c)
	}
	return cs
}

// apply sets options as far as this kernel has them.
func apply(cs []choice, rc syscall.RawConn) error {
	return rc.Control(func(fd uintptr) {
		for _, c := range cs {
			if c.texts != nil {
				_ = unix.SetsockoptString(int(fd), c.level, c.opt, c.text)
			} else {
				_ = unix.SetsockoptInt(int(fd), c.level, c.opt, c.value)
			}
		}
	})
}

// before is a Control function that applies options before the socket is bound.
func before(cs []choice) func(string, string, syscall.RawConn) error {
	return func(_, _ string, rc syscall.RawConn) error { return apply(cs, rc) }
}

// while applies options to a connection in use.
func while(cs []choice, c net.Conn) {
	if rc, err := c.(*net.TCPConn).SyscallConn(); err == nil {
		_ = apply(cs, rc)
	}
}
