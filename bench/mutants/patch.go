package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// mutant is a bug that can be planted.
type mutant struct {
	name   string
	rules  string
	text   string
	caught *regexp.Regexp
	hunks  []hunk
}

// hunk replaces one place of a file. Places are found by their text, whatever
// the line numbers, so that a patch lives as long as what it changes.
type hunk struct {
	file     string
	old, new []byte
}

// load reads the bugs of a directory, by name.
func load(dir string) ([]*mutant, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.patch"))
	if err != nil || len(files) == 0 {
		return nil, errors.Join(err, fmt.Errorf("no patches in %s", dir))
	}
	all := make([]*mutant, 0, len(files))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		m, err := parse(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		m.name = strings.TrimSuffix(filepath.Base(f), ".patch")
		all = append(all, m)
	}
	return all, nil
}

// parse reads a patch in unified format and what stands above it.
func parse(b []byte) (*mutant, error) {
	m := &mutant{}
	var text []string
	var file string
	in := bufio.NewScanner(bytes.NewReader(b))
	for in.Scan() {
		line := in.Text()
		h := len(m.hunks) - 1
		switch {
		case strings.HasPrefix(line, "+++ b/"):
			file = strings.TrimPrefix(line, "+++ b/")
		case strings.HasPrefix(line, "--- "):
		case strings.HasPrefix(line, "@@ ") && file != "":
			m.hunks = append(m.hunks, hunk{file: file})
		case file != "" && h >= 0:
			kind, rest := byte(' '), ""
			if line != "" {
				kind, rest = line[0], line[1:]
			}
			if kind != '+' {
				m.hunks[h].old = append(append(m.hunks[h].old, rest...), '\n')
			}
			if kind != '-' {
				m.hunks[h].new = append(append(m.hunks[h].new, rest...), '\n')
			}
			if !strings.ContainsRune("+- ", rune(kind)) {
				return nil, fmt.Errorf("line %q of a hunk", line)
			}
		case strings.HasPrefix(line, "Rules: "):
			m.rules = strings.TrimPrefix(line, "Rules: ")
		case strings.HasPrefix(line, "Caught: "):
			re, err := regexp.Compile(strings.TrimPrefix(line, "Caught: "))
			if err != nil {
				return nil, err
			}
			m.caught = re
		case line != "":
			text = append(text, line)
		}
	}
	m.text = strings.Join(text, " ")
	if m.rules == "" || m.caught == nil || m.text == "" || len(m.hunks) == 0 {
		return nil, errors.New("a patch wants Rules:, Caught:, a description and a hunk")
	}
	return m, in.Err()
}

// files returns the files that the patch changes, each once.
func (m *mutant) files() (fs []string) {
	for _, h := range m.hunks {
		if !slices.Contains(fs, h.file) {
			fs = append(fs, h.file)
		}
	}
	return fs
}

// apply returns the changed file. Every hunk has to fit exactly once.
func (m *mutant) apply(file string, b []byte) ([]byte, error) {
	for _, h := range m.hunks {
		if h.file != file {
			continue
		}
		if n := bytes.Count(b, h.old); n != 1 {
			return nil, fmt.Errorf("the patch does not apply: %s has %d places like\n%s", file, n, h.old)
		}
		b = bytes.Replace(b, h.old, h.new, 1)
	}
	return b, nil
}
