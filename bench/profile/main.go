// Command profile writes cmd/tcpcrypt/default.pgo, by which the compiler decides
// what of the program to inline. The engine runs in memory, as it does for
// tcpcrypt bench pipeline, and what remains of the profile is the engine's own.
//
//	profile [-o FILE] [-rounds N]
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"regexp"
	"runtime/pprof"

	"github.com/google/pprof/profile"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench"
)

func main() {
	out := flag.String("o", "cmd/tcpcrypt/default.pgo", "file to write")
	rounds := flag.Int("rounds", 6, "how often everything runs, some ten seconds each")
	flag.Parse()
	if err := write(*out, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "profile:", err)
		os.Exit(1)
	}
}

// hot matches what a worker calls for packets.
var hot = regexp.MustCompile(`fastpath\.\(\*Engine\)\.(InnerVec|OuterIn|Flush|FinishOut|ClearIn|ClearOut)$`)

func write(path string, rounds int) error {
	var raw bytes.Buffer
	if err := pprof.StartCPUProfile(&raw); err != nil {
		return err
	}
	for range rounds {
		_, err := bench.Pipeline(bench.PipelineOptions{
			Payloads: []int{64, 1440, bench.IMIX}, Flows: []int{16, 1000, 20000}, Bursts: []int{1, 16}, Workers: []int{1},
			Log: func(s string) { fmt.Fprintln(os.Stderr, s) },
		})
		if err != nil {
			pprof.StopCPUProfile()
			return err
		}
	}
	pprof.StopCPUProfile()
	p, err := profile.Parse(&raw)
	if err != nil {
		return err
	}
	if found, _, _, _ := p.FilterSamplesByName(hot, nil, nil, nil); !found {
		return fmt.Errorf("no sample of %d is the engine's", len(p.Sample))
	}
	// Neither the compiler nor readers need to know where the program lay.
	for _, m := range p.Mapping {
		m.File, m.BuildID = "", ""
	}
	p.TimeNanos = 0
	p = p.Compact()
	fmt.Fprintf(os.Stderr, "%d samples\n", len(p.Sample))
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := p.Write(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
