package fastpath

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// cpu is one CPU that this process may run on.
type cpu struct {
	id, node  int
	pkg, core int
}

// readCPUs describes the given CPUs by what sysfs, mounted at root, tells of
// them. What it does not tell counts as one CPU a core, and node 0.
func readCPUs(root string, ids []int) []cpu {
	cpus := make([]cpu, len(ids))
	for i, id := range ids {
		dir := filepath.Join(root, "devices/system/cpu", fmt.Sprintf("cpu%d", id))
		c := cpu{id: id, core: readInt(filepath.Join(dir, "topology/core_id"), id), pkg: readInt(filepath.Join(dir, "topology/physical_package_id"), 0)}
		if nodes, _ := filepath.Glob(filepath.Join(dir, "node[0-9]*")); len(nodes) > 0 {
			c.node, _ = strconv.Atoi(strings.TrimPrefix(filepath.Base(nodes[0]), "node"))
		}
		cpus[i] = c
	}
	return cpus
}

func readInt(path string, otherwise int) int {
	b, err := os.ReadFile(path)
	if err != nil {
		return otherwise
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return otherwise
	}
	return n
}

// deviceNode returns the NUMA node of a network device, -1 when it has none.
func deviceNode(root, iface string) int {
	return readInt(filepath.Join(root, "class/net", iface, "device/numa_node"), -1)
}

// allowedCPUs are those that the calling thread may run on.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read CPU affinity: %w", err)
	}
	var ids []int
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			ids = append(ids, i)
		}
	}
	return ids, nil
}

// placement says on which CPUs workers run.
type placement struct {
	cpus []int  // of each worker; -1: any
	own  []bool // nothing else of this process runs there
	// others are the CPUs that are left for the process's other threads; nil:
	// they run anywhere.
	others []int
}

// pinFrom is the number of CPUs from which workers are pinned if nobody says
// so: on fewer, the machine's other work needs the scheduler's freedom more.
const pinFrom = 4

// place chooses how many workers there are and where they run. Workers get
// distinct physical cores, those of the NIC's NUMA node first and CPU 0 last.
func place(cfg *HostConfig, queues int, cpus []cpu, nic int) (*placement, error) {
	pool := order(cpus, nic)
	pin := len(cpus) >= pinFrom
	switch {
	case len(cfg.CPUs) > 0:
		if cfg.NUMA >= 0 {
			return nil, fmt.Errorf("numa: cpus names the CPUs already, give one of the two")
		}
		pool = pool[:0:0]
		for _, id := range cfg.CPUs {
			i := slices.IndexFunc(cpus, func(c cpu) bool { return c.id == id })
			if i < 0 {
				return nil, fmt.Errorf("cpus: CPU %d is not one that this process may run on (%s)", id, ranges(cpus))
			}
			pool = append(pool, cpus[i])
		}
		pin = true
	case cfg.NUMA >= 0:
		pool = order(slices.DeleteFunc(slices.Clone(cpus), func(c cpu) bool { return c.node != cfg.NUMA }), cfg.NUMA)
		if len(pool) == 0 {
			return nil, fmt.Errorf("numa: node %d has no CPU that this process may run on", cfg.NUMA)
		}
		pin = true
	}
	n := cfg.Workers
	switch {
	case n < 0 || n > maxWorkers:
		return nil, fmt.Errorf("workers: %d is not between 1 and %d", n, maxWorkers)
	case n > queues:
		return nil, fmt.Errorf("workers: %d are more than the %d receive queues of %s, each needs one", n, queues, cfg.Interface)
	case n == 0 && len(cfg.CPUs) > 0:
		n = min(queues, len(pool))
	case n == 0:
		n = min(queues, cores(pool))
	}
	n = min(n, maxWorkers)
	p := &placement{cpus: make([]int, n), own: make([]bool, n)}
	if len(cfg.CPUs) == 0 && n >= len(cpus) {
		pin = false
	}
	if !pin {
		for i := range p.cpus {
			p.cpus[i] = -1
		}
		return p, nil
	}
	used := make(map[int]int)
	for i := range p.cpus {
		p.cpus[i] = pool[i%len(pool)].id
		used[p.cpus[i]]++
	}
	if len(used) < len(cpus) {
		for _, c := range cpus {
			if used[c.id] == 0 {
				p.others = append(p.others, c.id)
			}
		}
	}
	for i, id := range p.cpus {
		p.own[i] = used[id] == 1
	}
	return p, nil
}

// order sorts CPUs by how good they are for workers of a NIC: its node first,
// one of each physical core before their siblings, the core of CPU 0 last.
func order(cpus []cpu, nic int) []cpu {
	out := slices.Clone(cpus)
	slices.SortFunc(out, func(a, b cpu) int { return a.id - b.id })
	rank := make(map[int]int) // siblings with a lower number
	seen := make(map[[2]int]int)
	var first [2]int
	for _, c := range out {
		k := [2]int{c.pkg, c.core}
		rank[c.id] = seen[k]
		seen[k]++
		if c.id == 0 {
			first = k
		}
	}
	has0 := len(out) > 0 && out[0].id == 0
	cost := func(c cpu) (n int) {
		if nic >= 0 && c.node != nic {
			n += 1 << 20
		}
		n += rank[c.id] << 10
		if has0 && [2]int{c.pkg, c.core} == first {
			n += 1 << 9
		}
		return n
	}
	slices.SortStableFunc(out, func(a, b cpu) int { return cost(a) - cost(b) })
	return out
}

// cores counts physical cores.
func cores(cpus []cpu) int {
	seen := make(map[[2]int]bool)
	for _, c := range cpus {
		seen[[2]int{c.pkg, c.core}] = true
	}
	return len(seen)
}

// ranges writes CPU numbers as a list like 0-3,6.
func ranges(cpus []cpu) string {
	var parts []string
	for i := 0; i < len(cpus); {
		j := i
		for j+1 < len(cpus) && cpus[j+1].id == cpus[j].id+1 {
			j++
		}
		if i == j {
			parts = append(parts, strconv.Itoa(cpus[i].id))
		} else {
			parts = append(parts, fmt.Sprintf("%d-%d", cpus[i].id, cpus[j].id))
		}
		i = j + 1
	}
	return strings.Join(parts, ",")
}

// confine lets the threads of this process that have no CPU of their own run on
// the given CPUs only, and returns how to undo that. New threads follow, as the
// runtime starts none from a thread that a goroutine has locked.
func confine(cpus []int, except map[int]bool) (undo func()) {
	var set unix.CPUSet
	for _, id := range cpus {
		set.Set(id)
	}
	before := make(map[int]unix.CPUSet)
	// Twice: a thread may have been started by one not yet confined.
	for range 2 {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			break
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if _, done := before[tid]; err != nil || done || except[tid] {
				continue
			}
			var old unix.CPUSet
			if unix.SchedGetaffinity(tid, &old) == nil && unix.SchedSetaffinity(tid, &set) == nil {
				before[tid] = old
			}
		}
	}
	return func() {
		for tid, old := range before {
			// Threads that have ended have no affinity.
			_ = unix.SchedSetaffinity(tid, &old)
		}
	}
}
