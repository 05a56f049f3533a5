package xdp

// This file reads and writes the RSS indirection table of a device, and uses
// unsafe: its ioctl takes a pointer to a structure whose length the device
// decides. The netlink message that does the same came with Linux 6.17 only.

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIndirection is more entries than any device's table has.
const maxIndirection = 1 << 16

// indirection returns the table: the receive queue for each value of the
// packets' hash, modulo its length. A device without one is EOPNOTSUPP.
func indirection(ifname string) ([]uint32, error) {
	head := make([]byte, 8)
	if err := ethtoolIoctl(ifname, unix.ETHTOOL_GRXFHINDIR, head); err != nil {
		return nil, err
	}
	n := binary.NativeEndian.Uint32(head[4:])
	if n == 0 {
		return nil, unix.EOPNOTSUPP
	}
	if n > maxIndirection {
		return nil, fmt.Errorf("a table of %d entries", n)
	}
	b := make([]byte, 8+4*n)
	binary.NativeEndian.PutUint32(b[4:], n)
	if err := ethtoolIoctl(ifname, unix.ETHTOOL_GRXFHINDIR, b); err != nil {
		return nil, err
	}
	table := make([]uint32, n)
	for i := range table {
		table[i] = binary.NativeEndian.Uint32(b[8+4*i:])
	}
	return table, nil
}

// setIndirection replaces the table by one of the same length.
func setIndirection(ifname string, table []uint32) error {
	b := make([]byte, 8+4*len(table))
	binary.NativeEndian.PutUint32(b[4:], uint32(len(table)))
	for i, q := range table {
		binary.NativeEndian.PutUint32(b[8+4*i:], q)
	}
	return ethtoolIoctl(ifname, unix.ETHTOOL_SRXFHINDIR, b)
}

// ethtoolIoctl gives the kernel a structure of ethtool, which begins with the
// command and is read and written in place.
func ethtoolIoctl(ifname string, command uint32, b []byte) error {
	binary.NativeEndian.PutUint32(b, command)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var request struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	if len(ifname) >= len(request.name) {
		return unix.ENODEV
	}
	copy(request.name[:], ifname)
	request.data = unsafe.Pointer(unsafe.SliceData(b))
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return errno
	}
	return nil
}
