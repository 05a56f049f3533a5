package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// AddVLAN makes the 802.1Q subinterface NAME.ID with the given addresses and
// brings it up; id is 1 to 4094. On a kernel without VLAN devices the
// subinterface is a TAP device that this process connects to tagged frames of
// the parent, which is slower and looks the same to both hosts, except that the
// kernel takes it for an interface of its own, see EmulatesVLAN.
func (i *Iface) AddVLAN(id int, addrs ...netip.Prefix) (*Iface, error) {
	if id < 1 || id > 4094 {
		return nil, fmt.Errorf("lab: VLAN %d: want 1 to 4094", id)
	}
	a := netlink.NewLinkAttrs()
	a.Name = fmt.Sprintf("%s.%d", i.Name, id)
	a.ParentIndex = i.Index
	err := i.NS.nl.LinkAdd(&netlink.Vlan{LinkAttrs: a, VlanId: id, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q})
	if errors.Is(err, unix.EOPNOTSUPP) {
		i.NS.emulatesVLAN.Store(true)
		err = i.emulateVLAN(a.Name, uint16(id))
	}
	if err != nil {
		return nil, i.wrap(fmt.Sprintf("VLAN %d", id), err)
	}
	v, err := i.NS.Iface(a.Name)
	if err != nil {
		return nil, err
	}
	for _, p := range addrs {
		if err := v.AddAddress(p); err != nil {
			return nil, err
		}
		if p.Addr().Is4() {
			v.IP4 = p
		} else {
			v.IP6 = p
		}
	}
	return v, v.SetUp()
}

// EmulatesVLAN reports whether AddVLAN made a device in the namespace that the
// kernel does not know for a part of its parent.
func (n *Namespace) EmulatesVLAN() bool { return n.emulatesVLAN.Load() }

// emulateVLAN makes a TAP device with the parent's MAC and MTU and starts to
// carry its frames, tagged, over the parent until the lab is closed.
func (i *Iface) emulateVLAN(name string, id uint16) error {
	var tap *os.File
	err := i.NS.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(name)
		if err == nil {
			req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("TAP device: %w", err)
		}
		tap = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		return err
	}
	sock, err := i.openVLANSide(name)
	if err != nil {
		_ = tap.Close()
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { untag(sock, tap, id) })
	wg.Go(func() { tag(tap, sock, id) })
	i.NS.lab.AtClose(func() error {
		err := errors.Join(sock.Close(), tap.Close())
		wg.Wait()
		return err
	})
	return nil
}

// openVLANSide sets the TAP device up and opens the parent.
func (i *Iface) openVLANSide(name string) (*PacketSocket, error) {
	t, err := i.NS.Iface(name)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(i.NS.nl.LinkSetHardwareAddr(t.link(), i.MAC), i.NS.nl.LinkSetMTU(t.link(), i.MTU)); err != nil {
		return nil, err
	}
	return i.OpenPacket()
}

// untag moves frames of the VLAN from the parent to the TAP device. A frame that
// the device does not take is lost, as on a wire.
func untag(sock *PacketSocket, tap *os.File, id uint16) {
	var buf []byte
	for {
		frames, err := sock.Receive(time.Time{})
		if err != nil && !errors.Is(err, unix.ENETDOWN) {
			return
		}
		for _, b := range frames {
			if len(b) < frame.EthLen+frame.VLANLen || binary.BigEndian.Uint16(b[12:]) != frame.EtherVLAN || binary.BigEndian.Uint16(b[14:])&0xfff != id {
				continue
			}
			buf = append(append(buf[:0], b[:12]...), b[16:]...)
			if _, err := tap.Write(buf); errors.Is(err, os.ErrClosed) {
				return
			}
		}
	}
}

// tag moves frames from the TAP device to the parent.
func tag(tap *os.File, sock *PacketSocket, id uint16) {
	buf := make([]byte, slotSize)
	for {
		n, err := tap.Read(buf[frame.VLANLen:])
		if err != nil {
			return
		}
		if n < 12 {
			continue
		}
		copy(buf, buf[frame.VLANLen:frame.VLANLen+12])
		binary.BigEndian.PutUint16(buf[12:], frame.EtherVLAN)
		binary.BigEndian.PutUint16(buf[14:], id)
		if _, err := sock.Send(buf[:n+frame.VLANLen]); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}
