package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

// need skips a test whose application is not installed on this machine.
func need(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("%s is not installed", n)
		}
	}
}

// addr returns the server's address, and its form in a URL.
func (b *bed) addr(v6 bool) (netip.Addr, string) {
	if v6 {
		a := b.path.B.Addr6()
		return a, "[" + a.String() + "]"
	}
	a := b.path.B.Addr4()
	return a, a.String()
}

// background starts a server on B that the lab ends, and waits for its port.
func (b *bed) background(port int, name string, args ...string) *lab.Cmd {
	b.t.Helper()
	cmd := b.path.B.NS.Command(b.ctx, name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	if port == 0 {
		return cmd
	}
	b.eventually(name+" listens", func() (string, bool) {
		ok, err := b.path.B.NS.Listens(port)
		if err != nil {
			return err.Error(), false
		}
		return out.String(), ok
	})
	return cmd
}

// run runs a client on A and returns its output.
func (b *bed) run(name string, args ...string) []byte {
	b.t.Helper()
	cmd := b.path.A.NS.Command(b.ctx, name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, errs.Bytes(), out)
	}
	return out
}

// encryptedOnly waits until so many connections that were encrypted have ended, the
// last ACK of which may come after their applications have, and checks that no other
// was made.
func (b *bed) encryptedOnly(a, z *daemon.Daemon, least uint64) {
	b.t.Helper()
	for _, d := range []*daemon.Daemon{a, z} {
		b.eventually(fmt.Sprintf("%d encrypted connections ended", least), func() (string, bool) {
			var closed, other uint64
			st := b.stats(d)
			for r, n := range st.Reasons {
				switch r {
				case fastpath.ReasonClosed, fastpath.ReasonLocalReset, fastpath.ReasonPeerReset:
					closed += n
				default:
					other += n
				}
			}
			if other != 0 {
				b.t.Fatalf("not only encrypted connections ended: %v", st.Reasons)
			}
			return fmt.Sprint(st.Reasons), closed >= least
		})
	}
	if plain, _ := b.wire.seen(); plain != 0 {
		b.t.Errorf("%d segments with plaintext on the wire", plain)
	}
}

func TestApplications(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		t.Run("nginx-curl", func(t *testing.T) { testNginx(t, v6) })
		t.Run("iperf3", func(t *testing.T) { testIperf(t, v6) })
		t.Run("ssh", func(t *testing.T) { testSSH(t, v6) })
		t.Run("half-close", func(t *testing.T) { testHalfClose(t, v6) })
	})
}

func testNginx(t *testing.T, v6 bool) {
	need(t, "nginx", "curl")
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	data := stream(5, 30<<20)
	if err := os.WriteFile(filepath.Join(dir, "file"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	_, url := b.addr(v6)
	conf := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/error.log;
events {}
http { access_log off; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
server { listen %[2]s:8080; root %[1]s; } }`, dir, url)
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	b.background(8080, "nginx", "-c", filepath.Join(dir, "conf"))
	for range 3 {
		got := b.run("curl", "-sS", "--fail", "http://"+url+":8080/file")
		if sha256.Sum256(got) != sha256.Sum256(data) {
			t.Fatalf("curl got %d bytes that differ from the %d served", len(got), len(data))
		}
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 3)
}

func testIperf(t *testing.T, v6 bool) {
	need(t, "iperf3")
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ip, _ := b.addr(v6)
	for i, flags := range [][]string{{"-P", "8"}, {"-R"}, {"--bidir"}} {
		// A server that has not seen the end of a test resets the next one.
		port := 5201 + i
		b.background(port, "iperf3", "-s", "-1", "-B", ip.String(), "-p", strconv.Itoa(port))
		args := append([]string{"-c", ip.String(), "-p", strconv.Itoa(port), "-t", "2", "--connect-timeout", "5000"}, flags...)
		b.run("iperf3", args...)
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 8+1+1+1+2+1)
}

func testSSH(t *testing.T, v6 bool) {
	need(t, "scp")
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	s := b.sshServer(v6)
	out := b.run("ssh", append(append([]string{"-p", sshPort}, s.opts...), s.login, "echo", "hello")...)
	if string(out) != "hello\n" {
		t.Errorf("ssh printed %q", out)
	}
	data := stream(6, 5<<20)
	if err := os.WriteFile(filepath.Join(s.dir, "data"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, url := b.addr(v6)
	user, _, _ := strings.Cut(s.login, "@")
	b.run("scp", append(append([]string{"-P", sshPort}, s.opts...), filepath.Join(s.dir, "data"), user+"@"+url+":"+filepath.Join(s.dir, "copy"))...)
	if got, err := os.ReadFile(filepath.Join(s.dir, "copy")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("scp copied %d bytes, want %d: %v", len(got), len(data), err)
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 2)
}

const sshPort = "2222"

// sshServer is an SSH server on B, with what a client on A needs.
type sshServer struct {
	b     *bed
	dir   string   // of keys and files
	login string   // user@host
	opts  []string // of ssh and scp, but for the port
}

func (b *bed) sshServer(v6 bool) *sshServer {
	b.t.Helper()
	need(b.t, "ssh", "ssh-keygen")
	sshd := "/usr/sbin/sshd"
	if _, err := os.Stat(sshd); err != nil {
		b.t.Skip("sshd is not installed")
	}
	dir := b.t.TempDir()
	for _, key := range []string{"host", "user"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			b.t.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		b.t.Fatal(err)
	}
	me, err := user.Current()
	if err != nil {
		b.t.Fatal(err)
	}
	ip, _ := b.addr(v6)
	conf := fmt.Sprintf("ListenAddress %s\nPort %s\nHostKey %s/host\nAuthorizedKeysFile %s/user.pub\nPidFile none\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nSubsystem sftp internal-sftp\n", ip, sshPort, dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o600); err != nil {
		b.t.Fatal(err)
	}
	port, err := strconv.Atoi(sshPort)
	if err != nil {
		b.t.Fatal(err)
	}
	b.background(port, sshd, "-D", "-e", "-f", filepath.Join(dir, "conf"))
	return &sshServer{b, dir, me.Username + "@" + ip.String(),
		[]string{"-F", "none", "-i", filepath.Join(dir, "user"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"}}
}

// sshSession is a session whose server echoes lines.
type sshSession struct {
	t    *testing.T
	name string
	in   io.Writer
	out  *bufio.Scanner
}

func (s *sshServer) session(name string) *sshSession {
	s.b.t.Helper()
	cmd := s.b.path.A.NS.Command(s.b.ctx, "ssh", append(append([]string{"-p", sshPort}, s.opts...), s.login, "cat")...)
	in, err := cmd.StdinPipe()
	if err != nil {
		s.b.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.b.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.b.t.Fatal(err)
	}
	return &sshSession{s.b.t, name, in, bufio.NewScanner(out)}
}

// talk fails the test unless the session echoes a line.
func (s *sshSession) talk(line string) {
	s.t.Helper()
	if _, err := fmt.Fprintln(s.in, line); err != nil {
		s.t.Fatalf("%s, %s: %v", s.name, line, err)
	}
	if !s.out.Scan() || s.out.Text() != line {
		s.t.Fatalf("%s, %s: the session answered %q: %v", s.name, line, s.out.Text(), s.out.Err())
	}
}

// nc -N closes its sending side and goes on receiving.
func testHalfClose(t *testing.T, v6 bool) {
	need(t, "nc")
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ip, _ := b.addr(v6)
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	up, down := stream(7, 2<<20), stream(8, 3<<20)
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		var got bytes.Buffer
		if _, err = got.ReadFrom(c); err == nil && !bytes.Equal(got.Bytes(), up) {
			err = fmt.Errorf("server got %d bytes before the end of file, want %d", got.Len(), len(up))
		}
		if err == nil {
			_, err = c.Write(down)
		}
		served <- err
	}()
	cmd := b.path.A.NS.Command(b.ctx, "nc", "-N", ip.String(), strconv.Itoa(ln.Addr().(*net.TCPAddr).Port))
	cmd.Stdin = bytes.NewReader(up)
	out, err := cmd.Output()
	if err != nil || !bytes.Equal(out, down) {
		t.Errorf("nc received %d bytes after closing its side, want %d: %v", len(out), len(down), err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	b.noFlows(a)
	b.encryptedOnly(a, z, 1)
}
