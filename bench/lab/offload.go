package lab

import (
	"errors"
	"fmt"
	"unsafe" // for the pointer inside struct ifreq of the ethtool ioctl

	"golang.org/x/sys/unix"
)

// ifreqData is struct ifreq with ifr_data.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [24 - unsafe.Sizeof(uintptr(0))]byte
}

// ethtoolValue is struct ethtool_value.
type ethtoolValue struct {
	cmd, data uint32
}

// ethtool runs a command with one value on the interface and returns the value
// as the kernel left it.
func (i *Iface) ethtool(cmd, value uint32) (uint32, error) {
	v := ethtoolValue{cmd, value}
	err := i.NS.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		r := ifreqData{data: unsafe.Pointer(&v)}
		copy(r.name[:unix.IFNAMSIZ-1], i.Name)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); e != 0 {
			return e
		}
		return nil
	})
	return v.data, err
}

// awaitCarrier makes the kernel handle a pending change of the link state now.
// It would do so later by itself, but until then it drops what is sent.
func (i *Iface) awaitCarrier() error {
	up, err := i.ethtool(unix.ETHTOOL_GLINK, 0)
	if err == nil && up == 0 {
		err = errors.New("no carrier")
	}
	return i.wrap("link state", err)
}

// SetOffload turns transmit checksumming, TCP segmentation offload, generic
// segmentation and generic receive offload on or off together. With them off
// every frame that the interface sends is a complete packet that fits the MTU
// and carries its full checksum.
func (i *Iface) SetOffload(on bool) error {
	// Without checksumming the kernel turns segmentation off by itself, and
	// refuses to turn it on.
	order := []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SGRO, unix.ETHTOOL_STXCSUM}
	if on {
		order = []uint32{unix.ETHTOOL_STXCSUM, unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SGRO}
	}
	for _, cmd := range order {
		if err := i.SetFeature(Feature(cmd), on); err != nil {
			return err
		}
	}
	return nil
}

// Feature is an offload that SetFeature switches, by its ethtool "set" command.
type Feature uint32

// The offloads that matter here.
const (
	TxChecksum Feature = unix.ETHTOOL_STXCSUM // transmit checksums left to the device
	TSO        Feature = unix.ETHTOOL_STSO    // TCP segmentation left to the device
	GSO        Feature = unix.ETHTOOL_SGSO    // segmentation as late as possible
	GRO        Feature = unix.ETHTOOL_SGRO    // merging on receive
)

// String returns ethtool's name of the feature.
func (f Feature) String() string {
	switch f {
	case TxChecksum:
		return "tx-checksum"
	case TSO:
		return "tso"
	case GSO:
		return "gso"
	case GRO:
		return "gro"
	}
	return fmt.Sprintf("feature(%#x)", uint32(f))
}

// SetFeature switches one offload and verifies that it took effect.
func (i *Iface) SetFeature(f Feature, on bool) error {
	var v uint32
	if on {
		v = 1
	}
	if _, err := i.ethtool(uint32(f), v); err != nil {
		return i.wrap(f.String(), err)
	}
	got, err := i.HasFeature(f)
	if err == nil && got != on {
		err = i.wrap(f.String(), errors.New("the device does not allow this setting"))
	}
	return err
}

// HasFeature reports whether an offload is on.
func (i *Iface) HasFeature(f Feature) (bool, error) {
	// Every "get" command is numbered one below its "set" command.
	v, err := i.ethtool(uint32(f)-1, 0)
	return v != 0, i.wrap(f.String(), err)
}
