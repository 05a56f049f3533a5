package xdp

import (
	"errors"
	"fmt"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// stripTags is the feature of devices that take the VLAN tag off packets that they
// receive, before XDP sees them.
const stripTags = "rx-vlan-hw-parse"

// losesTags reports whether XDP on a device cannot see VLAN tags, whatever keepTags
// does. What comes to a bond or bridge has lost its tag at the port, by the kernel if
// not by the card.
func losesTags(link netlink.Link, f ethtool.FeatureState) bool {
	switch link.Type() {
	case "device":
		return f.Active && !f.Available
	case "bond", "team", "bridge":
		return true
	}
	return f.Active
}

// keepTags has a card leave VLAN tags where XDP sees them. One that cannot is no
// error: Probe tells of it. undo is nil if nothing was changed.
func keepTags(nic netlink.Link) (undo func() error) {
	if nic.Type() != "device" {
		return nil
	}
	change := func(to bool) (changed bool, err error) {
		tool, err := ethtool.NewEthtool()
		if err != nil {
			return false, err
		}
		defer tool.Close()
		name := nic.Attrs().Name
		states, err := tool.FeaturesWithState(name)
		if err != nil || states[stripTags].Active == to || !states[stripTags].Available {
			return false, nil
		}
		return true, tool.Change(name, map[string]bool{stripTags: to})
	}
	if changed, err := change(false); err != nil || !changed {
		return nil
	}
	return func() error {
		// A card that has gone needs nothing.
		if _, err := change(true); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("%s: %w", stripTags, err)
		}
		return nil
	}
}
