package bench

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// peerKind is another way to protect connections between two hosts, which the
// Peers suite compares the program with.
type peerKind struct {
	// program must be in PATH; empty: none is needed.
	program string
	// open brings the protection up between two hosts, until they go.
	open func(ctx context.Context, a, b *lab.Iface) (transport, error)
}

// peerVariants of the Peers suite besides those of Wire.
var peerVariants = []wireVariant{
	{name: "go-tls", over: &peerKind{open: func(_ context.Context, a, b *lab.Iface) (transport, error) { return overTLS(a, b, false) }}},
	{name: "go-tls-resumed", over: &peerKind{open: func(_ context.Context, a, b *lab.Iface) (transport, error) { return overTLS(a, b, true) }}},
	{name: "stunnel", over: &peerKind{program: "stunnel", open: overStunnel}},
	{name: "wireguard-go", over: &peerKind{program: "wireguard-go", open: overWireGuard}},
}

// Peers measures what Wire does between hosts, and in the same rotation every other
// protection of connections that is installed. It says through o.Log what is not.
func Peers(ctx context.Context, o WireOptions) ([]WireRow, error) {
	vs := append([]wireVariant(nil), wireVariants...)
	for _, v := range peerVariants {
		if p := v.over.program; p != "" {
			if _, err := exec.LookPath(p); err != nil {
				if o.Log != nil {
					o.Log(fmt.Sprintf("%s is left out: not in PATH", p))
				}
				continue
			}
		}
		vs = append(vs, v)
	}
	return rotate(ctx, o, vs)
}

// selfSigned makes a certificate for P-256, in DER.
func selfSigned() (cert []byte, key *ecdsa.PrivateKey, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"bench"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	cert, err = x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	return cert, key, err
}

// overTLS is TLS 1.3 of Go's standard library inside the applications, with
// AES-128-GCM, the certificate verified.
func overTLS(a, b *lab.Iface, resume bool) (transport, error) {
	der, key, err := selfSigned()
	if err != nil {
		return transport{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return transport{}, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	server := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}}}
	client := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: "bench"}
	if resume {
		client.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	plain := overTCP(a, b)
	return transport{
		client: plain.client,
		listen: func() (net.Listener, error) {
			ln, err := plain.listen()
			if err != nil {
				return nil, err
			}
			return tls.NewListener(ln, server), nil
		},
		dial: func(ctx context.Context, ln net.Listener) (net.Conn, error) {
			c, err := plain.dial(ctx, ln)
			if err != nil {
				return nil, err
			}
			t := tls.Client(c, client)
			if err := t.HandshakeContext(ctx); err != nil {
				c.Close()
				return nil, err
			}
			return t, nil
		},
	}, nil
}

// overStunnel is a pair of stunnel processes, one on each host; applications
// speak plain TCP to the one on their own.
func overStunnel(ctx context.Context, a, b *lab.Iface) (transport, error) {
	dir, err := os.MkdirTemp("", "tcpcrypt-bench")
	if err != nil {
		return transport{}, err
	}
	a.NS.Lab().AtClose(func() error { return os.RemoveAll(dir) })
	der, key, err := selfSigned()
	if err != nil {
		return transport{}, err
	}
	pkcs, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return transport{}, err
	}
	pair := append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	if err := os.WriteFile(filepath.Join(dir, "pair.pem"), pair, 0o600); err != nil {
		return transport{}, err
	}
	const entry, tunnel, app = 4001, 4002, 4003
	start := func(host *lab.Iface, name, service string) error {
		conf := filepath.Join(dir, name+".conf")
		text := "foreground = yes\npid =\ndebug = 3\n[bench]\n" + service
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			return err
		}
		return host.NS.Command(ctx, "stunnel", conf).Start()
	}
	// In network namespaces of their own both hosts have a loopback interface.
	for _, host := range []*lab.Iface{a, b} {
		if err := loopbackUp(host.NS); err != nil {
			return transport{}, err
		}
	}
	if err := start(b, "server", fmt.Sprintf("accept = %v:%d\nconnect = 127.0.0.1:%d\ncert = %s/pair.pem\nsslVersionMin = TLSv1.3\n", b.Addr4(), tunnel, app, dir)); err != nil {
		return transport{}, err
	}
	if err := start(a, "client", fmt.Sprintf("client = yes\naccept = 127.0.0.1:%d\nconnect = %v:%d\nsslVersionMin = TLSv1.3\n", entry, b.Addr4(), tunnel)); err != nil {
		return transport{}, err
	}
	if err := listens(ctx, b.NS, tunnel); err != nil {
		return transport{}, fmt.Errorf("stunnel: %w", err)
	}
	if err := listens(ctx, a.NS, entry); err != nil {
		return transport{}, fmt.Errorf("stunnel: %w", err)
	}
	return transport{
		client: a.NS,
		listen: func() (net.Listener, error) {
			return b.NS.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", app))
		},
		dial: func(ctx context.Context, _ net.Listener) (net.Conn, error) {
			var d net.Dialer
			d.SetMultipathTCP(false)
			return d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", entry))
		},
	}, nil
}

func loopbackUp(ns *lab.Namespace) error {
	lo, err := ns.Netlink().LinkByName("lo")
	if err != nil {
		return err
	}
	return ns.Netlink().LinkSetUp(lo)
}

// listens waits until a server listens on a port of its host.
func listens(ctx context.Context, ns *lab.Namespace, port int) error {
	return eventually(ctx, func() error {
		ok, err := ns.Listens(port)
		if err == nil && !ok {
			err = fmt.Errorf("nothing listens on port %d", port)
		}
		return err
	})
}

// eventually calls fn until it succeeds, for ten seconds.
func eventually(ctx context.Context, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// overWireGuard is a tunnel between two wireguard-go processes, one on each
// host, that carries TCP.
func overWireGuard(ctx context.Context, a, b *lab.Iface) (transport, error) {
	type side struct {
		host  *lab.Iface
		dev   string
		inner netip.Addr
		key   *ecdh.PrivateKey
	}
	tag := strings.ReplaceAll(a.NS.Lab().Name(), "-", "")
	sides := []*side{
		{host: a, dev: "wga" + tag[max(0, len(tag)-10):], inner: netip.MustParseAddr("10.254.0.1")},
		{host: b, dev: "wgb" + tag[max(0, len(tag)-10):], inner: netip.MustParseAddr("10.254.0.2")},
	}
	for _, s := range sides {
		var err error
		if s.key, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return transport{}, err
		}
	}
	const port = 51820
	for i, s := range sides {
		cmd := s.host.NS.Command(ctx, "wireguard-go", "-f", s.dev)
		cmd.Env = append(os.Environ(), "LOG_LEVEL=error")
		if err := cmd.Start(); err != nil {
			return transport{}, err
		}
		other := sides[1-i]
		err := configureWireGuard(ctx, s.dev, fmt.Sprintf("set=1\nprivate_key=%s\nlisten_port=%d\npublic_key=%s\nendpoint=%v:%d\nallowed_ip=%v/32\n\n",
			hex.EncodeToString(s.key.Bytes()), port, hex.EncodeToString(other.key.PublicKey().Bytes()), other.host.Addr4(), port, other.inner))
		if err != nil {
			return transport{}, fmt.Errorf("wireguard-go on %s: %w", s.host.NS.ShortName(), err)
		}
		nl := s.host.NS.Netlink()
		link, err := nl.LinkByName(s.dev)
		if err != nil {
			return transport{}, err
		}
		addr, err := netlink.ParseAddr(s.inner.String() + "/24")
		if err != nil {
			return transport{}, err
		}
		if err := errors.Join(nl.AddrAdd(link, addr), nl.LinkSetMTU(link, s.host.MTU-80), nl.LinkSetUp(link)); err != nil {
			return transport{}, err
		}
	}
	return tcpTo(a.NS, b.NS, sides[1].inner), nil
}

// configureWireGuard speaks the cross-platform userspace configuration protocol
// to the process that runs a device, as soon as it listens.
func configureWireGuard(ctx context.Context, dev, request string) error {
	var c net.Conn
	err := eventually(ctx, func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, "unix", filepath.Join("/var/run/wireguard", dev+".sock"))
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	reply := make([]byte, 4096)
	n, err := c.Read(reply)
	if err != nil {
		return err
	}
	if r := strings.TrimSpace(string(reply[:n])); r != "errno=0" {
		return fmt.Errorf("it answers %q", r)
	}
	return nil
}
