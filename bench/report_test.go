package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var testMachine = Machine{CPU: "a <CPU> & more", CPUs: 2, Kernel: "6.18", Go: "go1.26"}

func suite[R any](t *testing.T, name string, rows []R) []byte {
	t.Helper()
	b, err := json.Marshal(Report[R]{Machine: testMachine, Suite: name, Results: rows})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testPage is a page with the charts of every suite.
func testPage(t *testing.T) *Page {
	t.Helper()
	pipeline := []PipelineRow{
		{Direction: "seal", Payload: 1440, Flows: 1, Workers: 1, Engine: "std", NsPer: 500, AEADNs: 300, Gbps: 20},
		{Direction: "open", Payload: 1440, Flows: 1, Workers: 1, Engine: "std", NsPer: 400, AEADNs: 290, Gbps: 25},
	}
	p := &Page{}
	for _, b := range [][]byte{
		suite(t, "micro", []MicroRow{{Name: "seal-aes128gcm", Bytes: 1440, Keys: 1, Engine: "std", NsPer: 344}, {Name: "seal-aes128gcm", Bytes: 1440, Keys: 1000, Engine: "std", NsPer: 400}, {Name: "keyagreement-x25519", NsPer: 52000}, {Name: "lookup", NsPer: 12}}),
		suite(t, "pipeline", pipeline),
		suite(t, "peers", []WireRow{{Variant: "plain", Gbps: 20, CPUPerGB: 0.5}, {Variant: "tcpcrypt", Gbps: 3, CPUPerGB: 4, Resumed: true}}),
		suite(t, "capacity", Capacity(pipeline, Costs{})),
	} {
		if err := p.ParseReport(b); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func TestParseReport(t *testing.T) {
	p := testPage(t)
	if n := len(p.Charts); n != 4+4+7+4 {
		t.Errorf("%d charts", n)
	}
	var out bytes.Buffer
	if err := p.HTML(&out); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "<svg"); n != len(p.Charts) {
		t.Errorf("%d drawings of %d charts", n, len(p.Charts))
	}
	for _, bad := range []string{"<CPU>", "http:", "https:", "src="} {
		if strings.Contains(out.String(), bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	other := suite(t, "micro", []MicroRow{{Name: "x"}})
	for name, b := range map[string][]byte{
		"not JSON":        []byte("Gb/s"),
		"no results":      []byte(`{"suite":"micro"}`),
		"unknown suite":   suite(t, "what", []MicroRow{{Name: "x"}}),
		"another machine": bytes.Replace(other, []byte("6.18"), []byte("6.19"), 1),
	} {
		if err := p.ParseReport(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// In a browser every bar of every chart is to be seen.
func TestReportInBrowser(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed")
	}
	dir := t.TempDir()
	p := testPage(t)
	var out bytes.Buffer
	if err := p.HTML(&out); err != nil {
		t.Fatal(err)
	}
	file, shot := filepath.Join(dir, "report.html"), filepath.Join(dir, "report.png")
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	const width = 1000
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1",
		"--user-data-dir="+filepath.Join(dir, "profile"), fmt.Sprintf("--window-size=%d,4000", width), "--screenshot="+shot, "file://"+file)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("chromium: %v\n%s", err, text)
	}
	f, err := os.Open(shot)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	colours := map[string]bool{}
	for _, c := range barColours {
		colours[c] = true
	}
	// The first column of the bars, in the page that the browser centres.
	x := (width-940)/2 + labelWidth
	seen, inside := 0, false
	for y := range img.Bounds().Max.Y {
		c := color.RGBAModel.Convert(img.At(x, y)).(color.RGBA)
		is := colours[fmt.Sprintf("#%02x%02x%02x", c.R, c.G, c.B)]
		if is && !inside {
			seen++
		}
		inside = is
	}
	want := 0
	for _, c := range p.Charts {
		want += len(c.Bars)
	}
	if seen != want {
		t.Errorf("%d bars are to be seen, want %d", seen, want)
	}
}

func TestCapacity(t *testing.T) {
	rows := Capacity([]PipelineRow{{Direction: "seal", Payload: 1440, Workers: 1, NsPer: 300}, {Direction: "seal", Payload: 1440, Workers: 2, NsPer: 200}},
		Costs{CopyRX: 1000, CopyTX: 500, ZeroCopy: 50, Inner: 150})
	if len(rows) != 2*len(CapacityLinks) {
		t.Fatalf("%d rows", len(rows))
	}
	for _, r := range rows {
		ns := map[string]float64{"zerocopy": 500, "copy": 950}[r.Mode]
		pps := r.LinkGbps * 1e9 / 8 / 1550
		if r.NsPer != ns || float64(r.Cores) < pps*ns/1e9 || float64(r.Cores-1) >= pps*ns/1e9 {
			t.Errorf("%+v, want %v ns a packet", r, ns)
		}
	}
}

func TestBenchmark(t *testing.T) {
	got := Benchmark(&MicroRow{Name: "seal-aes128gcm", Bytes: 64, Keys: 1, Engine: "std", NsPer: 123.456, Allocs: 0})
	if want := "BenchmarkMicro/seal-aes128gcm/bytes=64/keys=1/engine=std 1 123.456 ns/op 0 allocs/op"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
