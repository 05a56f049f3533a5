package bench

import (
	"encoding/json"
	"fmt"
	htmltemplate "html/template"
	"io"
	"math"
	"slices"
	"strings"
)

// ParseReport reads what a suite printed as JSON, whichever it was, and adds it
// to the page.
func (p *Page) ParseReport(b []byte) error {
	var r struct {
		Machine     Machine           `json:"machine"`
		Suite       string            `json:"suite"`
		Assumptions []string          `json:"assumptions"`
		Results     []json.RawMessage `json:"results"`
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("not the JSON of a suite: %w", err)
	}
	if len(r.Results) == 0 {
		return fmt.Errorf("no results")
	}
	if p.Machine == (Machine{}) {
		p.Machine = r.Machine
	} else if p.Machine != r.Machine {
		return fmt.Errorf("measured on another machine: %+v, not %+v", r.Machine, p.Machine)
	}
	switch r.Suite {
	case "micro":
		return addCharts(p, r.Results, microCharts)
	case "pipeline":
		return addCharts(p, r.Results, pipelineCharts)
	case "wire", "peers":
		return addCharts(p, r.Results, wireCharts)
	case "capacity":
		p.Assumptions = r.Assumptions
		return addCharts(p, r.Results, capacityCharts)
	}
	return fmt.Errorf("of an unknown suite %q", r.Suite)
}

func addCharts[Row any](p *Page, raw []json.RawMessage, charts func([]Row) []chart) error {
	rows := make([]Row, len(raw))
	for i := range raw {
		if err := json.Unmarshal(raw[i], &rows[i]); err != nil {
			return err
		}
	}
	p.Charts = append(p.Charts, charts(rows)...)
	return nil
}

// Page is a report for people: charts of what the suites measured, in one file
// that needs no other.
type Page struct {
	Machine     Machine
	Assumptions []string // of the Capacity suite
	Charts      []chart
}

// chart is a group of horizontal bars.
type chart struct {
	Title, Unit string
	Note        string
	Bars        []bar
}

type bar struct {
	Label string
	Value float64
	// Group colours bars that belong together alike.
	Group int
}

func microCharts(rows []MicroRow) []chart {
	frames := chart{Title: "Sealing and opening frames", Unit: "ns", Note: "colours are AEAD engines"}
	keys := chart{Title: "The same, 1440 B with keys that take turns", Unit: "ns", Note: frames.Note}
	agree := chart{Title: "Key agreement (generate and agree)", Unit: "us"}
	other := chart{Title: "Other operations", Unit: "ns"}
	for _, r := range rows {
		switch {
		case strings.HasPrefix(r.Name, "keyagreement-"):
			agree.Bars = append(agree.Bars, bar{Label: strings.TrimPrefix(r.Name, "keyagreement-"), Value: r.NsPer / 1000})
		case r.Engine != "" && r.Bytes > 0:
			if r.Keys == 1 && slices.Contains([]int{1, 64, 1440, 16384}, r.Bytes) {
				frames.Bars = append(frames.Bars, bar{Label: fmt.Sprintf("%s, %s, %d B", r.Engine, r.Name, r.Bytes), Value: r.NsPer, Group: group(&frames, r.Engine)})
			}
			if r.Keys > 1 && r.Bytes == 1440 {
				keys.Bars = append(keys.Bars, bar{Label: fmt.Sprintf("%s, %s, %d keys", r.Engine, r.Name, r.Keys), Value: r.NsPer, Group: group(&keys, r.Engine)})
			}
		case r.Bytes > 0:
			other.Bars = append(other.Bars, bar{Label: fmt.Sprintf("%s, %d B", r.Name, r.Bytes), Value: r.NsPer})
		default:
			other.Bars = append(other.Bars, bar{Label: r.Name, Value: r.NsPer})
		}
	}
	return nonEmpty(frames, keys, agree, other)
}

// group returns the group of the chart's bars that are labelled with name.
func group(c *chart, name string) int {
	last := -1
	for _, b := range c.Bars {
		if strings.HasPrefix(b.Label, name+",") {
			return b.Group
		}
		last = max(last, b.Group)
	}
	return last + 1
}

func pipelineCharts(rows []PipelineRow) []chart {
	var cs []chart
	for _, dir := range []string{"seal", "open"} {
		ns := chart{Title: "Engine, " + dir + ": time per packet", Unit: "ns", Note: "the lighter bar is the AEAD alone"}
		gb := chart{Title: "Engine, " + dir + ": throughput", Unit: "Gb/s"}
		for _, r := range rows {
			if r.Direction != dir {
				continue
			}
			label := fmt.Sprintf("%d B, %d flows, bursts of %d, %d workers, %s", r.Payload, r.Flows, r.Burst, r.Workers, r.Engine)
			ns.Bars = append(ns.Bars, bar{Label: label, Value: r.NsPer}, bar{Label: "AEAD", Value: r.AEADNs, Group: 1})
			gb.Bars = append(gb.Bars, bar{Label: label, Value: r.Gbps})
		}
		cs = append(cs, ns, gb)
	}
	return nonEmpty(cs...)
}

func wireCharts(rows []WireRow) []chart {
	var cs []chart
	for _, f := range []struct {
		title, unit string
		of          func(*WireRow) float64
	}{
		{"Two hosts: throughput", "Gb/s", func(r *WireRow) float64 { return r.Gbps }},
		{"Two hosts: CPU of both together", "s/GB", func(r *WireRow) float64 { return r.CPUPerGB }},
		{"Two hosts: round trip, median", "us", func(r *WireRow) float64 { return r.RTTp50 }},
		{"Two hosts: round trip, 99th percentile", "us", func(r *WireRow) float64 { return r.RTTp99 }},
		{"Two hosts: connect to first byte, median", "us", func(r *WireRow) float64 { return r.Connect50 }},
		{"The same over a path of 1 ms", "us", func(r *WireRow) float64 { return r.Connect1m }},
		{"Two hosts: connections one after the other", "1/s", func(r *WireRow) float64 { return r.ConnPerS }},
	} {
		c := chart{Title: f.title, Unit: f.unit}
		for i := range rows {
			label := rows[i].Variant
			if rows[i].Resumed {
				label += ", resumed"
			}
			c.Bars = append(c.Bars, bar{Label: label, Value: f.of(&rows[i]), Group: b2i(strings.HasPrefix(label, "tcpcrypt") || label == "gateway")})
		}
		cs = append(cs, c)
	}
	return nonEmpty(cs...)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func capacityCharts(rows []CapacityRow) []chart {
	var cs []chart
	for _, mode := range []string{"zerocopy", "copy"} {
		per := chart{Title: "Computed: payload per core, " + mode, Unit: "Gb/s", Note: "computed from measured costs and the assumptions above"}
		cores := chart{Title: "Computed: cores for 100 Gb/s at line rate, " + mode, Unit: "cores", Note: per.Note}
		for _, r := range rows {
			if r.Mode != mode || r.LinkGbps != 100 {
				continue
			}
			label := fmt.Sprintf("%s, %d B", r.Direction, r.Payload)
			per.Bars = append(per.Bars, bar{Label: label, Value: r.GbpsPerCore, Group: b2i(r.Direction == "open")})
			cores.Bars = append(cores.Bars, bar{Label: label, Value: float64(r.Cores), Group: b2i(r.Direction == "open")})
		}
		cs = append(cs, per, cores)
	}
	return nonEmpty(cs...)
}

func nonEmpty(cs ...chart) []chart {
	return slices.DeleteFunc(cs, func(c chart) bool { return len(c.Bars) == 0 })
}

const (
	chartWidth = 900 // px of a chart, labels included
	labelWidth = 330
	barHeight  = 18
	barGap     = 5
)

var barColours = []string{"#31688e", "#8fc1b5", "#d08c3a", "#7d5ba6", "#9a9a9a", "#b5536b"}

// SVG draws the chart.
func (c chart) SVG() htmltemplate.HTML {
	top := 0.0
	for _, b := range c.Bars {
		top = max(top, b.Value)
	}
	if top == 0 {
		top = 1
	}
	var s strings.Builder
	height := len(c.Bars)*(barHeight+barGap) + barGap
	fmt.Fprintf(&s, `<svg class="chart" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">`,
		chartWidth, height, chartWidth, height, htmltemplate.HTMLEscapeString(c.Title))
	for i, b := range c.Bars {
		y := barGap + i*(barHeight+barGap)
		w := b.Value / top * (chartWidth - labelWidth - 110)
		fmt.Fprintf(&s, `<text x="%d" y="%d" text-anchor="end">%s</text>`, labelWidth-8, y+barHeight-5, htmltemplate.HTMLEscapeString(b.Label))
		fmt.Fprintf(&s, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, labelWidth, y, max(w, 1), barHeight, barColours[b.Group%len(barColours)])
		fmt.Fprintf(&s, `<text x="%.1f" y="%d">%s %s</text>`, labelWidth+max(w, 1)+6, y+barHeight-5, threeDigits(b.Value), htmltemplate.HTMLEscapeString(c.Unit))
	}
	s.WriteString(`</svg>`)
	// The text in it is escaped above, the rest are numbers and constants.
	return htmltemplate.HTML(s.String())
}

// threeDigits prints the digits of a figure that matter.
func threeDigits(v float64) string {
	if v == 0 {
		return "0"
	}
	digits := 2 - int(math.Floor(math.Log10(math.Abs(v))))
	return fmt.Sprintf("%.*f", max(0, min(digits, 4)), v)
}

var page = htmltemplate.Must(htmltemplate.New("page").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>tcpcrypt: measurements</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 940px; color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 1.6em 0 .3em; }
svg text { font: 12px sans-serif; fill: #222; }
.chart { max-width: 100%; height: auto; }
p.note { color: #666; margin: 0 0 .4em; }
</style>
</head>
<body>
<h1>tcpcrypt: measurements</h1>
<p>{{.Machine.CPU}}, {{.Machine.CPUs}} CPUs, Linux {{.Machine.Kernel}}, {{.Machine.Go}}. Where both hosts share one machine, read the ratios.</p>
{{with .Assumptions}}<p>Computed charts assume:</p><ul>{{range .}}<li>{{.}}</li>{{end}}</ul>{{end}}
{{range .Charts}}<h2>{{.Title}}</h2>
{{with .Note}}<p class="note">{{.}}</p>{{end}}
{{.SVG}}
{{end}}</body>
</html>
`))

// HTML writes the page.
func (p *Page) HTML(w io.Writer) error { return page.Execute(w, p) }
