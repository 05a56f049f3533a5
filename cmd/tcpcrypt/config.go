package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

const defaultControl = "/run/tcpcrypt/control.sock"

// maxMemory bounds what is asked of the machine by a mistyped number.
const maxMemory = 1 << 40

// maxIndex bounds the queue and CPU numbers of a list, so that a mistyped
// range is an error and not gigabytes of numbers.
const maxIndex = 4095

// settings are the flags of `run`, which are the keys of its configuration
// file as well.
type settings struct {
	iface    string
	inner    string
	bypass   choice
	mode     choice
	queues   list[int]
	workers  int
	cpus     list[int]
	numa     int
	poll     choice
	busyPoll bool
	ports    list[fastpath.PortRange]
	exclude  list[fastpath.PortRange]
	teps     list[crypto.TEP]
	aeads    list[crypto.AEAD]
	engine   string
	noResume bool
	require  bool

	resumeNonce  int
	maxFlows     size
	maxHalfOpen  size
	memory       size
	umemChunks   size
	rekeyBytes   size
	rekeyFrames  size
	rekeyEvery   time.Duration
	tcpKeepalive bool
	keepGuard    bool
	guard        choice
	guardCgroup  string
	guardPins    string
	rules        []fastpath.Rule // of the file only
	control      string
	metrics      string
	logFormat    choice
	drain        time.Duration
}

func newSettings() *settings {
	s := &settings{
		mode:      choice{"auto", []string{"auto", "zerocopy", "copy", "generic"}},
		guard:     choice{fastpath.GuardAuto, []string{fastpath.GuardAuto, fastpath.GuardOn, fastpath.GuardOff}},
		bypass:    choice{"forward", []string{"forward", "block"}},
		logFormat: choice{"text", []string{"text", "json"}},
		poll:      choice{fastpath.PollHybrid.String(), fastpath.PollNames},
		queues:    list[int]{parse: parseIndexes},
		cpus:      list[int]{parse: parseIndexes},
		ports:     list[fastpath.PortRange]{parse: parsePorts, all: true, text: "all"},
		exclude:   list[fastpath.PortRange]{parse: parsePorts, optional: true},
		teps:      list[crypto.TEP]{parse: one(crypto.ParseTEP), items: slices.Clone(crypto.AllTEPs[:])},
		aeads:     list[crypto.AEAD]{parse: one(crypto.ParseAEAD), items: slices.Clone(crypto.AllAEADs[:])},
	}
	s.teps.text = join(s.teps.items)
	s.aeads.text = join(s.aeads.items)
	return s
}

// flags returns the flags that set s. They are also the keys of the file.
func (s *settings) flags() *pflag.FlagSet {
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	fs.SortFlags = false
	fs.StringVar(&s.iface, "interface", "", "encrypt the TCP connections of the network interface `IF`")
	fs.StringVar(&s.inner, "inner-interface", "", "be a gateway for the hosts on the network interface `IF`, whose connections are encrypted on the other one")
	fs.Var(&s.bypass, "bypass", "what a gateway does when the daemon hangs, has died or has ended: forward what is not encrypted, until the next start or --cleanup, or block everything")
	fs.Var(&s.mode, "mode", "how packets are received; all but auto fail when it cannot be had")
	fs.Var(&s.queues, "queues", "receive queues of the interface, like 0-3,5, in the order in which workers take them (default all)")
	fs.IntVar(&s.workers, "workers", 0, "`N` threads that carry packets (default one for each queue, as far as there are CPU cores)")
	fs.Var(&s.cpus, "cpus", "CPUs to pin workers to, like 0-3,5 (default near the interface, where there are CPUs to spare)")
	fs.IntVar(&s.numa, "numa", -1, "choose the CPUs from NUMA node `N` (default that of the interface)")
	fs.Var(&s.poll, "poll", "what a worker without work does: look on a little and then sleep, never sleep, or sleep at once")
	fs.BoolVar(&s.busyPoll, "busy-poll", false, "have workers, not interrupts, drive the driver's queues (SO_PREFER_BUSY_POLL)")
	fs.Var(&s.ports, "ports", "local or remote TCP ports to encrypt, like 80,443,8000-8100, or all")
	fs.Var(&s.exclude, "exclude-ports", "TCP ports to leave alone")
	fs.Var(&s.teps, "teps", "key agreement, in order of preference")
	fs.Var(&s.aeads, "aeads", "ciphers, in order of preference")
	engineFlag(fs, &s.engine)
	fs.BoolVar(&s.noResume, "no-resume", false, "do not resume sessions")
	fs.IntVar(&s.resumeNonce, "resume-nonce", crypto.MaxResumeNonce, "length of resumption nonces, `N` bytes, 0 to 8; less than 8 only where memory is never cloned or restored")
	fs.Var(&s.rekeyBytes, "rekey-bytes", "change a key after it sealed so much data, like 1M (default 64G)")
	fs.Var(&s.rekeyFrames, "rekey-frames", "change a key after it sealed so many frames (default by cipher)")
	fs.DurationVar(&s.rekeyEvery, "rekey-every", 0, "change a key that has been used so long (default never)")
	fs.BoolVar(&s.tcpKeepalive, "tcp-keepalive", false, "relay TCP keep-alives as they are, instead of asking the peer for an authenticated answer")
	fs.Var(&s.maxFlows, "max-flows", "most connections that are encrypted at a time, the others are plain or refused (default 262144)")
	fs.Var(&s.maxHalfOpen, "max-half-open", "most connections that are being opened at a time (default 16384)")
	fs.Var(&s.memory, "memory", "most bytes of packets that wait for an acknowledgement, like 64M (default 256M)")
	fs.Var(&s.umemChunks, "umem-chunks", "packet buffers of each worker (default by the number of queues)")
	fs.BoolVar(&s.require, "require", false, "refuse connections that would stay plain")
	fs.BoolVar(&s.keepGuard, "keep-guard", false, "after SIGTERM, still refuse connections that must not be plain, until the next start or --cleanup")
	fs.Var(&s.guard, "guard", "keep encrypted connections shut to what does not come through the daemon: as far as the host allows, completely, or not")
	fs.StringVar(&s.guardCgroup, "guard-cgroup", "", "guard the sockets in the cgroup at `DIR` (default all)")
	fs.StringVar(&s.guardPins, "guard-pins", "", "keep the guard in the BPF file system at `DIR` (default /sys/fs/bpf)")
	fs.StringVar(&s.control, "control", defaultControl, "`PATH` of the control socket; needed where several daemons run")
	fs.StringVar(&s.metrics, "metrics", "", "serve Prometheus metrics at `ADDR`, like 127.0.0.1:9433")
	fs.Var(&s.logFormat, "log-format", "format of the log on stderr")
	fs.DurationVar(&s.drain, "drain-timeout", fastpath.DefaultDrain, "how long encrypted connections may take to finish after SIGTERM")
	fs.Lookup("numa").DefValue = "0" // not shown; -1 means nothing to a user
	return fs
}

const engineFlagName = "aead-engine"

// engineFlag adds the flag that useEngine follows.
func engineFlag(fs *pflag.FlagSet, engine *string) {
	fs.StringVar(engine, engineFlagName, "", "compute AES-GCM by `NAME`: vaes-avx512, vaes-avx2 or std (default the fastest here, or $"+crypto.EngineEnv+")")
}

// useEngine chooses the AEAD engine.
func useEngine(name string) error {
	if err := crypto.SetEngine(name); err != nil {
		if name != "" {
			err = fmt.Errorf("%s: %w", engineFlagName, err)
		}
		return err
	}
	return nil
}

// check finds what no single flag can.
func (s *settings) check() error {
	switch {
	case s.inner != "" && s.inner == s.iface:
		return fmt.Errorf("inner-interface: %s is the outer one already", s.inner)
	case s.inner == "" && s.bypass.value == "block":
		return errors.New("bypass is what a gateway does, which is given the other interface with --inner-interface; keep-guard is what a host has")
	case s.inner != "" && s.keepGuard:
		return errors.New("keep-guard is not for a gateway: --bypass says what it does without the daemon")
	case s.iface == "":
		return errors.New("interface is not set: give --interface, or the key interface in the --config file")
	case s.control == "":
		return errNoControl
	case s.workers < 0:
		return fmt.Errorf("workers: %d is negative", s.workers)
	case s.numa < -1:
		return fmt.Errorf("numa: %d is not the number of a node", s.numa)
	case s.resumeNonce < 0 || s.resumeNonce > crypto.MaxResumeNonce:
		return fmt.Errorf("resume-nonce: %d is not between 0 and %d", s.resumeNonce, crypto.MaxResumeNonce)
	case s.maxFlows > fastpath.MostFlows:
		return fmt.Errorf("max-flows: %d is more than the %d that the maps hold", s.maxFlows, fastpath.MostFlows)
	case s.maxHalfOpen > fastpath.MostFlows:
		return fmt.Errorf("max-half-open: %d is more than the %d connections that the maps hold", s.maxHalfOpen, fastpath.MostFlows)
	case s.memory != 0 && (s.memory < fastpath.LeastMemory || s.memory > maxMemory):
		return fmt.Errorf("memory: %d is not between %d and %d", s.memory, fastpath.LeastMemory, maxMemory)
	case s.umemChunks != 0 && (s.umemChunks < fastpath.LeastChunks || s.umemChunks > fastpath.MostChunks):
		return fmt.Errorf("umem-chunks: %d is not between %d and %d", s.umemChunks, fastpath.LeastChunks, fastpath.MostChunks)
	case s.rekeyEvery < 0:
		return fmt.Errorf("rekey-every: %v is negative", s.rekeyEvery)
	case s.guard.value == fastpath.GuardOff && s.keepGuard:
		return errors.New("keep-guard: there is nothing to keep with guard = \"off\"")
	case s.guard.value == fastpath.GuardOff && s.requires():
		return errors.New("guard: \"off\" would let connections be plain that require says must not be, whenever the daemon does not run")
	case s.drain < 0:
		return fmt.Errorf("drain-timeout: %v is negative", s.drain)
	}
	return nil
}

func (s *settings) requires() bool {
	return s.require || slices.ContainsFunc(s.rules, func(r fastpath.Rule) bool { return r.Policy.Verdict == slowpath.Require })
}

func (s *settings) hostConfig(log *slog.Logger) fastpath.HostConfig {
	return fastpath.HostConfig{
		Interface: s.iface,
		Inner:     s.inner,
		Block:     s.bypass.value == "block",
		Mode:      s.mode.value,
		Queues:    s.queues.items,
		Workers:   s.workers,
		CPUs:      s.cpus.items,
		NUMA:      s.numa,
		Poll:      fastpath.Poll(slices.Index(s.poll.words, s.poll.value)),
		BusyPoll:  s.busyPoll,
		Ports:     s.ports.items,
		Exclude:   s.exclude.items,
		TEPs:      s.teps.items,
		AEADs:     s.aeads.items,
		NoResume:  s.noResume,
		Require:   s.require,

		ResumeNonce: s.resumeNonce,
		RekeyBytes:  uint64(s.rekeyBytes), RekeyFrames: uint64(s.rekeyFrames), RekeyEvery: s.rekeyEvery,
		MaxFlows: int(s.maxFlows), MaxHalfOpen: int(s.maxHalfOpen), Memory: int(s.memory), UmemChunks: int(s.umemChunks),
		TCPKeepalive: s.tcpKeepalive, KeepGuard: s.keepGuard,
		Guard: s.guard.value, GuardCgroup: s.guardCgroup, GuardPins: s.guardPins,
		Rules: s.rules,
		Log:   log,
	}
}

// applyFile sets every flag of fs that was not given on the command line from
// the key of the same name in the TOML file at path, and takes the file's rules.
func (s *settings) applyFile(fs *pflag.FlagSet, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("config: %w", pathError(err, path))
	}
	var keys map[string]any
	if err := toml.Unmarshal(text, &keys); err != nil {
		if at := (*toml.DecodeError)(nil); errors.As(err, &at) {
			line, column := at.Position()
			return fmt.Errorf("%s:%d:%d: %w", path, line, column, err)
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	if s.rules, err = parseRules(text); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	names := make([]string, 0, len(keys))
	for name := range keys {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if name == rulesKey {
			continue
		}
		f := fs.Lookup(name)
		if f == nil {
			return fmt.Errorf("%s: unknown key %q", path, name)
		}
		value, err := flagText(f.Value, keys[name])
		if err != nil {
			return fmt.Errorf("%s: %s: %w", path, name, err)
		}
		if f.Changed {
			continue
		}
		if err := f.Value.Set(value); err != nil {
			return fmt.Errorf("%s: %s: %w", path, name, valueError(err))
		}
	}
	return nil
}

// pathError names path once: the errors of package os already do.
func pathError(err error, path string) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return fmt.Errorf("%s: %w", path, pe.Err)
	}
	return err
}

// flagText turns the TOML value of a key into what its flag would be given. A
// list may be an array or the string that the flag takes.
func flagText(flag pflag.Value, value any) (string, error) {
	_, isList := flag.(interface{ isList() })
	isBool, isNumber := flag.Type() == "bool", flag.Type() == "int" || flag.Type() == numberType
	switch v := value.(type) {
	case bool:
		if isBool {
			return strconv.FormatBool(v), nil
		}
	case string:
		if !isBool {
			return v, nil
		}
	case int64:
		if isList || isNumber {
			return strconv.FormatInt(v, 10), nil
		}
	case []any:
		if !isList {
			break
		}
		parts := make([]string, len(v))
		for i, item := range v {
			switch item := item.(type) {
			case string:
				parts[i] = item
			case int64:
				parts[i] = strconv.FormatInt(item, 10)
			default:
				return "", errors.New("items must be strings or whole numbers")
			}
		}
		return strings.Join(parts, ","), nil
	}
	switch {
	case isBool:
		return "", errors.New("must be true or false")
	case isList:
		return "", errors.New("must be a string, a whole number or an array of them")
	case isNumber:
		return "", errors.New("must be a whole number or a string")
	case flag.Type() == "duration":
		return "", errors.New(`must be a string like "30s" or "1h"`)
	}
	return "", errors.New("must be a string")
}

// choice is a flag that takes one of a few words.
type choice struct {
	value string
	words []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.words, "|") }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.words, s) {
		return fmt.Errorf("%q is not one of %s", s, strings.Join(c.words, ", "))
	}
	c.value = s
	return nil
}

// list is a flag that takes items separated by commas, none of them twice.
type list[T comparable] struct {
	items    []T
	text     string
	parse    func(item string) ([]T, error)
	all      bool // the word "all" stands for no items
	optional bool // the list may be empty
}

func (l *list[T]) String() string { return l.text }
func (l *list[T]) Type() string   { return "LIST" }
func (l *list[T]) isList()        {}

func (l *list[T]) Set(s string) error {
	var items []T
	switch {
	case l.all && s == "all", l.optional && s == "":
	case s == "":
		return errors.New("the list is empty")
	default:
		for item := range strings.SplitSeq(s, ",") {
			item = strings.TrimSpace(item)
			parsed, err := l.parse(item)
			if err != nil {
				return err
			}
			for _, p := range parsed {
				if slices.Contains(items, p) {
					return fmt.Errorf("%q is in the list twice", item)
				}
				items = append(items, p)
			}
		}
	}
	l.items, l.text = items, s
	return nil
}

func join[T fmt.Stringer](items []T) string {
	texts := make([]string, len(items))
	for i, item := range items {
		texts[i] = item.String()
	}
	return strings.Join(texts, ",")
}

func one[T any](parse func(string) (T, error)) func(string) ([]T, error) {
	return func(s string) ([]T, error) {
		item, err := parse(s)
		return []T{item}, err
	}
}

func parseIndexes(s string) ([]int, error) {
	first, last, err := parseRange(s, 0, maxIndex)
	if err != nil {
		return nil, err
	}
	items := make([]int, 0, last-first+1)
	for i := first; i <= last; i++ {
		items = append(items, i)
	}
	return items, nil
}

// size is a flag that takes a number of bytes or of other things.
type size uint64

const numberType = "N"

func (n *size) Type() string { return numberType }

func (n *size) String() string {
	if *n == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(*n), 10)
}

func (n *size) Set(s string) error {
	digits, shift := s, 0
	if i := strings.IndexAny(s, "KMGT"); i >= 0 && i == len(s)-1 {
		digits, shift = s[:i], 10*(1+strings.IndexByte("KMGT", s[i]))
	}
	v, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || v == 0 || v > 1<<62>>shift {
		return fmt.Errorf("%q is not a number from 1 on, with K, M, G or T if need be", s)
	}
	*n = size(v << shift)
	return nil
}

func parsePorts(s string) ([]fastpath.PortRange, error) {
	first, last, err := parseRange(s, 1, 65535)
	return []fastpath.PortRange{{First: uint16(first), Last: uint16(last)}}, err
}

// parseRange reads "5" or "5-7", both within [lowest, highest].
func parseRange(s string, lowest, highest int) (first, last int, err error) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	first, err1 := strconv.Atoi(from)
	last, err2 := strconv.Atoi(to)
	switch {
	case err1 != nil || err2 != nil:
		return 0, 0, fmt.Errorf("%q is not a number or a range like 4-7", s)
	case first < lowest || first > highest || last < lowest || last > highest:
		return 0, 0, fmt.Errorf("%q is not within %d-%d", s, lowest, highest)
	case first > last:
		return 0, 0, fmt.Errorf("%q is a range that ends before it starts", s)
	}
	return first, last, nil
}
