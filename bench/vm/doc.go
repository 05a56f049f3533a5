// Package vm boots virtual machines with network cards that the test machine
// does not have, in order to run the program on them: QEMU emulates cards whose
// Linux drivers have zero-copy AF_XDP.
//
// [Fetch] gets QEMU and a kernel as Debian packages into a cache folder and
// unpacks them there; nothing is installed. [Initrd] packs the program, the
// agent (bench/vm/agent, the guest's first and only process of ours) and kernel
// modules. [Boot] starts a guest, whose agent then carries out [Request]s that
// arrive over a serial line. Guests are always emulated (TCG): no /dev/kvm is
// needed, rates mean nothing.
package vm
