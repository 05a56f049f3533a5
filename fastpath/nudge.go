package fastpath

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// nudge makes the peer of a connection notice that this host has forgotten it:
// a segment outside its window draws an ACK with the right numbers, which the
// kernel, where no socket is left, answers with an exact reset. The numbers of
// the outer stream died with the daemon that knew them. It runs in the current
// network namespace.
func nudge(k packet.Key) error {
	local, remote := k.LocalAddr(), k.RemoteAddr()
	v6 := remote.Addr().Is6()
	family, l4 := unix.AF_INET, packet.IPv4Len
	if v6 {
		family, l4 = unix.AF_INET6, packet.IPv6Len
	}
	p := make([]byte, l4+packet.TCPLen)
	var from, to unix.Sockaddr
	if v6 {
		copy(p[8:], k.Local[:])
		copy(p[24:], k.Remote[:])
		from, to = &unix.SockaddrInet6{Addr: k.Local}, &unix.SockaddrInet6{Addr: k.Remote}
	} else {
		a, b := local.Addr().As4(), remote.Addr().As4()
		copy(p[12:], a[:])
		copy(p[16:], b[:])
		from, to = &unix.SockaddrInet4{Addr: a}, &unix.SockaddrInet4{Addr: b}
	}
	t := p[l4:]
	binary.BigEndian.PutUint16(t[0:], k.LPort)
	binary.BigEndian.PutUint16(t[2:], k.RPort)
	t[12], t[13] = packet.TCPLen/4<<4, packet.ACK
	packet.FullChecksum(p, 0, l4, v6)
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, from); err != nil {
		return fmt.Errorf("bind %s: %w", local.Addr(), err)
	}
	if err := unix.Sendto(fd, t, 0, to); err != nil {
		return fmt.Errorf("send to %s: %w", remote.Addr(), err)
	}
	return nil
}
