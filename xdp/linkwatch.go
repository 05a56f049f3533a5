package xdp

import (
	"errors"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// DeviceMTU is what WatchLink sends when the MTU of the device was changed: the
// new one, in bytes.
type DeviceMTU int

// Error makes a DeviceMTU one of the values that WatchLink sends.
func (m DeviceMTU) Error() string { return fmt.Sprintf("xdp: the MTU is now %d", int(m)) }

// WatchLink sends to ch when a device of the calling thread's network namespace
// changes or goes: ErrDeviceDown each time it is set down, a DeviceMTU,
// ErrDeviceGone, the last value, when it is removed or leaves the namespace. AF_XDP sockets do not tell: poll
// says nothing, and only transmission fails. Of changes that follow each other faster
// than they are received only the last may be sent. stop ends the watch and may be
// called more than once; a send to ch that nobody receives ends with it.
func WatchLink(ifindex int, ch chan<- error) (stop func(), err error) {
	w := &linkWatch{ifindex: ifindex, ch: ch, done: make(chan struct{})}
	w.stop = sync.OnceFunc(func() { close(w.done) })
	defer func() {
		if err != nil {
			err = fmt.Errorf("xdp: watch interface %d: %w", ifindex, err)
		}
	}()
	if w.space, err = netns.Get(); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	if w.handle, err = netlink.NewHandleAt(w.space, unix.NETLINK_ROUTE); err != nil {
		w.space.Close()
		return nil, err
	}
	updates, err := w.subscribe()
	var link netlink.Link
	if err == nil {
		// Only now, so that nothing is missed in between.
		link, err = w.handle.LinkByIndex(ifindex)
	}
	if err != nil {
		w.end(updates)
		return nil, err
	}
	w.up, w.mtu = isUp(link.Attrs().RawFlags), link.Attrs().MTU
	go w.follow(updates)
	return w.stop, nil
}

// linkWatch is of one goroutine, but for stop.
type linkWatch struct {
	ifindex int
	ch      chan<- error
	space   netns.NsHandle
	handle  *netlink.Handle
	stop    func()
	done    chan struct{} // closed by stop
	up      bool
	mtu     int
}

// end releases everything; updates is the last subscription, or nil.
func (w *linkWatch) end(updates chan netlink.LinkUpdate) {
	w.stop()
	if updates != nil {
		for range updates { // or its sender would wait for ever
		}
	}
	w.handle.Close()
	w.space.Close()
}

// subscribe has changes of all devices sent until an error, or until done.
func (w *linkWatch) subscribe() (chan netlink.LinkUpdate, error) {
	updates := make(chan netlink.LinkUpdate, 16)
	err := netlink.LinkSubscribeWithOptions(updates, w.done, netlink.LinkSubscribeOptions{Namespace: &w.space})
	if err != nil {
		return nil, err
	}
	return updates, nil
}

// follow reports changes. A subscription ends when the kernel could not queue
// one, as when many devices come and go at a time; what was missed is then asked for.
func (w *linkWatch) follow(updates chan netlink.LinkUpdate) {
	defer func() { w.end(updates) }()
	for {
		for u := range updates {
			// A port that leaves a bridge is told of with the bridge's family.
			if int(u.Index) != w.ifindex || u.Family != unix.AF_UNSPEC {
				continue
			}
			if u.Header.Type == unix.RTM_DELLINK {
				w.report(ErrDeviceGone)
				return
			}
			w.compare(u.Flags, u.Attrs().MTU)
		}
		select {
		case <-w.done:
			return
		default:
		}
		var err error
		var link netlink.Link
		if updates, err = w.subscribe(); err == nil {
			link, err = w.handle.LinkByIndex(w.ifindex)
		}
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			w.report(ErrDeviceGone)
			return
		}
		if err != nil {
			w.report(fmt.Errorf("xdp: watch interface %d: %w", w.ifindex, err))
			return
		}
		w.compare(link.Attrs().RawFlags, link.Attrs().MTU)
	}
}

func (w *linkWatch) compare(flags uint32, mtu int) {
	was := w.up
	if w.up = isUp(flags); was && !w.up {
		w.report(ErrDeviceDown)
	}
	if mtu != w.mtu {
		w.mtu = mtu
		w.report(DeviceMTU(mtu))
	}
}

func (w *linkWatch) report(err error) {
	select {
	case w.ch <- err:
	case <-w.done:
	}
}

func isUp(flags uint32) bool { return flags&unix.IFF_UP != 0 }
