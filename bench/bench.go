// Package bench measures the program: cryptography alone (Micro), the engine in
// memory (Pipeline), and whole hosts on a wire against plain TCP (Wire).
package bench

import (
	"bufio"
	"os"
	"runtime"
	"strings"
)

// Machine describes where figures were taken.
type Machine struct {
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

// ThisMachine describes the machine that runs the program.
func ThisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version()}
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
				m.CPU = strings.TrimSpace(v)
				break
			}
		}
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(b))
	}
	return m
}

// Report is what a suite prints as JSON.
type Report[Row any] struct {
	Machine Machine `json:"machine"`
	Results []Row   `json:"results"`
}
