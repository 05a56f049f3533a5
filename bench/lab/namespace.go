package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a named network namespace of a lab, with loopback up and IPv6
// duplicate address detection off. Its methods may be called from any
// goroutine until the lab is closed.
type Namespace struct {
	lab   *Lab
	short string
	file  *os.File
	nl    *netlink.Handle

	emulatesVLAN atomic.Bool
}

// Namespace makes a new namespace. name must be unique in the lab and a valid
// file name without '/'.
func (l *Lab) Namespace(name string) (*Namespace, error) {
	if name == "" || strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("lab: bad namespace name %q", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	n := &Namespace{lab: l, short: name}
	var err error
	if n.file, err = newNamedNamespace(n.Name()); err != nil {
		return nil, err
	}
	l.spaces = append(l.spaces, n)
	if n.nl, err = netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("lab: netlink in %s: %w", name, err)
	}
	lo, err := n.nl.LinkByName("lo")
	if err == nil {
		err = n.nl.LinkSetUp(lo)
	}
	if err != nil {
		return nil, fmt.Errorf("lab: loopback of %s: %w", name, err)
	}
	for _, s := range [...][2]string{
		{"net/ipv6/conf/all/accept_dad", "0"},
		{"net/ipv6/conf/default/accept_dad", "0"},
		{"net/ipv6/conf/default/accept_ra", "0"},
		{"net/ipv6/conf/default/router_solicitations", "0"},
	} {
		if err := n.Sysctl(s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return n, nil
}

// onLostThread calls fn on a locked thread that the runtime destroys when the
// calling goroutine, started for this, ends: fn may change what it likes about
// the thread. The main thread, which cannot be destroyed and stands for the
// whole process in /proc, is never used.
func onLostThread(fn func()) {
	runtime.LockOSThread()
	if unix.Gettid() != os.Getpid() {
		fn()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		onLostThread(fn)
	}()
	<-done
	runtime.UnlockOSThread()
}

// newNamedNamespace makes a namespace, binds it to a name and returns an open
// file of it. The thread on which it was made is thrown away.
func newNamedNamespace(name string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go onLostThread(func() {
		var r result
		defer func() { ch <- r }()
		unlock, err := lockNetnsDir()
		if err != nil {
			r.err = err
			return
		}
		defer unlock()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			r.err = privilege(fmt.Errorf("lab: new network namespace: %w", err))
			return
		}
		p := filepath.Join(netnsDir, name)
		f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
		if err != nil {
			r.err = fmt.Errorf("lab: name of namespace: %w", err)
			return
		}
		_ = f.Close()
		if err := unix.Mount("/proc/thread-self/ns/net", p, "none", unix.MS_BIND, ""); err != nil {
			_ = os.Remove(p)
			r.err = privilege(fmt.Errorf("lab: bind %s: %w", name, err))
			return
		}
		if r.f, err = os.Open(p); err != nil {
			r.err = fmt.Errorf("lab: %w", err)
			_ = unmountNamed(name)
		}
	})
	r := <-ch
	return r.f, r.err
}

// remove deletes the links first: sockets and processes may keep the namespace
// alive after its name is gone.
func (n *Namespace) remove() error {
	var errs []error
	if n.nl != nil {
		if links, err := n.nl.LinkList(); err == nil {
			for _, k := range links {
				if k.Attrs().Name == "lo" {
					continue
				}
				// Deleting one end of a veth deletes the other, and its
				// subinterfaces with it.
				var gone netlink.LinkNotFoundError
				if err := n.nl.LinkDel(k); err != nil && !errors.Is(err, unix.ENODEV) && !errors.As(err, &gone) {
					errs = append(errs, fmt.Errorf("lab: delete %s in %s: %w", k.Attrs().Name, n.short, err))
				}
			}
		}
		n.nl.Close()
	}
	unlock, err := lockNetnsDir()
	if err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, unmountNamed(n.Name()))
		unlock()
	}
	return errors.Join(append(errs, n.file.Close())...)
}

// Lab returns the lab that the namespace belongs to.
func (n *Namespace) Lab() *Lab { return n.lab }

// Name returns the namespace's full name, the one to use with "ip netns exec".
func (n *Namespace) Name() string { return n.lab.name + "-" + n.short }

// ShortName returns the name given at creation.
func (n *Namespace) ShortName() string { return n.short }

// Path returns the file of the namespace under /run/netns.
func (n *Namespace) Path() string { return filepath.Join(netnsDir, n.Name()) }

// FD returns a file descriptor of the namespace; it belongs to the Namespace.
func (n *Namespace) FD() int { return int(n.file.Fd()) }

// Netlink returns a handle whose route sockets are in the namespace; it belongs
// to the Namespace.
func (n *Namespace) Netlink() *netlink.Handle { return n.nl }

// Do calls fn on the caller's goroutine with its thread inside the namespace
// and returns fn's error. Sockets, BPF links and processes that fn makes stay
// in the namespace after Do; goroutines that fn starts do not run in it. Calls
// may nest, fn may panic or end its goroutine (as testing.T.Fatal does).
func (n *Namespace) Do(fn func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	orig, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("lab: current namespace: %w", err)
	}
	defer orig.Close()
	if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
		if errors.Is(err, unix.EBADF) {
			return ErrClosed
		}
		return privilege(fmt.Errorf("lab: enter %s: %w", n.short, err))
	}
	defer func() {
		if err := unix.Setns(int(orig.Fd()), unix.CLONE_NEWNET); err != nil {
			// Unrelated goroutines would run on this thread, in the wrong
			// namespace.
			panic(fmt.Sprintf("lab: cannot return from namespace %s: %v", n.short, err))
		}
	}()
	return fn()
}

// Listen is net.Listen in the namespace, without Multipath TCP (a SYN that
// carries MPTCP gets no ENO offer). address must hold an IP literal or no host.
func (n *Namespace) Listen(network, address string) (ln net.Listener, err error) {
	err = n.Do(func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), network, address)
		return err
	})
	return ln, err
}

// ListenPacket is net.ListenPacket in the namespace.
func (n *Namespace) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = n.Do(func() error {
		c, err = net.ListenPacket(network, address)
		return err
	})
	return c, err
}

// Dial connects from the namespace, without Multipath TCP. address must hold an
// IP literal: names are resolved on other threads.
func (n *Namespace) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialFrom(ctx, network, nil, address)
}

// DialFrom is Dial with a local address; nil leaves the choice to the kernel.
func (n *Namespace) DialFrom(ctx context.Context, network string, local net.Addr, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		d := net.Dialer{LocalAddr: local}
		d.SetMultipathTCP(false)
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// DialBound is Dial from a port of ip that is taken before the connection is
// opened, so that local is known also when that fails.
func (n *Namespace) DialBound(ctx context.Context, network string, ip netip.Addr, address string) (c net.Conn, local netip.AddrPort, err error) {
	bind := func(fd int) error {
		var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: ip.As16()}
		if ip.Is4() {
			sa = &unix.SockaddrInet4{Addr: ip.As4()}
		}
		if err := unix.Bind(fd, sa); err != nil {
			return os.NewSyscallError("bind", err)
		}
		sa, err := unix.Getsockname(fd)
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			local = netip.AddrPortFrom(ip, uint16(sa.Port))
		case *unix.SockaddrInet6:
			local = netip.AddrPortFrom(ip, uint16(sa.Port))
		}
		return os.NewSyscallError("getsockname", err)
	}
	err = n.Do(func() error {
		d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) (err error) {
			cerr := rc.Control(func(fd uintptr) { err = bind(int(fd)) })
			return errors.Join(cerr, err)
		}}
		d.SetMultipathTCP(false)
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, local, err
}

// Listens reports whether a socket of the namespace listens on a TCP port, of
// IPv4 or IPv6. Unlike a connection it does not disturb the server.
func (n *Namespace) Listens(port int) (found bool, err error) {
	err = n.Do(func() error {
		for _, table := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + table)
			if err != nil {
				return fmt.Errorf("lab: sockets of %s: %w", n.short, err)
			}
			for _, l := range strings.Split(string(b), "\n") {
				const listen = "0A" // TCP_LISTEN
				if f := strings.Fields(l); len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && f[3] == listen {
					found = true
				}
			}
		}
		return nil
	})
	return found, err
}

// Sysctl writes a value to the namespace's copy of a sysctl, named by its path
// below /proc/sys, for instance "net/ipv4/tcp_ecn".
func (n *Namespace) Sysctl(path, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0o644); err != nil {
			return fmt.Errorf("lab: sysctl in %s: %w", n.short, err)
		}
		return nil
	})
}

// ReadSysctl returns the namespace's value of a sysctl, without the newline.
func (n *Namespace) ReadSysctl(path string) (v string, err error) {
	err = n.Do(func() error {
		b, err := os.ReadFile(filepath.Join("/proc/sys", path))
		if err != nil {
			return fmt.Errorf("lab: sysctl in %s: %w", n.short, err)
		}
		v = strings.TrimSpace(string(b))
		return nil
	})
	return v, err
}

// TCPCounters returns the namespace's Tcp, TcpExt and IpExt counters by name,
// as /proc/net/snmp and /proc/net/netstat give them, for instance
// "TcpExt.TCPPAWSEstabRejected".
func (n *Namespace) TCPCounters() (map[string]int64, error) {
	m := map[string]int64{}
	err := n.Do(func() error {
		for _, file := range []string{"/proc/thread-self/net/snmp", "/proc/thread-self/net/netstat"} {
			b, err := os.ReadFile(file)
			if err != nil {
				return fmt.Errorf("lab: counters of %s: %w", n.short, err)
			}
			parseCounters(string(b), m)
		}
		return nil
	})
	return m, err
}

// parseCounters reads pairs of lines: a prefix and names, the prefix and values.
func parseCounters(s string, m map[string]int64) {
	lines := strings.Split(s, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		if len(names) != len(values) || len(names) == 0 {
			return
		}
		prefix := strings.TrimSuffix(names[0], ":")
		for j := 1; j < len(names); j++ {
			var v int64
			if _, err := fmt.Sscan(values[j], &v); err == nil {
				m[prefix+"."+names[j]] = v
			}
		}
	}
}
