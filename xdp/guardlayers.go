package xdp

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp/bpf"
)

// ErrGuardIncomplete: a layer of the guard that must be there cannot be had.
var ErrGuardIncomplete = errors.New("xdp: the guard is incomplete")

// The names of the guard's layers.
const (
	LayerInterface = "interface" // filters on the guarded interface
	LayerNetfilter = "netfilter" // hooks of the network namespace, behind reassembly
	LayerCgroup    = "cgroup"    // the sockets of the network namespace
)

// A GuardLayer tells of one layer of a Guard.
type GuardLayer struct {
	Name       string
	Active     bool
	Persistent bool   // it outlives the process
	Reason     string // why it is not active, or not persistent
}

const (
	// The first priority that is tried for the netfilter hooks, behind address
	// translation; two BPF programs cannot have the same.
	netfilterPriority   = 900
	netfilterPriorities = 64
	// BPF_F_NETFILTER_IP_DEFRAG; the constant of package link is 0.
	netfilterDefrag = 1
)

// innerLayers are the layers behind the interface's own filters, which see what
// comes and goes by any other way.
type innerLayers struct {
	layers      []GuardLayer
	collections []*ebpf.Collection
	links       []link.Link
	pins        string // directory of the links' pins, "" without
}

// open loads and attaches what can be had, with the maps of the first layer.
// pins is the directory, made here, in which the links are pinned; pinsErr says
// why there is none.
func (l *innerLayers) open(shared map[string]*ebpf.Map, tag uint16, cgroup, pins string, pinsErr error) {
	if pinsErr == nil {
		if pinsErr = makePins(pins); pinsErr == nil {
			l.pins = pins
		}
	}
	for _, layer := range []struct {
		name   string
		attach func(map[string]*ebpf.Map, uint16) error
	}{
		{LayerNetfilter, l.attachNetfilter},
		{LayerCgroup, func(shared map[string]*ebpf.Map, tag uint16) error { return l.attachCgroup(shared, tag, cgroup) }},
	} {
		state := GuardLayer{Name: layer.name, Active: true, Persistent: pinsErr == nil}
		first := len(l.links)
		if err := layer.attach(shared, tag); err != nil {
			l.detach(first)
			state = GuardLayer{Name: layer.name, Reason: err.Error()}
		} else if pinsErr != nil {
			state.Reason = "it ends with the daemon: " + pinsErr.Error()
		}
		l.layers = append(l.layers, state)
	}
}

// load loads an object of the guard with the maps of the first one.
func (l *innerLayers) load(spec *ebpf.CollectionSpec, err error, shared map[string]*ebpf.Map, variables map[string]any) (*ebpf.Collection, error) {
	if err != nil {
		return nil, fmt.Errorf("read eBPF object: %w", err)
	}
	for name, value := range variables {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set eBPF variable %s: %w", name, err)
		}
	}
	replace := make(map[string]*ebpf.Map)
	for name := range spec.Maps {
		if strings.HasPrefix(name, "guard_") {
			replace[name] = shared[name]
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return nil, err
	}
	l.collections = append(l.collections, c)
	return c, nil
}

// add keeps a link, pinned if there is where.
func (l *innerLayers) add(name string, made link.Link) error {
	l.links = append(l.links, made)
	if l.pins == "" {
		return nil
	}
	return made.Pin(filepath.Join(l.pins, name))
}

func (l *innerLayers) attachNetfilter(shared map[string]*ebpf.Map, tag uint16) error {
	spec, err := bpf.LoadGuardNetfilter()
	c, err := l.load(spec, err, shared, map[string]any{"tag": tag})
	if err != nil {
		return layerError("the kernel cannot run it (Linux 6.6, CONFIG_NETFILTER_BPF_LINK, CONFIG_DEBUG_INFO_BTF)", err)
	}
	families := []link.NetfilterProtocolFamily{link.NetfilterProtoIPv4}
	if _, err := os.Stat("/proc/thread-self/net/if_inet6"); err == nil {
		families = append(families, link.NetfilterProtoIPv6)
	}
	for _, family := range families {
		in := link.NetfilterOptions{ProtocolFamily: family, Hook: link.NetfilterInetLocalIn, Program: c.Programs["guard_local_in"]}
		name := "4"
		if family == link.NetfilterProtoIPv6 {
			// IPv4 reassembles before the hook, IPv6 behind it.
			name, in.NetfilterFlags = "6", netfilterDefrag
		}
		out := link.NetfilterOptions{ProtocolFamily: family, Hook: link.NetfilterInetPostRouting, Program: c.Programs["guard_postrouting"]}
		for i, options := range []link.NetfilterOptions{in, out} {
			made, err := attachAnyPriority(options)
			if err != nil {
				return layerError("the kernel cannot attach it (CONFIG_NETFILTER_BPF_LINK, CONFIG_NF_DEFRAG_IPV6)", err)
			}
			if err := l.add([]string{"netfilter_in", "netfilter_out"}[i]+name, made); err != nil {
				return err
			}
		}
	}
	return nil
}

func attachAnyPriority(options link.NetfilterOptions) (made link.Link, err error) {
	for options.Priority = netfilterPriority; options.Priority < netfilterPriority+netfilterPriorities; options.Priority++ {
		if made, err = link.AttachNetfilter(options); !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	return made, err
}

func (l *innerLayers) attachCgroup(shared map[string]*ebpf.Map, tag uint16, dir string) error {
	cookie, err := netnsCookie()
	if err != nil {
		return err
	}
	cgroup, err := openCgroup(dir)
	if err != nil {
		return err
	}
	defer cgroup.Close()
	spec, err := bpf.LoadGuardCgroup()
	c, err := l.load(spec, err, shared, map[string]any{"tag": tag, "netns": cookie})
	if err != nil {
		return layerError("the kernel cannot run it (Linux 6.15, CONFIG_CGROUP_BPF)", err)
	}
	for _, hook := range []struct {
		name, program string
		at            ebpf.AttachType
	}{
		{"cgroup_in", "guard_socket_in", ebpf.AttachCGroupInetIngress},
		{"cgroup_out", "guard_socket_out", ebpf.AttachCGroupInetEgress},
	} {
		made, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: c.Programs[hook.program], Attach: hook.at})
		switch {
		case errors.Is(err, unix.E2BIG):
			return layerError("too many programs are attached to the cgroup", err)
		case err != nil:
			return layerError("the kernel cannot attach it (CONFIG_CGROUP_BPF)", err)
		}
		if err := l.add(hook.name, made); err != nil {
			return err
		}
	}
	return nil
}

// layerError is one line that says what a user can change.
func layerError(reason string, err error) error {
	text, _, _ := strings.Cut(err.Error(), "\n")
	return fmt.Errorf("%s: %s", reason, text)
}

// detach ends the links from the n-th on.
func (l *innerLayers) detach(n int) {
	for _, made := range l.links[n:] {
		_ = made.Unpin()
		_ = made.Close()
	}
	l.links = l.links[:n]
}

// remove ends the layers.
func (l *innerLayers) remove() error {
	l.detach(0)
	l.close()
	return removePins(l.pins)
}

// close leaves the layers that are pinned in force.
func (l *innerLayers) close() {
	for _, made := range l.links {
		_ = made.Close()
	}
	for _, c := range l.collections {
		c.Close()
	}
	l.links, l.collections = nil, nil
}

// Pins are in BASE/tcpcrypt/NETNS/INTERFACE_GENERATION: the cookie of the
// network namespace, the index of the interface, and the identifier of the map
// of connections, which make two guards' differ.
const pinsDir = "tcpcrypt"

func pinsOfNamespace(base string) (string, error) {
	cookie, err := netnsCookie()
	if err != nil {
		return "", err
	}
	return filepath.Join(base, pinsDir, strconv.FormatUint(cookie, 10)), nil
}

// makePins makes a directory of pins. Another process may just be removing one
// above it that was empty.
func makePins(dir string) (err error) {
	for range 10 {
		if err = os.MkdirAll(dir, 0o700); !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	return err
}

// oldPins returns the directories of pins that earlier processes left in the
// network namespace for the interface, or for one that is gone.
func oldPins(space string, ifindex int, exists func(ifindex int) bool) ([]string, error) {
	entries, err := os.ReadDir(space)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list the pins of earlier guards: %w", err)
	}
	var found []string
	for _, e := range entries {
		index, _, _ := strings.Cut(e.Name(), "_")
		if n, err := strconv.Atoi(index); err == nil && (n == ifindex || !exists(n)) {
			found = append(found, filepath.Join(space, e.Name()))
		}
	}
	return found, nil
}

// pinnedPrograms returns the programs of the links that are pinned in a
// directory.
func pinnedPrograms(dir string) (programs []ebpf.ProgramID, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the pins of an earlier guard: %w", err)
	}
	for _, e := range entries {
		l, err := link.LoadPinnedLink(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			return nil, fmt.Errorf("open a link of an earlier guard: %w", err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			return nil, fmt.Errorf("read a link of an earlier guard: %w", err)
		}
		programs = append(programs, info.Program)
	}
	return programs, nil
}

// removePins unpins what is in a directory and removes it, and the directories
// above it that are empty then.
func removePins(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("unpin: %w", err)
	}
	for range 2 {
		if dir = filepath.Dir(dir); os.Remove(dir) != nil {
			break
		}
	}
	return nil
}
