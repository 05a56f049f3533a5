package fastpath

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// vmGenerationEvent is what the kernel's vmgenid driver adds to a uevent when
// this virtual machine was cloned or restored from a snapshot.
const vmGenerationEvent = "NEW_VMGENID=1"

// watchVMGeneration calls changed, on a goroutine of its own, whenever the
// kernel tells that this virtual machine was cloned or restored: what was secret
// is then known to another machine as well, and what was fresh was used by it
// (T23). On a machine without such a device nothing comes. stop ends it.
func watchVMGeneration(changed func()) (stop func(), err error) {
	return watchUevents(func(msg []byte) {
		if isNewVMGeneration(msg) {
			changed()
		}
	})
}

// isNewVMGeneration looks for the event in a uevent message: a summary and
// variables, each ended by a zero byte.
func isNewVMGeneration(msg []byte) bool {
	for field := range bytes.SplitSeq(msg, []byte{0}) {
		if string(field) == vmGenerationEvent {
			return true
		}
	}
	return false
}

// watchUevents gives fn every uevent of the kernel that this network namespace
// hears of.
func watchUevents(fn func(msg []byte)) (stop func(), err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("uevent socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevents")
	raw, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("uevent socket: %w", err)
	}
	go func() {
		buf := make([]byte, 1<<16)
		for {
			var n int
			var from unix.Sockaddr
			var rerr error
			err := raw.Read(func(fd uintptr) bool {
				n, from, rerr = unix.Recvfrom(int(fd), buf, 0)
				return rerr != unix.EAGAIN
			})
			if err != nil {
				return
			}
			// Others than the kernel can write to the group.
			if a, ok := from.(*unix.SockaddrNetlink); rerr == nil && ok && a.Pid == 0 {
				fn(buf[:n])
			}
		}
	}()
	return func() { _ = f.Close() }, nil
}
