package main

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tcpcrypt.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// load reads settings as the command does: flags first, then the file.
func load(t *testing.T, text string, args ...string) (*settings, error) {
	t.Helper()
	s := newSettings()
	flags := s.flags()
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	if err := s.applyFile(flags, writeConfig(t, text)); err != nil {
		return s, err
	}
	return s, s.check()
}

func TestConfigDefaults(t *testing.T) {
	s, err := load(t, `interface = "eth0"`)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	want := fastpath.HostConfig{Interface: "eth0", Mode: "auto", NUMA: -1, TEPs: crypto.AllTEPs, AEADs: crypto.AllAEADs, ResumeNonce: 8, Guard: fastpath.GuardAuto, Log: log}
	if got := s.hostConfig(log); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if s.control != defaultControl || s.metrics != "" || s.logFormat.value != "text" || s.drain != fastpath.DefaultDrain {
		t.Errorf("got %+v", s)
	}
}

func TestConfigFile(t *testing.T) {
	want := fastpath.HostConfig{
		Interface: "eth0",
		Mode:      "copy",
		Queues:    []int{0, 1, 2, 5},
		Workers:   3,
		CPUs:      []int{7},
		NUMA:      1,
		Poll:      fastpath.PollSleep,
		BusyPoll:  true,
		Ports:     []fastpath.PortRange{{First: 80, Last: 80}, {First: 8000, Last: 8100}},
		Exclude:   []fastpath.PortRange{{First: 22, Last: 22}},
		TEPs:      []crypto.TEP{crypto.TEPP256, crypto.TEPX25519},
		AEADs:     []crypto.AEAD{crypto.ChaCha20Poly1305, crypto.AES256GCM},
		NoResume:  true,
		Require:   true,

		ResumeNonce: 4,
		RekeyBytes:  1 << 20, RekeyFrames: 5000, RekeyEvery: time.Hour,
		TCPKeepalive: true, KeepGuard: true, Guard: fastpath.GuardOn, GuardCgroup: "/c", GuardPins: "/p",
		Rules: []fastpath.Rule{
			{RemotePorts: []fastpath.PortRange{{First: 22, Last: 22}, {First: 443, Last: 445}}, Policy: slowpath.Policy{Verdict: slowpath.Plain}},
			{
				Local: netip.MustParsePrefix("fd00::/8"), Remote: netip.MustParsePrefix("2001:db8::1/128"), LocalPorts: []fastpath.PortRange{{First: 80, Last: 80}},
				Policy: slowpath.Policy{Verdict: slowpath.Require, NoResume: true, NoCache: true, PassiveRole: true, AppAware: slowpath.AppAwareMandatory},
			},
			{Policy: slowpath.Policy{AppAware: slowpath.AppAwareOn}},
		},
	}
	const more = `
			workers = 3
			numa = 1
			poll = "sleep"
			busy-poll = true
			resume-nonce = 4
			rekey-bytes = "1M"
			rekey-frames = 5000
			rekey-every = "1h"
			tcp-keepalive = true
			keep-guard = true
			guard = "on"
			guard-cgroup = "/c"
			guard-pins = "/p"
			[[rule]]
			remote-ports = [22, "443-445"]
			action = "plain"
			[[rule]]
			local = "fd00::/8"
			remote = "2001:db8::1"
			local-ports = "80"
			action = "require"
			resume = false
			cache = false
			role = "B"
			app-aware = "mandatory"
			[[rule]]
			resume = true
			app-aware = "on"`
	for name, text := range map[string]string{
		"strings": `
			interface = "eth0"
			mode = "copy"
			queues = "0-2,5"
			cpus = "7"
			ports = "80, 8000-8100"
			exclude-ports = "22"
			teps = "p256,x25519"
			aeads = "chacha,aes256"
			no-resume = true
			require = true
			control = "c"
			metrics = "[::1]:9433"
			log-format = "json"
			drain-timeout = "1m"` + more,
		"arrays": `
			interface = "eth0"
			mode = "copy"
			queues = [0, 1, "2", 5]
			cpus = 7
			ports = [80, "8000-8100"]
			exclude-ports = [22]
			teps = ["p256", "x25519"]
			aeads = ["chacha20poly1305", "aes256gcm"]
			no-resume = true
			require = true
			control = "c"
			metrics = "[::1]:9433"
			log-format = "json"
			drain-timeout = "60s"` + more,
	} {
		t.Run(name, func(t *testing.T) {
			s, err := load(t, text)
			if err != nil {
				t.Fatal(err)
			}
			if got := s.hostConfig(nil); !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			if s.control != "c" || s.metrics != "[::1]:9433" || s.logFormat.value != "json" || s.drain != time.Minute {
				t.Errorf("got %+v", s)
			}
		})
	}
}

func TestConfigFlagWins(t *testing.T) {
	s, err := load(t, `
		interface = "eth0"
		ports = [80]
		exclude-ports = [22, 25]
		require = true
		drain-timeout = "1m"`,
		"--interface=eth1", "--ports=all", "--exclude-ports=", "--require=false", "--drain-timeout=0s")
	if err != nil {
		t.Fatal(err)
	}
	if s.iface != "eth1" || s.ports.items != nil || s.exclude.items != nil || s.require || s.drain != 0 {
		t.Errorf("got %+v", s)
	}
}

// Every flag of run is a key of the file, with a value of a wrong type refused by name.
func TestConfigEveryFlagIsAKey(t *testing.T) {
	newSettings().flags().VisitAll(func(f *pflag.Flag) {
		_, err := load(t, f.Name+" = {}")
		if err == nil || !strings.Contains(err.Error(), ": "+f.Name+": must be ") {
			t.Errorf("%s: %v", f.Name, err)
		}
	})
}

func TestConfigErrors(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{``, `interface is not set`},
		{`interfaces = "eth0"`, `unknown key "interfaces"`},
		{`config = "x"`, `unknown key "config"`},
		{`help = true`, `unknown key "help"`},
		{"[run]\ninterface = 'eth0'", `unknown key "run"`},
		{`interface = `, `tcpcrypt.toml:1:`},
		{"\n\ninterface = 'a'\ninterface = 'b'", `interface`},
		{`interface = 3`, `interface: must be a string`},
		{`interface = ["eth0"]`, `interface: must be a string`},
		{`require = "true"`, `require: must be true or false`},
		{`require = 1`, `require: must be true or false`},
		{`mode = "native"`, `mode: "native" is not one of auto, zerocopy, copy, generic`},
		{`mode = true`, `mode: must be a string`},
		{`log-format = ""`, `log-format: "" is not one of text, json`},
		{`ports = []`, `ports: the list is empty`},
		{`ports = ""`, `ports: the list is empty`},
		{`ports = [80, 80]`, `ports: "80" is in the list twice`},
		{`ports = [0]`, `ports: "0" is not within 1-65535`},
		{`ports = [65536]`, `ports: "65536" is not within 1-65535`},
		{`ports = "90-80"`, `ports: "90-80" is a range that ends before it starts`},
		{`ports = "80,,81"`, `ports: "" is not a number or a range`},
		{`ports = [80.5]`, `ports: items must be strings or whole numbers`},
		{`ports = [[80]]`, `ports: items must be strings or whole numbers`},
		{`ports = 1979-05-27`, `ports: must be a string, a whole number or an array of them`},
		{`ports = "-80"`, `ports: "-80" is not a number or a range`},
		{`ports = "http"`, `ports: "http" is not a number or a range`},
		{`exclude-ports = "all"`, `exclude-ports: "all" is not a number or a range`},
		{`queues = "0-99999999999"`, `queues: "0-99999999999" is not within 0-4095`},
		{`queues = "0-3,2"`, `queues: "2" is in the list twice`},
		{`queues = "all"`, `queues: "all" is not a number or a range`},
		{"interface = 'eth0'\nworkers = -1", `workers: -1 is negative`},
		{`workers = "many"`, `workers: `},
		{"interface = 'eth0'\nnuma = -2", `numa: -2 is not the number of a node`},
		{`poll = "always"`, `poll: "always" is not one of hybrid, busy, sleep`},
		{`cpus = -1`, `cpus: "-1" is not a number or a range`},
		{`teps = "x25519,x25519"`, `teps: "x25519" is in the list twice`},
		{`teps = []`, `teps: the list is empty`},
		{`teps = "rot13"`, `teps: "rot13"`},
		{`aeads = ["aes128", "aes128gcm"]`, `aeads: "aes128gcm" is in the list twice`},
		{`aeads = "none"`, `aeads: "none"`},
		{`drain-timeout = "5"`, `drain-timeout: time: missing unit`},
		{`drain-timeout = 5`, `drain-timeout: must be a string`},
		{"interface = 'eth0'\ndrain-timeout = '-1s'", `drain-timeout: -1s is negative`},
		{"interface = 'eth0'\nresume-nonce = 9", `resume-nonce: 9 is not between 0 and 8`},
		{"interface = 'eth0'\nguard = 'maybe'", `guard: "maybe" is not one of auto, on, off`},
		{"interface = 'eth0'\nguard = 'off'\nkeep-guard = true", `keep-guard: there is nothing to keep with guard = "off"`},
		{"interface = 'eth0'\nguard = 'off'\nrequire = true", `guard: "off" would let connections be plain that require says must not be, whenever the daemon does not run`},
		{"interface = 'eth0'\nguard = 'off'\n[[rule]]\naction = 'require'", `guard: "off" would let connections be plain that require says must not be, whenever the daemon does not run`},
		{"interface = 'eth0'\nmax-flows = '1M'", `max-flows: 1048576 is more than the 262144 that the maps hold`},
		{"interface = 'eth0'\nmax-half-open = '1M'", `max-half-open: 1048576 is more than the 262144 connections that the maps hold`},
		{"interface = 'eth0'\nmemory = '10K'", `memory: 10240 is not between 1048576 and 1099511627776`},
		{"interface = 'eth0'\numem-chunks = 10", `umem-chunks: 10 is not between 2048 and 1048576`},
		{"interface = 'eth0'\nrekey-every = '-1s'", `rekey-every: -1s is negative`},
		{`rekey-bytes = 0`, `rekey-bytes: "0" is not a number from 1 on`},
		{`rekey-bytes = "1X"`, `rekey-bytes: "1X" is not a number from 1 on`},
		{`rekey-bytes = "8388608T"`, `rekey-bytes: "8388608T" is not a number from 1 on`},
		{`rule = 1`, `rule: it must be an array of tables: [[rule]]`},
		{"[[rule]]\naction = 'drop'", `rule 1: action: "drop" is not one of encrypt, require, plain`},
		{"[[rule]]\n[[rule]]\nlocal = '10.0.0.1/8'", `rule 2: local: "10.0.0.1/8" has bits beyond the prefix, did you mean 10.0.0.0/8?`},
		{"[[rule]]\nremote = 'example.org'", `rule 1: remote: "example.org" is not an address or a prefix`},
		{"[[rule]]\nremote-port = 22", `rule 1: unknown key "remote-port"`},
		{"[[rule]]\nremote-ports = true", `rule 1: remote-ports: must be a string, a whole number or an array of them`},
		{"[[rule]]\nremote-ports = ''", `rule 1: remote-ports: the list is empty`},
		{"[[rule]]\nrole = 'b'", `rule 1: role: "b" is not one of A, B`},
		{"[[rule]]\nresume = 'no'", `rule`},
		{"[[rule]]\nlocal = '192.0.2.0/24'\nremote = '2001:db8::1'", `rule 1: local is 192.0.2.0/24 and remote 2001:db8::1/128: no connection has an IPv4 and an IPv6 address`},
		{"interface = 'eth0'\ncontrol = ''", `control is empty`},
		{"interface = 'eth0'\ninner-interface = 'eth0'", `inner-interface: eth0 is the outer one already`},
		{"interface = 'eth0'\ninner-interface = 'eth1'\nkeep-guard = true", `keep-guard is not for a gateway: --bypass says what it does without the daemon`},
		{"interface = 'eth0'\nbypass = 'drop'", `bypass: "drop" is not one of forward, block`},
	} {
		_, err := load(t, test.text)
		if err == nil {
			t.Errorf("%q: no error, want %s", test.text, test.want)
			continue
		}
		if line := oneLine(err); !strings.Contains(line, test.want) || strings.ContainsAny(line, "\n\r") {
			t.Errorf("%q: %q, want %s", test.text, line, test.want)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(`interface = "eth0"`)
	f.Add(`ports = [80, "8000-8100"]`)
	f.Add(`teps = "x25519" # comment`)
	f.Add(`drain-timeout = "5s"`)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := load(t, text)
		if err != nil {
			if line := oneLine(err); line == "" || strings.ContainsAny(line, "\n\r") {
				t.Errorf("error is not one line: %q", line)
			}
			return
		}
		cfg := s.hostConfig(nil)
		if cfg.Interface == "" || len(cfg.TEPs) == 0 || len(cfg.AEADs) == 0 {
			t.Errorf("accepted %+v", cfg)
		}
		for _, r := range append(cfg.Ports, cfg.Exclude...) {
			if r.First == 0 || r.First > r.Last {
				t.Errorf("accepted port range %v", r)
			}
		}
	})
}

// The example in the documentation is accepted, and so is every line of it
// that is commented out: those show the defaults or other valid values.
func TestConfigExample(t *testing.T) {
	example, err := os.ReadFile(filepath.Join("..", "..", "docs", "tcpcrypt.toml"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	keys, rules := 0, false
	for line := range strings.Lines(string(example)) {
		if key, _, ok := strings.Cut(strings.TrimPrefix(line, "# "), " = "); ok && !strings.Contains(key, " ") {
			line = strings.TrimPrefix(line, "# ")
			if !rules {
				keys++
			}
		} else if strings.HasPrefix(line, "# [[") {
			line, rules = strings.TrimPrefix(line, "# "), true
		}
		all.WriteString(line)
	}
	for name, text := range map[string]string{"as it is": string(example), "all keys": all.String()} {
		if _, err := load(t, text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	want := 0
	newSettings().flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			want++
		}
	})
	if keys != want {
		t.Errorf("the example has %d keys, run has %d flags", keys, want)
	}
}
