package xdp

import (
	"errors"
	"fmt"
	"slices"

	"github.com/safchain/ethtool"
	"golang.org/x/sys/unix"
)

// Concentrate makes a device of the calling thread's network namespace deliver
// received packets to the given queues alone: by its RSS indirection table
// (ethtool -X), or, where it has none and the queues are the first ones, by
// giving it no others (ethtool -L). It must be called before sockets are bound,
// and restore, in the same network namespace, after they are closed; how says
// what was done, in words.
func Concentrate(ifname string, queues []int) (how string, restore func() error, err error) {
	if len(queues) == 0 {
		return "", nil, errors.New("xdp: no queues to concentrate on")
	}
	table, err := indirection(ifname)
	if err == nil {
		how, restore, err = concentrateTable(ifname, table, queues)
	} else if errors.Is(err, unix.EOPNOTSUPP) {
		how, restore, err = concentrateChannels(ifname, queues)
	}
	if err != nil {
		return "", nil, fmt.Errorf("xdp: concentrate %s on queues %v: %w", ifname, queues, err)
	}
	return how, restore, nil
}

func concentrateTable(ifname string, before []uint32, queues []int) (string, func() error, error) {
	table := spread(len(before), queues)
	if err := setIndirection(ifname, table); err != nil {
		return "", nil, fmt.Errorf("set RSS indirection: %w", err)
	}
	restore := func() error {
		if err := setIndirection(ifname, before); err != nil {
			return fmt.Errorf("xdp: put the RSS indirection of %s back (ethtool -X %s default does it): %w", ifname, ifname, err)
		}
		return nil
	}
	return fmt.Sprintf("RSS indirection over queues %v", queues), restore, nil
}

// spread makes a table of n entries that uses the queues evenly.
func spread(n int, queues []int) []uint32 {
	table := make([]uint32, n)
	for i := range table {
		table[i] = uint32(queues[i%len(queues)])
	}
	return table
}

func concentrateChannels(ifname string, queues []int) (string, func() error, error) {
	sorted := slices.Sorted(slices.Values(queues))
	n := uint32(len(sorted))
	if sorted[0] != 0 || sorted[n-1] != int(n)-1 {
		return "", nil, fmt.Errorf("the device has no RSS indirection, with which others than its first queues could be chosen: %w", unix.EOPNOTSUPP)
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return "", nil, err
	}
	defer tool.Close()
	before, err := tool.GetChannels(ifname)
	if err != nil {
		return "", nil, fmt.Errorf("read channels: %w", err)
	}
	after := before
	switch {
	case before.CombinedCount >= n:
		after.CombinedCount, after.RxCount = n, 0
	case before.RxCount >= n && before.CombinedCount == 0:
		after.RxCount = n
	default:
		return "", nil, fmt.Errorf("%d combined and %d receive channels: %w", before.CombinedCount, before.RxCount, unix.EOPNOTSUPP)
	}
	if _, err := tool.SetChannels(ifname, after); err != nil {
		return "", nil, fmt.Errorf("set channels: %w", err)
	}
	restore := func() error {
		tool, err := ethtool.NewEthtool()
		if err == nil {
			defer tool.Close()
			_, err = tool.SetChannels(ifname, before)
		}
		if err != nil {
			return fmt.Errorf("xdp: put the channels of %s back (%d combined, %d receive): %w", ifname, before.CombinedCount, before.RxCount, err)
		}
		return nil
	}
	return fmt.Sprintf("%d receive queues instead of %d", n, before.RxCount+before.CombinedCount), restore, nil
}
