package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// Status is how a finding is judged.
type Status string

const (
	OK   Status = "ok"
	Warn Status = "warn" // it works, slower or with a trap
	Fail Status = "fail" // the daemon does not start, or does not what it is for
)

// Finding is one thing that was examined.
type Finding struct {
	Check   string `json:"check"`   // which examination, a stable word
	Subject string `json:"subject"` // "machine" or the interface
	Status  Status `json:"status"`
	Found   string `json:"found"`
	Why     string `json:"why,omitempty"`  // why it matters, where it is not ok
	Mend    string `json:"mend,omitempty"` // the command that mends it
	Undo    string `json:"undo,omitempty"` // and the one that takes that back
	// Safe: Apply carries Mend out; it interrupts nothing and Undo takes it
	// back.
	Safe bool `json:"safe"`

	change *change
}

// Worst is the worst status of findings.
func Worst(fs []Finding) Status {
	worst := OK
	for _, f := range fs {
		switch {
		case f.Status == Fail:
			return Fail
		case f.Status == Warn:
			worst = Warn
		}
	}
	return worst
}

// Examine judges facts: first the machine, then each interface. Every check has
// a finding, also where all is well.
func Examine(f Facts) []Finding {
	e := &examiner{subject: "machine"}
	e.machine(&f.Machine)
	for i := range f.Interfaces {
		n := &f.Interfaces[i]
		e.subject = n.Name
		if n.Loopback {
			e.add("device", Fail, "the loopback interface", "connections of a host with itself have no wire to be protected on, and no NIC queues; name the interface of a network", "")
			continue
		}
		if n.NoEthernet {
			e.add("device", Fail, fmt.Sprintf("packets without Ethernet header (%s)", n.Driver), "the program works on Ethernet frames; name the interface that the tunnel's own packets use, or another one", "")
			continue
		}
		e.device(n)
		e.modes(n)
		e.programs(n, &f.Machine)
		e.queues(n, &f.Machine)
		e.placement(n, &f.Machine, f.WorkerCPUs)
		e.features(n)
	}
	return e.findings
}

type examiner struct {
	subject  string
	findings []Finding
}

// add makes a finding; of the last two texts the second is a command.
func (e *examiner) add(check string, s Status, found, why, mend string) *Finding {
	e.findings = append(e.findings, Finding{Check: check, Subject: e.subject, Status: s, Found: found, Why: why, Mend: mend})
	return &e.findings[len(e.findings)-1]
}

func (e *examiner) ok(check, format string, args ...any) {
	e.add(check, OK, fmt.Sprintf(format, args...), "", "")
}

func (e *examiner) machine(m *Machine) {
	e.kernel(m)
	e.privileges(m)
	e.bpf(m)

	if m.AFXDP != "" {
		e.add("af-xdp", Fail, m.AFXDP, "packets of encrypted connections are exchanged over AF_XDP sockets (CONFIG_XDP_SOCKETS)", "")
	} else {
		e.ok("af-xdp", "AF_XDP sockets can be made")
	}
	if m.TUN != "" {
		f := e.add("tun", Fail, m.TUN, "plaintext is exchanged with the kernel over a TAP device (CONFIG_TUN)", "")
		if !strings.HasSuffix(m.TUN, unix.EACCES.Error()) { // which the privileges explain
			f.propose(loadModule("tun"))
		}
	} else {
		e.ok("tun", "TAP devices can be made")
	}
	e.memory(m)
	e.cpu(m)
}

func (e *examiner) kernel(m *Machine) {
	at := func(major, minor int) bool { return m.Major > major || m.Major == major && m.Minor >= minor }
	if !at(6, 6) {
		e.add("kernel", Fail, "Linux "+m.Kernel, "tcx links, which the daemon's tc programs hang on, came with Linux 6.6", "")
		return
	}
	var missing []string
	if !at(6, 11) {
		missing = append(missing, "6.11: transmit checksums by the device or the kernel")
	}
	if !at(6, 17) {
		missing = append(missing, "6.17: larger transmit batches in copy mode")
	}
	if len(missing) > 0 {
		e.add("kernel", Warn, "Linux "+m.Kernel, "later kernels have "+strings.Join(missing, "; "), "")
		return
	}
	e.ok("kernel", "Linux %s", m.Kernel)
}

func (e *examiner) privileges(m *Machine) {
	var missing []string
	for _, c := range xdp.NeededCapabilities {
		if m.Capabilities&(1<<c.Bit) == 0 {
			missing = append(missing, c.Name)
		}
	}
	if len(missing) > 0 {
		e.add("privileges", Fail, "without "+strings.Join(missing, ", "), "the daemon needs them, and so do some of these examinations", "sudo tcpcrypt doctor")
		return
	}
	if m.OtherUsers {
		e.add("privileges", Fail, "root of a user namespace", "BPF programs can be loaded by root of the machine only, and not in a rootless container", "sudo tcpcrypt doctor")
		return
	}
	e.ok("privileges", "CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN")
}

func (e *examiner) bpf(m *Machine) {
	var missing []string
	for _, name := range slices.Sorted(maps.Keys(m.BPF)) {
		if m.BPF[name] != "" {
			missing = append(missing, name+": "+m.BPF[name])
		}
	}
	if len(missing) > 0 {
		e.add("bpf", Fail, strings.Join(missing, "; "), "the diverter and the guard are BPF programs", "")
	} else {
		e.ok("bpf", "%s", strings.Join(slices.Sorted(maps.Keys(m.BPF)), ", "))
	}
	switch m.JIT {
	case "0":
		f := e.add("bpf-jit", Warn, "off", "interpreted programs cost several times as much for every packet", "")
		f.propose(sysctl("net.core.bpf_jit_enable", "0", "1"))
	case "":
		e.ok("bpf-jit", "not known")
	default:
		e.ok("bpf-jit", "on (%s)", m.JIT)
	}
	if m.Cgroup2 == "" {
		e.add("cgroup2", Warn, "not mounted", "the guard's programs at the sockets hang on control groups; the daemon has to make a mount of its own", "mount -t cgroup2 none /sys/fs/cgroup")
	} else {
		e.ok("cgroup2", "%s", m.Cgroup2)
	}
}

// umemPerQueue is about what a queue's packet memory takes at the largest, in
// bytes.
const umemPerQueue = 24576 * 4096

func (e *examiner) memory(m *Machine) {
	switch {
	case m.Capabilities&(1<<unix.CAP_IPC_LOCK) != 0:
		e.ok("memlock", "unlimited by CAP_IPC_LOCK")
	case m.MemlockSoft == Unlimited:
		e.ok("memlock", "unlimited")
	case m.MemlockSoft < umemPerQueue:
		e.add("memlock", Fail, fmt.Sprintf("%d KiB", m.MemlockSoft>>10),
			fmt.Sprintf("packet memory is locked: up to %d MiB for one queue", umemPerQueue>>20), "ulimit -l unlimited   # for a service: LimitMEMLOCK=infinity")
	default:
		e.ok("memlock", "%d MiB", m.MemlockSoft>>20)
	}
	switch {
	case m.HugeFree > 0:
		e.ok("huge-pages", "%d of %d pages of %d MiB free, transparent ones: %s", m.HugeFree, m.HugeTotal, m.HugePageSize>>20, m.THP)
	case m.THP == "" || m.THP == "never":
		f := e.add("huge-pages", Warn, "none reserved, no transparent ones", "with many connections the keys do not fit the TLB in small pages", "")
		if m.THP != "" {
			f.propose(sysfs("kernel/mm/transparent_hugepage/enabled", "never", "madvise"))
		}
	default:
		e.ok("huge-pages", "none reserved, transparent ones: %s", m.THP)
	}
}

func (e *examiner) cpu(m *Machine) {
	has := func(flags ...string) bool {
		return !slices.ContainsFunc(flags, func(f string) bool { return !slices.Contains(m.CPUFlags, f) })
	}
	switch {
	case has("aes", "pclmulqdq"), has("aes", "pmull"):
		e.ok("aes", "%d CPUs, %s", len(m.CPUs), strings.Join(m.CPUFlags, " "))
	default:
		e.add("aes", Warn, "no AES instructions", "AES-GCM in software is many times slower; prefer ChaCha20-Poly1305", "tcpcrypt run --aeads chacha20poly1305 ...")
	}
}
