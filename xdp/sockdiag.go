package xdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// struct inet_diag_sockid, inet_diag_req_v2 and inet_diag_msg.
const (
	diagIDLen      = 48 // sport, dport, source, destination, interface, cookie
	diagRequestLen = 8 + diagIDLen
	diagMessageLen = 4 + diagIDLen + 20

	sockDestroy = 21 // SOCK_DESTROY
	stateListen = 10 // TCP_LISTEN
	allStates   = 0xffff &^ (1 << stateListen)
)

var noCookie = [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff} // INET_DIAG_NOCOOKIE

// diagID identifies a socket of a family to sock_diag.
type diagID struct {
	family uint8
	id     [diagIDLen]byte
}

// newDiagID returns the look-up of a connection in a family.
func newDiagID(key FlowKey, family uint8) diagID {
	d := diagID{family: family}
	copy(d.id[0:4], key[32:36])
	if family == unix.AF_INET {
		copy(d.id[4:], key[12:16])
		copy(d.id[20:], key[28:32])
	} else {
		copy(d.id[4:], key[0:16])
		copy(d.id[20:], key[16:32])
	}
	copy(d.id[40:], noCookie[:])
	return d
}

// key returns the connection of a socket, without VLAN.
func (d *diagID) key() (key FlowKey) {
	copy(key[32:36], d.id[0:4])
	if d.family == unix.AF_INET {
		key[10], key[11], key[26], key[27] = 0xff, 0xff, 0xff, 0xff
		copy(key[12:16], d.id[4:8])
		copy(key[28:32], d.id[20:24])
	} else {
		copy(key[0:16], d.id[4:20])
		copy(key[16:32], d.id[20:36])
	}
	return key
}

func (d *diagID) request() []byte {
	b := make([]byte, 8, diagRequestLen)
	b[0], b[1] = d.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], allStates)
	return append(b, d.id[:]...)
}

// parseDiag returns the socket of a message unless it listens: a look-up of a
// connection that is gone finds the listener that its port belongs to.
func parseDiag(b []byte) (diagID, bool) {
	if len(b) < diagMessageLen || b[1] == stateListen {
		return diagID{}, false
	}
	d := diagID{family: b[0]}
	copy(d.id[:], b[4:])
	return d, true
}

func isV4(key FlowKey) bool {
	return [10]byte(key[0:]) == [10]byte{} && key[10] == 0xff && key[11] == 0xff
}

// withoutVLAN is the key as sockets know it.
func withoutVLAN(key FlowKey) FlowKey {
	clear(key[36:])
	return key
}

// destroy ends exactly the socket that was found, by its cookie. sockets may be
// nil.
func (d *diagID) destroy(sockets map[int]*nl.SocketHandle) error {
	request := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
	request.Sockets = sockets
	request.AddRawData(d.request())
	_, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("xdp: end socket: the kernel lacks CONFIG_INET_DIAG_DESTROY: %w", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("xdp: end socket: needs CAP_NET_ADMIN: %w", err)
	default:
		return fmt.Errorf("xdp: end socket: %w", err)
	}
}

// A SocketDiag ends sockets of one network namespace. One goroutine at a time may
// use it.
type SocketDiag struct {
	sockets map[int]*nl.SocketHandle
	route   *netlink.Handle
	devices []uint32 // indexes of the namespace's devices
	asked   time.Time
}

// devicesFor is how long the list of devices is believed.
const devicesFor = time.Second

// OpenSocketDiag works in the calling thread's network namespace.
func OpenSocketDiag() (*SocketDiag, error) {
	s, err := nl.Subscribe(unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("xdp: socket for sock_diag: %w", err)
	}
	d := &SocketDiag{sockets: map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: s}}}
	if err := s.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
		s.Close()
		return nil, fmt.Errorf("xdp: socket for sock_diag: %w", err)
	}
	if d.route, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		s.Close()
		return nil, fmt.Errorf("xdp: netlink: %w", err)
	}
	return d, nil
}

// Close gives up what OpenSocketDiag opened.
func (d *SocketDiag) Close() {
	d.sockets[unix.NETLINK_INET_DIAG].Close()
	d.route.Close()
}

// Destroy ends the local TCP socket of a connection (SOCK_DESTROY): its owner sees
// ECONNABORTED, the peer gets a RST. That there is none is no error. It needs
// CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY.
func (d *SocketDiag) Destroy(key FlowKey) error {
	found, err := d.find(key, 0)
	if found || err != nil {
		return err
	}
	// One that is bound to a device is found only through that device. Looking
	// at all sockets instead would take milliseconds where there are many.
	if now := time.Now(); now.Sub(d.asked) > devicesFor {
		links, err := d.route.LinkList()
		if err != nil && len(links) == 0 {
			return fmt.Errorf("xdp: list devices: %w", err)
		}
		d.devices = d.devices[:0]
		for _, l := range links {
			d.devices = append(d.devices, uint32(l.Attrs().Index))
		}
		d.asked = now
	}
	for _, device := range d.devices {
		if found, err := d.find(key, device); found || err != nil {
			return err
		}
	}
	return nil
}

// find ends the socket of a connection that a packet received on a device, 0 for
// any, would go to, unless that socket is bound to another one.
func (d *SocketDiag) find(key FlowKey, device uint32) (found bool, err error) {
	family := uint8(unix.AF_INET6)
	if isV4(key) {
		family = unix.AF_INET // finds IPv6 sockets with mapped addresses too
	}
	lookup := newDiagID(key, family)
	binary.NativeEndian.PutUint32(lookup.id[36:], device)
	request := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	request.Sockets = d.sockets
	request.AddRawData(lookup.request())
	messages, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("xdp: find socket: %w", err)
	}
	for _, m := range messages {
		if s, ok := parseDiag(m); ok && s.key() == withoutVLAN(key) {
			return true, s.destroy(d.sockets)
		}
	}
	return false, nil
}

// DestroySocket is SocketDiag.Destroy in the calling thread's network namespace.
func DestroySocket(key FlowKey) error {
	d, err := OpenSocketDiag()
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Destroy(key)
}

// DestroySockets is DestroySocket for many connections at the cost of one walk
// over all sockets. It returns how many sockets were ended.
func DestroySockets(keys []FlowKey) (int, error) {
	wanted := make(map[FlowKey]bool, len(keys))
	for _, key := range keys {
		wanted[withoutVLAN(key)] = true
	}
	ended := 0
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all := diagID{family: family}
		if len(keys) == 1 {
			copy(all.id[0:4], keys[0][32:36]) // the kernel compares the ports
		}
		request := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		request.AddRawData(all.request())
		messages, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("xdp: list sockets: %w", err))
		}
		for _, m := range messages {
			found, ok := parseDiag(m)
			if !ok || !wanted[found.key()] {
				continue
			}
			if err := found.destroy(nil); err != nil {
				errs = append(errs, err)
				continue
			}
			ended++
		}
	}
	return ended, errors.Join(errs...)
}
