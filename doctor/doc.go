// Package doctor examines a machine and its network interfaces for what the
// daemon needs and what makes it fast.
//
// [Gather] reads facts: from procfs and sysfs, netlink and ethtool, and, for an
// interface that may be disturbed, by really attaching a program and binding
// sockets. [Examine] judges facts, does no I/O, and decides nothing from
// anything else. [Finding.Apply] carries out the safe ones of the changes that
// Examine proposes.
package doctor
