package fastpath

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// twoNodes is a machine of two packages with two cores of two threads each:
// CPU n and n+4 are siblings, and node 1 has the odd cores.
func twoNodes() (cpus []cpu) {
	for id := range 8 {
		core := id % 4
		cpus = append(cpus, cpu{id: id, node: core % 2, pkg: core % 2, core: core})
	}
	return cpus
}

func ids(cpus []cpu) (out []int) {
	for _, c := range cpus {
		out = append(out, c.id)
	}
	return out
}

func TestOrder(t *testing.T) {
	for _, c := range []struct {
		node int
		want []int
	}{
		{-1, []int{1, 2, 3, 0, 5, 6, 7, 4}},
		{0, []int{2, 0, 6, 4, 1, 3, 5, 7}},
		{1, []int{1, 3, 5, 7, 2, 0, 6, 4}},
	} {
		if got := ids(order(twoNodes(), c.node)); !reflect.DeepEqual(got, c.want) {
			t.Errorf("node %d: %v, want %v", c.node, got, c.want)
		}
	}
}

func TestPlace(t *testing.T) {
	two := []cpu{{id: 0}, {id: 1, core: 1}}
	for _, c := range []struct {
		name   string
		cfg    HostConfig
		queues int
		cpus   []cpu
		nic    int
		want   placement
		err    string
	}{
		{name: "one queue", queues: 1, cpus: twoNodes(), nic: -1, want: placement{[]int{1}, []bool{true}, []int{0, 2, 3, 4, 5, 6, 7}}},
		{name: "more queues than cores", queues: 16, cpus: twoNodes(), nic: 1,
			want: placement{[]int{1, 3, 5, 7}[:4], []bool{true, true, true, true}, []int{0, 2, 4, 6}}, err: "skip"},
		{name: "node of the NIC", queues: 2, cpus: twoNodes(), nic: 0, want: placement{[]int{2, 0}, []bool{true, true}, []int{1, 3, 4, 5, 6, 7}}},
		{name: "numa", cfg: HostConfig{NUMA: 1}, queues: 8, cpus: twoNodes(), nic: 0, want: placement{[]int{1, 3}, []bool{true, true}, []int{0, 2, 4, 5, 6, 7}}},
		{name: "small machine", queues: 2, cpus: two, nic: -1, want: placement{[]int{-1, -1}, []bool{false, false}, nil}},
		{name: "more workers than CPUs", cfg: HostConfig{Workers: 3}, queues: 4, cpus: two, nic: -1, want: placement{[]int{-1, -1, -1}, make([]bool, 3), nil}},
		{name: "cpus", cfg: HostConfig{CPUs: []int{1}}, queues: 4, cpus: two, nic: -1, want: placement{[]int{1}, []bool{true}, []int{0}}},
		{name: "shared CPU", cfg: HostConfig{CPUs: []int{1}, Workers: 2}, queues: 4, cpus: two, nic: -1, want: placement{[]int{1, 1}, make([]bool, 2), []int{0}}},
		{name: "all CPUs", cfg: HostConfig{CPUs: []int{1, 0}}, queues: 2, cpus: two, nic: -1, want: placement{[]int{1, 0}, []bool{true, true}, nil}},

		{name: "no such CPU", cfg: HostConfig{CPUs: []int{7}}, queues: 1, cpus: two, nic: -1, err: "cpus: CPU 7 is not one that this process may run on (0-1)"},
		{name: "no such node", cfg: HostConfig{NUMA: 2}, queues: 1, cpus: two, nic: -1, err: "numa: node 2 has no CPU that this process may run on"},
		{name: "both", cfg: HostConfig{NUMA: 0, CPUs: []int{0}, Workers: -9}, queues: 1, cpus: two, nic: -1, err: "numa: cpus names the CPUs already, give one of the two"},
		{name: "more workers than queues", cfg: HostConfig{Workers: 3, Interface: "eth0"}, queues: 2, cpus: two, nic: -1,
			err: "workers: 3 are more than the 2 receive queues of eth0, each needs one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "both" {
				c.cfg.Workers = 0
			} else if !strings.Contains(c.name, "numa") && !strings.Contains(c.name, "node") || c.name == "node of the NIC" {
				c.cfg.NUMA = -1
			}
			p, err := place(&c.cfg, c.queues, c.cpus, c.nic)
			switch {
			case c.err == "skip":
				// Cores of the other node come before siblings that share one.
				if err != nil || len(p.cpus) != 4 || p.cpus[0] != 1 || p.cpus[1] != 3 {
					t.Errorf("%+v, %v", p, err)
				}
			case c.err != "":
				if err == nil || err.Error() != c.err {
					t.Errorf("error %v", err)
				}
			case err != nil:
				t.Fatal(err)
			case !reflect.DeepEqual(*p, c.want):
				t.Errorf("%+v, want %+v", *p, c.want)
			}
		})
	}
}

func TestReadCPUs(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := twoNodes()
	for _, c := range want {
		dir := fmt.Sprintf("devices/system/cpu/cpu%d/", c.id)
		write(dir+"topology/core_id", fmt.Sprint(c.core))
		write(dir+"topology/physical_package_id", fmt.Sprint(c.pkg))
		write(dir+fmt.Sprintf("node%d/cpulist", c.node), "")
	}
	write("class/net/eth0/device/numa_node", "1")
	if got := readCPUs(root, []int{0, 1, 2, 3, 4, 5, 6, 7}); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if n := deviceNode(root, "eth0"); n != 1 {
		t.Errorf("node %d of the device", n)
	}
	if n := deviceNode(root, "veth0"); n != -1 {
		t.Errorf("node %d of a virtual device", n)
	}
	if got := readCPUs(filepath.Join(root, "none"), []int{3, 4}); !reflect.DeepEqual(got, []cpu{{id: 3, core: 3}, {id: 4, core: 4}}) {
		t.Errorf("without sysfs: %+v", got)
	}
}
