package doctor

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/safchain/ethtool"
)

// change is something that Apply can carry out and that its undo takes back.
type change struct {
	command, undo string
	apply         func(Source) error
}

// propose makes c what mends the finding.
func (f *Finding) propose(c *change) {
	f.Mend, f.Undo, f.Safe, f.change = c.command, c.undo, true, c
}

// Apply carries out what mends the finding, which must be Safe.
func (f *Finding) Apply() error {
	if f.change == nil {
		return fmt.Errorf("%s of %s: not safe to change without a human", f.Check, f.Subject)
	}
	if err := f.change.apply(System); err != nil {
		return fmt.Errorf("%s: %w", f.Mend, err)
	}
	return nil
}

// short are the names that `ethtool -K` takes, by the kernel's.
var short = map[string]string{"rx-lro": "lro", "rx-gro-hw": "rx-gro-hw", "rx-vlan-hw-parse": "rxvlan"}

func feature(iface, name string, from, to bool) *change {
	command := func(on bool) string {
		word := "off"
		if on {
			word = "on"
		}
		return fmt.Sprintf("ethtool -K %s %s %s", iface, short[name], word)
	}
	return &change{command(to), command(from), func(Source) error {
		tool, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer tool.Close()
		return tool.Change(iface, map[string]bool{name: to})
	}}
}

func sysctl(name, from, to string) *change {
	command := func(value string) string { return fmt.Sprintf("sysctl -w %s=%s", name, value) }
	return &change{command(to), command(from), func(s Source) error {
		return write(s.proc("sys", strings.ReplaceAll(name, ".", "/")), to)
	}}
}

func sysfs(path, from, to string) *change {
	command := func(value string) string { return fmt.Sprintf("echo %s > /sys/%s", value, path) }
	return &change{command(to), command(from), func(s Source) error { return write(s.sys(path), to) }}
}

func affinity(irq int, from, to string) *change {
	command := func(value string) string { return fmt.Sprintf("echo %s > /proc/irq/%d/smp_affinity_list", value, irq) }
	return &change{command(to), command(from), func(s Source) error {
		return write(s.proc("irq", fmt.Sprint(irq), "smp_affinity_list"), to)
	}}
}

func write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	if closed := f.Close(); err == nil {
		err = closed
	}
	return err
}

func loadModule(name string) *change {
	return &change{"modprobe " + name, "modprobe -r " + name, func(Source) error {
		if out, err := exec.Command("modprobe", name).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	}}
}
