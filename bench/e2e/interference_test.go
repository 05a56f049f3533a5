package e2e

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// The host's own firewall follows encrypted connections in plaintext, on the
// interface, and sees each packet once: what it drops and lets through is what
// it would without the daemon.
func TestHostFirewall(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
		ip, _ := b.addr(v6)
		ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		port := uint16(ln.Addr().(*net.TCPAddr).Port)
		nf := newNetfilter(t, b.path.B.NS, nftables.TableFamilyINet)
		in := nf.chain("in", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
		out := nf.chain("out", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
		eth := b.path.B.Name
		// Both streams begin with the canary, behind 32 bytes of TCP header.
		clear := append(protocol(unix.IPPROTO_TCP), transport(32, canary[:16])...)
		nf.rule(in, tracked(expr.CtStateBitINVALID), dropped())
		nf.rule(in, into(eth), clear, accepted())
		nf.rule(in, into(eth), tracked(expr.CtStateBitESTABLISHED), accepted())
		nf.rule(in, into(eth), tracked(expr.CtStateBitNEW), toPort(port), accepted())
		nf.rule(out, tracked(expr.CtStateBitINVALID), dropped())
		nf.rule(out, outOf(eth), clear, accepted())
		nf.rule(out, outOf(eth), tracked(expr.CtStateBitESTABLISHED), accepted())
		nf.rule(out, protocol(unix.IPPROTO_TCP), dropped())
		nf.apply()
		for _, s := range [][2]string{{"tcp_be_liberal", "0"}, {"tcp_loose", "0"}} {
			if err := b.path.B.NS.Sysctl("net/netfilter/nf_conntrack_"+s[0], s[1]); err != nil {
				t.Fatal(err)
			}
		}
		a, z := b.both()
		before, err := b.path.B.NS.TCPCounters()
		if err != nil {
			t.Fatal(err)
		}
		client, server, err := b.connectTo(ln, ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		defer server.Close()
		b.sameSession(a, z)
		if err := carry(client, server, stream(1, 2<<20), stream(2, 2<<20)); err != nil {
			t.Fatal(err)
		}
		b.noFlows(a)
		b.noFlows(z)
		after, err := b.path.B.NS.TCPCounters()
		if err != nil {
			t.Fatal(err)
		}
		ni, no := nf.counts(in), nf.counts(out)
		if ni[0] != 0 || ni[1] == 0 || ni[3] != 1 || no[0] != 0 || no[1] == 0 || no[3] != 0 {
			t.Errorf("packets inwards (invalid, plaintext, established, new) %v, outwards (invalid, plaintext, established, other) %v", ni, no)
		}
		// Merged segments count as one packet here and there alike.
		if got, want := int64(ni[1]+ni[2]+ni[3]), after["Tcp.InSegs"]-before["Tcp.InSegs"]; got > want {
			t.Errorf("the firewall saw %d packets, TCP got %d segments", got, want)
		}
		b.encryptedOnly(a, z, 1)
	})
}

// A qdisc on the interface neither sees nor shapes what encrypted connections
// send; it does everything else.
func TestQdisc(t *testing.T) {
	const excluded = "7007"
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	nl := b.path.A.NS.Netlink()
	dev, err := nl.LinkByName(b.path.A.Name)
	if err != nil {
		t.Fatal(err)
	}
	attrs := netlink.QdiscAttrs{LinkIndex: dev.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	fq := netlink.NewFq(attrs)
	fq.Pacing = 1
	// Each of these that the kernel has; one is in all of them.
	tried := 0
	for _, q := range []netlink.Qdisc{fq, &netlink.Tbf{QdiscAttrs: attrs, Rate: 1 << 30, Limit: 1 << 20, Buffer: 1 << 20}} {
		if err := nl.QdiscReplace(q); err != nil {
			if errors.Is(err, unix.ENOENT) {
				t.Logf("the kernel has no %s", q.Type())
				continue
			}
			t.Fatal(err)
		}
		tried++
		sent := func() uint64 {
			qs, err := nl.QdiscList(dev)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range qs {
				if k.Type() == q.Type() && k.Attrs().Statistics != nil {
					return k.Attrs().Statistics.Basic.Bytes
				}
			}
			t.Fatalf("no %s on the interface", q.Type())
			return 0
		}
		const n = 3 << 20
		a, z := b.both("--exclude-ports", excluded)
		before := sent()
		// BBR paces; without fq on its way it does so by itself.
		if err := b.exchange(false, stream(1, n), nil, func() { b.sameSession(a, z) }); err != nil {
			t.Fatal(err)
		}
		if d := sent() - before; d > n/10 {
			t.Errorf("%s: %d bytes of an encrypted connection went through it", q.Type(), d)
		}
		before = sent()
		ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), excluded))
		if err != nil {
			t.Fatal(err)
		}
		client, server, err := b.connectTo(ln, ln.Addr().String())
		ln.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := carry(client, server, stream(1, n), nil); err != nil {
			t.Fatal(err)
		}
		client.Close()
		server.Close()
		if d := sent() - before; d < n {
			t.Errorf("%s: %d bytes of a plain connection of %d went through it", q.Type(), d, n)
		}
		if err := errors.Join(a.Stop(), z.Stop()); err != nil {
			t.Fatal(err)
		}
	}
	if tried == 0 {
		t.Error("the kernel has no qdisc to try")
	}
}

// sniffed counts what a packet socket on an interface sees, as tcpdump would.
type sniffed struct {
	in, out           int // packets with data
	plainIn, plainOut int // of these with the canary
}

// sniff watches an interface until the function that it returns is called.
func sniff(t *testing.T, ns *lab.Namespace, name string) func() sniffed {
	t.Helper()
	fd := -1
	err := ns.Do(func() error {
		i, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: i.Index})) // ETH_P_ALL
	})
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan sniffed)
	go func() {
		defer unix.Close(fd)
		var s sniffed
		buf := make([]byte, 70000)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				select {
				case <-stop:
					done <- s
					return
				default:
					continue
				}
			}
			plain := bytes.Contains(buf[:n], canary[:24])
			if n < 200 {
				continue
			}
			if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING {
				s.out++
				if plain {
					s.plainOut++
				}
			} else {
				s.in++
				if plain {
					s.plainIn++
				}
			}
		}
	}()
	return func() sniffed {
		close(stop)
		return <-done
	}
}

// What tcpdump sees of an encrypted connection: on the interface the plaintext
// that comes in, and nothing of what leaves; on the TAP the plaintext of both
// directions; on the wire ciphertext alone.
func TestSniffing(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
		a, z := b.both()
		st, err := a.Status(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		nic, tap := sniff(t, b.path.A.NS, b.path.A.Name), sniff(t, b.path.A.NS, st.Inner)
		wire := sniff(t, b.path.Mid, b.path.MidA.Name)
		if err := b.exchange(v6, stream(1, 2<<20), stream(2, 2<<20), func() { b.sameSession(a, z) }); err != nil {
			t.Fatal(err)
		}
		n, i, w := nic(), tap(), wire()
		if n.plainIn == 0 || n.in != n.plainIn || n.out != 0 {
			t.Errorf("the interface shows %+v", n)
		}
		// On the TAP, "out" is what the kernel sends.
		if i.plainIn == 0 || i.in != i.plainIn || i.plainOut == 0 || i.out != i.plainOut {
			t.Errorf("the TAP shows %+v", i)
		}
		if w.in == 0 || w.out == 0 || w.plainIn+w.plainOut != 0 {
			t.Errorf("the wire shows %+v", w)
		}
	})
}

// An SSH session to the host goes on when the daemon starts and stops: one that
// is older than the daemon, one of an excluded port, and one with a client that
// has no daemon.
func TestSSHAcrossDaemon(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	s := b.sshServer(false)
	var open []*sshSession
	login := func(name string) {
		t.Helper()
		o := s.session(name)
		open = append(open, o)
		o.talk("logged in")
	}
	all := func(when string) {
		t.Helper()
		for _, o := range open {
			o.talk(when)
		}
	}
	login("older than the daemon")
	z := b.daemon(b.path.B, "--exclude-ports", "22")
	all("attached")
	login("client without daemon")
	a := b.daemon(b.path.A, "--exclude-ports", "2222")
	all("both attached")
	login("excluded port")
	if err := z.Stop(); err != nil {
		t.Fatal(err)
	}
	all("detached")
	z = b.daemon(b.path.B, "--exclude-ports", "22")
	all("attached again")
	if err := z.Kill(); err != nil {
		t.Fatal(err)
	}
	all("killed")
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	all("both gone")
}

// While a device is configured for seconds, on which other requests to the kernel
// wait, the daemon works on and is not taken for hung.
func TestConfigurationTakesLong(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.listenOption(b.path.B.Addr4().String(), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	client, server, err := b.connectTo(ln, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	defer server.Close()
	release, err := b.path.MidA.HoldConfiguration(20 * time.Second)
	if errors.Is(err, unix.ENOSYS) {
		t.Skip("the kernel has no userfaultfd")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	// Longer than the daemons are without such a request, and than the BPF
	// programs wait for a heartbeat.
	for end := time.After(3 * time.Second); end != nil; {
		if err := swap(client, server, stream(1, 10_000), stream(2, 10_000)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-end:
			end = nil
		default:
		}
	}
	another, accepted, err := b.connectTo(ln, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer another.Close()
	defer accepted.Close()
	if err := carry(another, accepted, stream(3, 10_000), stream(4, 10_000)); err != nil {
		t.Error(err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*daemon.Daemon{a, z} {
		for name, n := range b.stats(d).Counters {
			if strings.HasSuffix(name, "_stale") && n > 0 {
				t.Errorf("%s %d", name, n)
			}
		}
	}
	if err := carry(client, server, stream(5, 10_000), stream(6, 10_000)); err != nil {
		t.Error(err)
	}
	b.idle(a, z)
	b.encryptedOnly(a, z, 2)
}
