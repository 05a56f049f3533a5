package doctor

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// Source says where facts are read from: file systems that a test may replace.
type Source struct {
	Proc string // "/proc"
	Sys  string // "/sys"
}

// System is the machine that the process runs on.
var System = Source{Proc: "/proc", Sys: "/sys"}

func (s Source) proc(path ...string) string {
	return filepath.Join(append([]string{s.Proc}, path...)...)
}
func (s Source) sys(path ...string) string { return filepath.Join(append([]string{s.Sys}, path...)...) }

// text is the trimmed content of a file, empty if it cannot be read.
func text(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func number(path string, missing int) int {
	n, err := strconv.Atoi(text(path))
	if err != nil {
		return missing
	}
	return n
}

// Options say what is gathered.
type Options struct {
	// Interface is the one to examine; empty: all that could be the daemon's.
	Interface string
	// Try attaches a program and binds sockets to Interface, which many
	// drivers answer with a reset of the link.
	Try        bool
	WorkerCPUs []int
}

// Gather reads the facts of this machine in the network namespace of the
// calling thread. Only an interface that does not exist, or netlink that does
// not answer, is an error: what cannot be read is left out.
func Gather(o Options) (Facts, error) {
	f := Facts{Machine: System.machine(), WorkerCPUs: o.WorkerCPUs}
	f.Machine.TUN, f.Machine.AFXDP, f.Machine.BPF = tryMachine()
	var err error
	f.Interfaces, err = System.interfaces(o)
	return f, err
}

// machine reads what procfs and sysfs tell.
func (s Source) machine() Machine {
	m := Machine{
		Kernel:  text(s.proc("sys/kernel/osrelease")),
		THP:     selected(text(s.sys("kernel/mm/transparent_hugepage/enabled"))),
		JIT:     text(s.proc("sys/net/core/bpf_jit_enable")),
		Cgroup2: s.mounted("cgroup2"),
		BPFFS:   s.mounted("bpf"),
		CPUs:    cpuList(text(s.sys("devices/system/cpu/online"))),
	}
	_, _ = fmt.Sscanf(m.Kernel, "%d.%d", &m.Major, &m.Minor)
	_, err := os.Stat(s.sys("kernel/btf/vmlinux"))
	m.BTF = err == nil
	for key, value := range fields(s.proc("meminfo")) {
		n, _ := strconv.ParseUint(strings.TrimSuffix(value, " kB"), 10, 64)
		switch key {
		case "HugePages_Total":
			m.HugeTotal = int(n)
		case "HugePages_Free":
			m.HugeFree = int(n)
		case "Hugepagesize":
			m.HugePageSize = n << 10
		}
	}
	for key, value := range fields(s.proc("cpuinfo")) {
		if key == "flags" || key == "Features" {
			for _, flag := range strings.Fields(value) {
				if slices.Contains([]string{"aes", "pclmulqdq", "pmull", "vaes", "vpclmulqdq", "avx512f"}, flag) {
					m.CPUFlags = append(m.CPUFlags, flag)
				}
			}
			slices.Sort(m.CPUFlags)
		}
	}
	m.Capabilities, _ = strconv.ParseUint(fields(s.proc("self/status"))["CapEff"], 16, 64)
	m.OtherUsers = xdp.OtherUsers(text(s.proc("self/uid_map")))
	m.MemlockSoft, m.MemlockHard = s.memlock()
	m.IRQBalance = s.runs("irqbalance")
	return m
}

// fields reads lines of "key: value"; the first of a key counts.
func fields(path string) map[string]string {
	out := make(map[string]string)
	for line := range strings.Lines(text(path)) {
		key, value, ok := strings.Cut(line, ":")
		key = strings.TrimSpace(key)
		if _, again := out[key]; ok && !again {
			out[key] = strings.TrimSpace(value)
		}
	}
	return out
}

// selected is the choice in brackets of a sysfs file.
func selected(s string) string {
	_, rest, ok := strings.Cut(s, "[")
	if !ok {
		return s
	}
	choice, _, _ := strings.Cut(rest, "]")
	return choice
}

func (s Source) mounted(fstype string) string {
	for line := range strings.Lines(text(s.proc("self/mounts"))) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == fstype {
			return f[1]
		}
	}
	return ""
}

func (s Source) memlock() (soft, hard uint64) {
	for line := range strings.Lines(text(s.proc("self/limits"))) {
		rest, ok := strings.CutPrefix(line, "Max locked memory")
		f := strings.Fields(rest)
		if !ok || len(f) < 2 {
			continue
		}
		for i, p := range []*uint64{&soft, &hard} {
			n, err := strconv.ParseUint(f[i], 10, 64)
			if err != nil {
				n = Unlimited
			}
			*p = n
		}
	}
	return soft, hard
}

// runs reports whether a process of that name runs.
func (s Source) runs(name string) bool {
	names, _ := filepath.Glob(s.proc("[0-9]*", "comm"))
	return slices.ContainsFunc(names, func(path string) bool { return text(path) == name })
}

// cpuList reads a list of the kernel's kind: 0-3,8.
func cpuList(list string) []int {
	var cpus []int
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		first, last, isRange := strings.Cut(part, "-")
		from, err := strconv.Atoi(first)
		if err != nil {
			continue
		}
		to := from
		if isRange {
			if to, err = strconv.Atoi(last); err != nil {
				continue
			}
		}
		for cpu := from; cpu <= to && cpu-from < 1<<14; cpu++ {
			cpus = append(cpus, cpu)
		}
	}
	return cpus
}

// tryMachine tries what only trying tells.
func tryMachine() (tun, afxdp string, bpf map[string]string) {
	if fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		tun = "/dev/net/tun: " + err.Error()
	} else {
		_ = unix.Close(fd)
	}
	if fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		afxdp = err.Error()
	} else {
		_ = unix.Close(fd)
	}
	bpf = make(map[string]string)
	for name, err := range map[string]error{
		"XDP programs":      features.HaveProgramType(ebpf.XDP),
		"tc programs":       features.HaveProgramType(ebpf.SchedCLS),
		"XSKMAP":            features.HaveMapType(ebpf.XSKMap),
		"redirect from XDP": features.HaveProgramHelper(ebpf.XDP, asm.FnRedirectMap),
		"redirect from tc":  features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirect),
		"coarse clock":      features.HaveProgramHelper(ebpf.XDP, asm.FnKtimeGetCoarseNs),
	} {
		bpf[name] = ""
		if err != nil {
			bpf[name] = err.Error()
			if errors.Is(err, ebpf.ErrNotSupported) {
				bpf[name] = "the kernel does not have it"
			}
		}
	}
	return tun, afxdp, bpf
}

// lines yields the lines of a file, none if it cannot be read.
func lines(path string) func(func(string) bool) {
	return func(yield func(string) bool) {
		f, err := os.Open(path)
		if err != nil {
			return
		}
		defer f.Close()
		scan := bufio.NewScanner(f)
		scan.Buffer(nil, 1<<20)
		for scan.Scan() {
			if !yield(scan.Text()) {
				return
			}
		}
	}
}
