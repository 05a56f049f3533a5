// Package xdp moves packets between the kernel and user space without knowing
// what is in them: UMEM and AF_XDP rings, a TAP device with a virtio-net
// header, the eBPF programs that divert TCP connections of a host to these,
// and the guard programs that keep diverted connections shut when the process
// that translated them is gone.
//
// Everything that names a network device works in the network namespace of the
// calling thread at the time of the call; callers that change namespaces lock
// their OS thread first. Once made, sockets, queues and links work from any
// thread.
//
// A Umem and the Sockets on it belong to one goroutine, their worker. Nothing
// in them is locked, and only the methods that say so may be called by others.
package xdp
