// Command mutants shows that the simulator is able to fail: it plants a bug at a
// time, builds the tests with it through an overlay, and demands that TestSim of
// package fastpath catches it by the property that the bug breaks.
//
// Each bug is a patch in fastpath/testdata/mutants. Above the patch stand
// "Rules:", the invariants and translation rules that it breaks, "Caught:", a
// regular expression that the simulator's complaint matches, and what the bug
// is.
//
//	mutants [-segments N] [-run REGEXP]
//
// The table that it prints is Markdown. The exit code is 1 when a bug was not
// caught, or by another property, and when a patch does not apply.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

func main() {
	segments := flag.String("segments", "3e7", "how many segments a bug may survive")
	run := flag.String("run", "", "only the bugs whose names match")
	flag.Parse()
	if err := plantAll(*segments, *run); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func plantAll(segments, run string) error {
	want, err := regexp.Compile(run)
	if err != nil {
		return err
	}
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	all, err := load(filepath.Join(root, dir))
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	fmt.Println("| bug | breaks | caught after | by |")
	fmt.Println("|---|---|---|---|")
	var missed []string
	for _, m := range all {
		if !want.MatchString(m.name) {
			continue
		}
		seeds, why, err := m.plant(root, tmp, segments)
		if err != nil {
			missed = append(missed, fmt.Sprintf("%s: %v", m.name, err))
			continue
		}
		fmt.Printf("| %s: %s | %s | seed %s | %s |\n", m.name, m.text, m.rules, seeds, why)
	}
	if missed != nil {
		return errors.New(strings.Join(missed, "\nmutants: "))
	}
	return nil
}

// dir is where the bugs are, from the module's root.
const dir = "fastpath/testdata/mutants"

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if filepath.Base(mod) != "go.mod" {
		return "", errors.New("not inside the module")
	}
	return filepath.Dir(mod), nil
}

var failure = regexp.MustCompile(`(?m)seed (\d+): at [^ ]+: (.*)$`)

// plant builds the simulator with the bug and runs it. It returns the seed that
// failed and its complaint.
func (m *mutant) plant(root, tmp, segments string) (seed, why string, err error) {
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for _, file := range m.files() {
		old, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			return "", "", err
		}
		b, err := m.apply(file, old)
		if err != nil {
			return "", "", err
		}
		to := filepath.Join(tmp, m.name+"-"+filepath.Base(file))
		if err := os.WriteFile(to, b, 0o600); err != nil {
			return "", "", err
		}
		overlay.Replace[filepath.Join(root, file)] = to
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		return "", "", err
	}
	list := filepath.Join(tmp, "overlay.json")
	if err := os.WriteFile(list, b, 0o600); err != nil {
		return "", "", err
	}
	bin := filepath.Join(tmp, "sim.test")
	build := exec.Command("go", "test", "-c", "-overlay", list, "-o", bin, "./fastpath")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("does not build: %w\n%s", err, out)
	}
	test := exec.Command(bin, "-test.run", "^TestSim$", "-test.timeout", "30m", "-sim.segments", segments, "-sim.failures", "1")
	test.Dir = filepath.Join(root, "fastpath")
	out, err := test.CombinedOutput()
	if err == nil {
		return "", "", fmt.Errorf("survived %s segments", segments)
	}
	f := failure.FindSubmatch(out)
	if f == nil {
		return "", "", fmt.Errorf("the simulator crashed:\n%s", bytes.TrimSpace(out[:min(len(out), 3000)]))
	}
	if !m.caught.Match(f[2]) {
		return "", "", fmt.Errorf("seed %s complains of something else: %s", f[1], f[2])
	}
	by := m.caught.Find(f[2])
	return string(f[1]), string(by[:min(len(by), 72)]), nil
}
