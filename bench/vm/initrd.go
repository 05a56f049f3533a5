package vm

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Modules are the kernel modules that guests load, as far as the kernel has
// them as modules: drivers of the cards, the TAP device, what the guard hangs
// on, VLANs, bonds, and diagnosis of sockets.
var Modules = []string{
	"dca", "i2c-algo-bit", "igb", "failover", "net_failover", "virtio_net", "e1000e", "vmxnet3",
	"tun", "sch_ingress", "nf_defrag_ipv4", "nf_defrag_ipv6", "cls_bpf", "inet_diag", "tcp_diag", "xsk_diag",
	"llc", "stp", "garp", "mrp", "8021q", "tls", "bonding",
}

// Paths in the guest.
const (
	ProgramPath = "/tcpcrypt"
	ModulesPath = "/modules"
)

// Initrd writes the guest's file system to path: the agent as its first
// process, the program, and the modules of the image.
func Initrd(path string, i *Image, agent, program string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := newArchive(f)
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", ModulesPath[1:]} {
		w.add(dir, fs.ModeDir|0o755, nil)
	}
	w.file("init", 0o755, agent)
	w.file(ProgramPath[1:], 0o755, program)
	modules, err := i.modules()
	if err != nil {
		return err
	}
	for _, m := range modules {
		w.file(filepath.Join(ModulesPath[1:], filepath.Base(m)), 0o644, m)
	}
	if err := w.close(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Close()
}

// modules are the files of Modules.
func (i *Image) modules() ([]string, error) {
	var out []string
	err := filepath.WalkDir(i.Modules, func(path string, d fs.DirEntry, err error) error {
		name, _, isModule := strings.Cut(filepath.Base(path), ".ko")
		if err == nil && isModule && slices.Contains(Modules, name) {
			out = append(out, path)
		}
		return err
	})
	return out, err
}

// archive writes a cpio archive of the kind that the kernel unpacks ("newc").
type archive struct {
	w     *bufio.Writer
	inode int
	size  int
	err   error
}

func newArchive(w io.Writer) *archive { return &archive{w: bufio.NewWriter(w)} }

func (a *archive) write(b []byte) {
	if a.err != nil {
		return
	}
	_, a.err = a.w.Write(b)
	a.size += len(b)
}

// pad fills up to a multiple of four bytes.
func (a *archive) pad() { a.write(make([]byte, -a.size&3)) }

func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	a.inode++
	kind := 0o100000 // S_IFREG
	if mode.IsDir() {
		kind = 0o040000 // S_IFDIR
	}
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
	// rdevmajor, rdevminor, namesize, check
	a.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, kind|int(mode.Perm()), 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0))
	a.write(append([]byte(name), 0))
	a.pad()
	a.write(data)
	a.pad()
}

// file adds the content of a file of the host.
func (a *archive) file(name string, mode fs.FileMode, path string) {
	data, err := os.ReadFile(path)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.add(name, mode, data)
}

func (a *archive) close() error {
	a.add("TRAILER!!!", 0, nil)
	if a.err == nil {
		a.err = a.w.Flush()
	}
	return a.err
}
