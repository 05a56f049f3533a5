package xdp

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DefaultTAPName is the name of a TAP device whose name is not given.
const DefaultTAPName = "tcpcrypt%d"

// MaxTAPPacket is the length of the longest packet that a TAP queue delivers,
// in bytes: virtio-net header, Ethernet and VLAN header, and 65535 bytes of IP
// behind a fixed IPv6 header.
const MaxTAPPacket = VnetHdrLen + 14 + 4 + 40 + 65535

// MaxTAPMTU is the largest MTU of a TAP device, in bytes.
const MaxTAPMTU = 65535 - 14

const (
	// TAPQueueLen is the number of packets, of up to 64 KiB, that wait in the
	// kernel for the reader of a queue: there is no backpressure, and at the
	// usual 1000 a stall of 400 ms loses thousands.
	TAPQueueLen = 10000

	// maxPieces is the number of slices that one packet may be written from.
	maxPieces = 512

	maxTAPQueues = 256 // MAX_TAP_QUEUES of the kernel
)

// TAPConfig describes a TAP device.
type TAPConfig struct {
	Name   string // at most 15 bytes; a %d in it is numbered by the kernel; default DefaultTAPName
	Queues int    // 1 to 256; 0 means 1

	// MTU in bytes, 0 for the kernel's 1500. It must not be below that of a
	// device to and from which packets are redirected: the kernel drops what
	// does not fit without a word.
	MTU int
}

// A TAP is a multi-queue TAP device with a virtio-net header, checksum offload
// and TSO in both directions: the kernel hands down packets of up to 64 KiB
// with a partial checksum and takes such. It has no address and IPv6 is off.
// The device ends with the process.
type TAP struct {
	name    string
	ifindex int
	queues  []*TAPQueue
}

// OpenTAP makes the device in the network namespace of the calling thread and
// sets it up. It needs CAP_NET_ADMIN.
func OpenTAP(cfg TAPConfig) (_ *TAP, err error) {
	if cfg.Name == "" {
		cfg.Name = DefaultTAPName
	}
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.Queues < 1 || cfg.Queues > maxTAPQueues {
		return nil, fmt.Errorf("xdp: TAP device with %d queues: must be 1 to %d", cfg.Queues, maxTAPQueues)
	}
	t := &TAP{name: cfg.Name}
	defer func() {
		if err != nil {
			t.Close()
			err = fmt.Errorf("xdp: TAP device: %w", err)
		}
	}()
	for range cfg.Queues {
		if err := t.addQueue(); err != nil {
			return nil, err
		}
	}
	link, err := netlink.LinkByName(t.name)
	if err != nil {
		return nil, fmt.Errorf("find: %w", err)
	}
	t.ifindex = link.Attrs().Index
	if err := disableIPv6(link); err != nil {
		return nil, err
	}
	if cfg.MTU != 0 {
		if err := netlink.LinkSetMTU(link, cfg.MTU); err != nil {
			return nil, fmt.Errorf("set MTU %d: %w", cfg.MTU, err)
		}
	}
	if err := netlink.LinkSetTxQLen(link, TAPQueueLen); err != nil {
		return nil, fmt.Errorf("set transmit queue length: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set up: %w", err)
	}
	return t, nil
}

// addQueue opens one more queue; the first makes the device and learns its
// name.
func (t *TAP) addQueue() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("open /dev/net/tun: no such device, is the module tun loaded?: %w", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("open /dev/net/tun: needs root: %w", err)
	case err != nil:
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	q := newTAPQueue(fd)
	t.queues = append(t.queues, q)

	request, err := unix.NewIfreq(t.name)
	if err != nil {
		return fmt.Errorf("bad name: %w", err)
	}
	// Not IFF_NAPI: packets above a page's worth would be refused.
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE)
	if len(t.queues) == 1 {
		flags |= unix.IFF_TUN_EXCL // else a device of that name would get one more queue
	}
	request.SetUint16(flags)
	switch err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("create: needs root, or CAP_NET_ADMIN: %w", err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("create: the name %s is taken: %w", t.name, err)
	case err != nil:
		return fmt.Errorf("create: %w", err)
	}
	t.name = request.Name()
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, VnetHdrLen); err != nil {
		return fmt.Errorf("set virtio-net header: %w", err)
	}
	const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("set offloads: %w", err)
	}
	return nil
}

// disableIPv6 keeps the kernel from sending on the device by itself: neighbour
// and multicast packets would look like diverted traffic.
func disableIPv6(link netlink.Link) error {
	path := "/proc/sys/net/ipv6/conf/" + strings.ReplaceAll(link.Attrs().Name, "/", ".") + "/disable_ipv6"
	err := os.WriteFile(path, []byte("1"), 0)
	switch {
	case err == nil, errors.Is(err, os.ErrNotExist): // ErrNotExist: no IPv6 in this kernel
		return nil
	case errors.Is(err, unix.EROFS), errors.Is(err, os.ErrPermission):
		// A container without a writable /proc/sys. Without an address IPv6
		// stays silent except for multicast reports.
		if err := netlink.LinkSetIP6AddrGenMode(link, 1); err != nil { // IN6_ADDR_GEN_MODE_NONE
			return fmt.Errorf("disable IPv6 addresses: %w", err)
		}
		return nil
	default:
		return fmt.Errorf("disable IPv6: %w", err)
	}
}

// Queue returns queue i, from 0.
func (t *TAP) Queue(i int) *TAPQueue { return t.queues[i] }

// Queues returns the number of queues.
func (t *TAP) Queues() int { return len(t.queues) }

// Name returns the name that the kernel gave the device.
func (t *TAP) Name() string { return t.name }

// Ifindex returns the device's interface index.
func (t *TAP) Ifindex() int { return t.ifindex }

// SetUp sets the device up, as OpenTAP did. It fails with ErrDeviceGone if it was
// deleted.
func (t *TAP) SetUp() error {
	link, err := netlink.LinkByIndex(t.ifindex)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) {
		return ErrDeviceGone
	}
	if err != nil {
		return fmt.Errorf("xdp: TAP device %s: set up: %w", t.name, err)
	}
	return nil
}

// SetSteering attaches a program of type SocketFilter; the queue of a packet
// that the kernel hands down is the program's result modulo the number of
// queues. nil goes back to the kernel's own choice, which learns from what is
// written to the queues.
func (t *TAP) SetSteering(prog *ebpf.Program) error {
	fd := -1
	if prog != nil {
		fd = prog.FD()
	}
	if err := unix.IoctlSetPointerInt(t.queues[0].fd, unix.TUNSETSTEERINGEBPF, fd); err != nil {
		return fmt.Errorf("xdp: TAP device %s: set steering program: %w", t.name, err)
	}
	return nil
}

// Close closes the queues, with which the device ends. No method of a queue
// may be running or called later.
func (t *TAP) Close() error {
	var errs []error
	for _, q := range t.queues {
		errs = append(errs, unix.Close(q.fd))
	}
	t.queues = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("xdp: close TAP device %s: %w", t.name, err)
	}
	return nil
}
