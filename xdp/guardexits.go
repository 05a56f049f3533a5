package xdp

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// An exitWatch keeps the eBPF map of the devices through which listed
// connections may leave: the guarded one and those whose packets it sends, so
// that the diverter and the guard's filters judge them there.
type exitWatch struct {
	devices *ebpf.Map
	ifindex int
	handle  *netlink.Handle
	space   netns.NsHandle
	done    chan struct{}
	ended   sync.WaitGroup
}

// watchExits fills the map and keeps it up to date until stop. handle is of the
// calling thread's network namespace.
func watchExits(handle *netlink.Handle, devices *ebpf.Map, ifindex int) (*exitWatch, error) {
	w := &exitWatch{devices: devices, ifindex: ifindex, handle: handle, done: make(chan struct{})}
	var err error
	if w.space, err = netns.Get(); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	updates, err := w.subscribe()
	if err == nil {
		// Only now, so that nothing is missed in between.
		err = w.update()
	}
	if err != nil {
		close(w.done)
		w.space.Close()
		return nil, err
	}
	w.ended.Go(func() { w.follow(updates) })
	return w, nil
}

func (w *exitWatch) subscribe() (chan netlink.LinkUpdate, error) {
	updates := make(chan netlink.LinkUpdate, 64)
	err := netlink.LinkSubscribeWithOptions(updates, w.done, netlink.LinkSubscribeOptions{Namespace: &w.space})
	if err != nil {
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	return updates, nil
}

// follow updates the map after each change. A subscription ends when the kernel
// could not queue an event; what was lost is then listed.
func (w *exitWatch) follow(updates chan netlink.LinkUpdate) {
	for {
		for range updates {
			for len(updates) > 0 {
				<-updates
			}
			_ = w.update() // the next event tries again
		}
		select {
		case <-w.done:
			return
		default:
		}
		var err error
		if updates, err = w.subscribe(); err != nil {
			return
		}
		_ = w.update()
	}
}

func (w *exitWatch) stop() {
	close(w.done)
	w.ended.Wait()
	w.space.Close()
}

func (w *exitWatch) update() error {
	links, err := w.handle.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list devices: %w", err)
	}
	want := exits(links, w.ifindex)
	var have, value uint32
	var gone []uint32
	for entries := w.devices.Iterate(); entries.Next(&have, &value); {
		if !slices.Contains(want, have) {
			gone = append(gone, have)
		}
	}
	for _, device := range gone {
		if err := w.devices.Delete(device); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete device %d from eBPF map: %w", device, err)
		}
	}
	for _, device := range want {
		if err := w.devices.Put(device, uint32(1)); err != nil {
			return fmt.Errorf("insert device %d into eBPF map: %w", device, err)
		}
	}
	return nil
}

// exits returns which of the devices send through a device: itself, its VLANs
// and the like, and the bridge or other master that it is a port of. Devices of
// tunnels, which wrap what they send, are not among them.
func exits(links []netlink.Link, ifindex int) []uint32 {
	found := []uint32{uint32(ifindex)}
	for i := 0; i < len(found); i++ {
		for _, l := range links {
			a := l.Attrs()
			switch {
			case a.Index == int(found[i]) && a.MasterIndex != 0:
				if !slices.Contains(found, uint32(a.MasterIndex)) {
					found = append(found, uint32(a.MasterIndex))
				}
			case a.ParentIndex != int(found[i]) || a.NetNsID != -1 || slices.Contains(found, uint32(a.Index)):
			case slices.Contains([]string{"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"}, l.Type()):
				found = append(found, uint32(a.Index))
			}
		}
	}
	return found
}
