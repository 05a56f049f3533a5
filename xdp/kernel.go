package xdp

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrKernelTooOld: the kernel lacks tcx links, which came with Linux 6.6.
var ErrKernelTooOld = errors.New("xdp: Linux 6.6 or later is needed")

// kernelRelease returns the release string and its first two numbers.
func kernelRelease() (release string, major, minor int, err error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "", 0, 0, fmt.Errorf("xdp: read kernel release: %w", err)
	}
	release = unix.ByteSliceToString(uts.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return release, 0, 0, fmt.Errorf("xdp: kernel release %q is not a version", release)
	}
	return release, major, minor, nil
}

func checkKernel() error {
	release, major, minor, err := kernelRelease()
	if err != nil {
		return err
	}
	if major < 6 || major == 6 && minor < 6 {
		return fmt.Errorf("%w: this is %s", ErrKernelTooOld, release)
	}
	return nil
}
