package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
	"unsafe" // for pointers to structures of ioctls, and to the memory that faults

	"golang.org/x/sys/unix"
)

// Of linux/userfaultfd.h.
const (
	uffdAPI         = 0xaa
	uffdioAPI       = 0xc018aa3f
	uffdioRegister  = 0xc020aa00
	uffdioZeroPage  = 0xc020aa04
	uffdModeMissing = 1
)

// HoldConfiguration makes every request to the kernel that concerns the
// configuration of network devices wait, on the whole machine, until release is
// called or the time most is over, as a driver does that takes long: it has the
// kernel write the answer to a harmless question, for which it holds the RTNL
// lock, to memory that is not there yet. release may be called more than once,
// and the end of the process releases as well.
func (i *Iface) HoldConfiguration(most time.Duration) (release func() error, err error) {
	defer func() { err = i.wrap("hold configuration", err) }()
	page := unix.Getpagesize()
	mem, err := unix.Mmap(-1, 0, 2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	clear(mem[:page])
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return nil, errors.Join(fmt.Errorf("userfaultfd: %w", errno), unix.Munmap(mem))
	}
	uffd := int(fd)
	undo := func() error { return errors.Join(unix.Close(uffd), unix.Munmap(mem)) }
	call := func(request uintptr, args *[4]uint64) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(args))); errno != 0 {
			return fmt.Errorf("userfaultfd %#x: %w", request, errno)
		}
		return nil
	}
	missing := uint64(uintptr(unsafe.Pointer(&mem[page])))
	if err := errors.Join(call(uffdioAPI, &[4]uint64{uffdAPI}), call(uffdioRegister, &[4]uint64{missing, uint64(page), uffdModeMissing})); err != nil {
		return nil, errors.Join(err, undo())
	}

	// The command is there, and what follows it is not.
	const cmdLen = 4
	binary.NativeEndian.PutUint32(mem[page-cmdLen:], unix.ETHTOOL_GCHANNELS)
	asked := make(chan error, 1)
	go func() {
		asked <- i.NS.Do(func() error {
			s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			r := ifreqData{data: unsafe.Pointer(&mem[page-cmdLen])}
			copy(r.name[:unix.IFNAMSIZ-1], i.Name)
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); errno != 0 {
				return errno
			}
			return nil
		})
	}()
	release = sync.OnceValue(func() error {
		defer runtime.KeepAlive(mem)
		err := call(uffdioZeroPage, &[4]uint64{missing, uint64(page)})
		return errors.Join(err, <-asked, undo())
	})
	poll := []unix.PollFd{{Fd: int32(uffd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, 100)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return nil, errors.Join(err, release())
		case n > 0:
			time.AfterFunc(most, func() { _ = release() }) // whoever calls it gets the error
			return release, nil
		}
		select {
		case err := <-asked:
			return nil, errors.Join(errors.New("the kernel did not wait"), err, undo())
		default:
		}
	}
}
