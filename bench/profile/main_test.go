package main

import (
	"os"
	"strings"
	"testing"

	"github.com/google/pprof/profile"
)

// The committed profile is of the engine as it is, and names no path of the
// machine that made it.
func TestCommittedProfile(t *testing.T) {
	f, err := os.Open("../../cmd/tcpcrypt/default.pgo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := profile.Parse(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range p.Mapping {
		if m.File != "" {
			t.Errorf("mapping %q", m.File)
		}
	}
	seen := map[string]bool{}
	for _, f := range p.Function {
		seen[f.Name] = true
		if strings.HasPrefix(f.Filename, "/") {
			t.Errorf("function %s of %s", f.Name, f.Filename)
		}
	}
	const engine = "github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath.(*Engine)."
	for _, name := range []string{"InnerVec", "OuterIn", "sealFrame", "xmit", "outerSegment", "accept"} {
		if !seen[engine+name] {
			t.Errorf("%s is not in the profile: make profile", engine+name)
		}
	}
}
