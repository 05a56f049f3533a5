package xdp

import (
	"fmt"
	"sync"

	"github.com/vishvananda/netlink"
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
// says nothing, and only transmission fails. stop ends the watch and may be
// called more than once; a send to ch that nobody receives ends with it.
func WatchLink(ifindex int, ch chan<- error) (stop func(), err error) {
	done := make(chan struct{})
	stop = sync.OnceFunc(func() { close(done) })
	updates := make(chan netlink.LinkUpdate, 16)
	failed := make(chan error, 1)
	options := netlink.LinkSubscribeOptions{ErrorCallback: func(err error) {
		select {
		case failed <- err:
		default:
		}
	}}
	if err := netlink.LinkSubscribeWithOptions(updates, done, options); err != nil {
		return nil, fmt.Errorf("xdp: watch interface %d: %w", ifindex, err)
	}
	// Only now, so that nothing is missed in between.
	link, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		stop()
		return nil, fmt.Errorf("xdp: watch interface %d: %w", ifindex, err)
	}
	up, mtu := isUp(link.Attrs().RawFlags), link.Attrs().MTU
	go func() {
		report := func(err error) {
			select {
			case ch <- err:
			case <-done:
			}
		}
		for update := range updates {
			// A port that leaves a bridge is told of with the bridge's family.
			if int(update.Index) != ifindex || update.Family != unix.AF_UNSPEC {
				continue
			}
			if update.Header.Type == unix.RTM_DELLINK {
				report(ErrDeviceGone)
				stop()
				continue
			}
			was := up
			if up = isUp(update.Flags); was && !up {
				report(ErrDeviceDown)
			}
			if now := update.Attrs().MTU; now != mtu {
				mtu = now
				report(DeviceMTU(mtu))
			}
		}
		select {
		case err := <-failed:
			select {
			case <-done: // the end of the subscription
			default:
				report(fmt.Errorf("xdp: watch interface %d: %w", ifindex, err))
			}
		default:
		}
	}()
	return stop, nil
}

func isUp(flags uint32) bool { return flags&unix.IFF_UP != 0 }
