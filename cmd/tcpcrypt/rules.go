package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// rulesKey is the key of the file's rules, the only one that is no flag.
const rulesKey = "rule"

// ruleText is a rule as it stands in the file. All conditions must hold.
type ruleText struct {
	Local       string `toml:"local"`
	Remote      string `toml:"remote"`
	LocalPorts  any    `toml:"local-ports"`
	RemotePorts any    `toml:"remote-ports"`
	Action      string `toml:"action"`
	Resume      *bool  `toml:"resume"`
	Cache       *bool  `toml:"cache"`
	Role        string `toml:"role"`
	AppAware    string `toml:"app-aware"`
}

// parseRules reads the rules of the file's text, in their order.
func parseRules(text []byte) ([]fastpath.Rule, error) {
	if err := knownKeys(text); err != nil {
		return nil, err
	}
	var file struct {
		Rules []ruleText `toml:"rule"`
	}
	if err := toml.Unmarshal(text, &file); err != nil {
		return nil, fmt.Errorf("%s: %w", rulesKey, err)
	}
	var rules []fastpath.Rule
	for i := range file.Rules {
		r, err := file.Rules[i].rule()
		if err != nil {
			return nil, fmt.Errorf("%s %d: %w", rulesKey, i+1, err)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// knownKeys refuses misspelt keys of rules: a rule that says less than its
// author thinks matches too much.
func knownKeys(text []byte) error {
	var file struct {
		Rules []map[string]any `toml:"rule"`
	}
	if err := toml.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("%s: it must be an array of tables: [[rule]]", rulesKey)
	}
	keys := []string{"local", "remote", "local-ports", "remote-ports", "action", "resume", "cache", "role", "app-aware"}
	for i, r := range file.Rules {
		for k := range r {
			if !slices.Contains(keys, k) {
				return fmt.Errorf("%s %d: unknown key %q", rulesKey, i+1, k)
			}
		}
	}
	return nil
}

func (t *ruleText) rule() (r fastpath.Rule, err error) {
	if r.Local, err = parsePrefix(t.Local); err != nil {
		return r, fmt.Errorf("local: %w", err)
	}
	if r.Remote, err = parsePrefix(t.Remote); err != nil {
		return r, fmt.Errorf("remote: %w", err)
	}
	if r.Local.IsValid() && r.Remote.IsValid() && r.Local.Addr().Is4() != r.Remote.Addr().Is4() {
		return r, fmt.Errorf("local is %v and remote %v: no connection has an IPv4 and an IPv6 address", r.Local, r.Remote)
	}
	if r.LocalPorts, err = rulePorts(t.LocalPorts); err != nil {
		return r, fmt.Errorf("local-ports: %w", err)
	}
	if r.RemotePorts, err = rulePorts(t.RemotePorts); err != nil {
		return r, fmt.Errorf("remote-ports: %w", err)
	}
	p := &r.Policy
	p.NoResume = t.Resume != nil && !*t.Resume
	p.NoCache = t.Cache != nil && !*t.Cache
	if p.Verdict, err = word(t.Action, "action", []string{"encrypt", "require", "plain"}, slowpath.Encrypt, slowpath.Require, slowpath.Plain); err != nil {
		return r, err
	}
	if p.PassiveRole, err = word(t.Role, "role", []string{"A", "B"}, false, true); err != nil {
		return r, err
	}
	p.AppAware, err = word(t.AppAware, "app-aware", []string{"off", "on", "mandatory"}, slowpath.AppAwareOff, slowpath.AppAwareOn, slowpath.AppAwareMandatory)
	return r, err
}

// word turns one of several words into its value; none is the first.
func word[T any](s, key string, words []string, values ...T) (v T, err error) {
	if s == "" {
		return values[0], nil
	}
	i := slices.Index(words, s)
	if i < 0 {
		return v, fmt.Errorf("%s: %q is not one of %s", key, s, strings.Join(words, ", "))
	}
	return values[i], nil
}

// parsePrefix reads a prefix or an address; the empty text is the zero Prefix,
// which matches everything.
func parsePrefix(s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not an address or a prefix like 192.0.2.0/24 or 2001:db8::/32", s)
	case p != p.Masked():
		return p, fmt.Errorf("%q has bits beyond the prefix, did you mean %v?", s, p.Masked())
	}
	return p, nil
}

// rulePorts reads ports as the flags take them.
func rulePorts(v any) ([]fastpath.PortRange, error) {
	if v == nil {
		return nil, nil
	}
	l := list[fastpath.PortRange]{parse: parsePorts, all: true}
	text, err := flagText(&l, v)
	if err != nil {
		return nil, err
	}
	err = l.Set(text)
	return l.items, err
}
