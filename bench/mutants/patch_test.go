package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every bug can be planted in the code as it is.
func TestPatchesApply(t *testing.T) {
	root := filepath.Join("..", "..")
	all, err := load(filepath.Join(root, dir))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 12 {
		t.Errorf("%d bugs", len(all))
	}
	for _, m := range all {
		for _, f := range m.files() {
			old, err := os.ReadFile(filepath.Join(root, f))
			if err != nil {
				t.Errorf("%s: %v", m.name, err)
				continue
			}
			b, err := m.apply(f, old)
			if err != nil {
				t.Errorf("%s: %v", m.name, err)
			} else if bytes.Equal(b, old) {
				t.Errorf("%s changes nothing in %s", m.name, f)
			}
		}
	}
}

const sample = `Rules: I1
Caught: other bytes
A bug.

--- a/f.go
+++ b/f.go
@@ -1,3 +1,3 @@ func f() {
 one
-two
+too

`

func TestParse(t *testing.T) {
	m, err := parse([]byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	if m.rules != "I1" || m.text != "A bug." || !m.caught.MatchString("some other bytes") || len(m.files()) != 1 {
		t.Errorf("%+v", m)
	}
	b, err := m.apply("f.go", []byte("zero\none\ntwo\n\nthree\n"))
	if err != nil || string(b) != "zero\none\ntoo\n\nthree\n" {
		t.Errorf("%q, %v", b, err)
	}
	for _, file := range []string{"one\ntoo\n\n", "one\ntwo\n\none\ntwo\n\n"} {
		if _, err := m.apply("f.go", []byte(file)); err == nil {
			t.Errorf("applies to %q", file)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, bad := range []string{
		"",
		strings.Replace(sample, "Rules: I1\n", "", 1),
		strings.Replace(sample, "Caught: other bytes\n", "", 1),
		strings.Replace(sample, "other bytes", "(", 1),
		strings.Replace(sample, "A bug.\n", "", 1),
		strings.Replace(sample, "-two", "~two", 1),
	} {
		if m, err := parse([]byte(bad)); err == nil {
			t.Errorf("%q is taken: %+v", bad, m)
		}
	}
}
