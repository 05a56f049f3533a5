package xdp

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
)

// flowMap is an eBPF map of connections with the map of the address pairs that
// have any, as both the diverter and the guard have it. Any goroutine
// may use it.
type flowMap struct {
	flows, pairs *ebpf.Map
	listing      *ebpf.Map // 1 while anything is listed; nil: nobody asks

	n     atomic.Int64
	mu    sync.Mutex
	users map[[32]byte]uint32 // connections of a pair
}

func newFlowMap(flows, pairs *ebpf.Map) *flowMap {
	return &flowMap{flows: flows, pairs: pairs, users: make(map[[32]byte]uint32)}
}

// insert lists a connection or changes the value of a listed one. The pair
// comes first: while the connection is listed, its fragments are dropped. Before
// it, if this is the first, the programs are told to look at all.
func (m *flowMap) insert(key FlowKey, value uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.flows.Update(key, value, ebpf.UpdateExist)
	if err == nil {
		return nil
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return m.wrap("update", key, err)
	}
	if m.n.Load() == 0 {
		if err := m.setListing(1); err != nil {
			return err
		}
	}
	pair := [32]byte(key[:32])
	if m.users[pair] == 0 {
		if err := m.pairs.Put(pair, uint32(1)); err != nil {
			return m.wrap("insert addresses of", key, err)
		}
	}
	m.users[pair]++
	if err := m.flows.Put(key, value); err != nil {
		return errors.Join(m.wrap("insert", key, err), m.releasePair(pair))
	}
	m.n.Add(1)
	return nil
}

// delete unlists a connection; that it is not listed is no error.
func (m *flowMap) delete(key FlowKey) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.flows.Delete(key)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return m.wrap("delete", key, err)
	}
	n := m.n.Add(-1)
	if err := m.releasePair([32]byte(key[:32])); err != nil || n > 0 {
		return err
	}
	return m.setListing(0)
}

func (m *flowMap) setListing(v uint32) error {
	if m.listing == nil {
		return nil
	}
	if err := m.listing.Put(uint32(0), v); err != nil {
		return fmt.Errorf("xdp: tell eBPF programs whether connections are listed: %w", err)
	}
	return nil
}

// keys lists the connections.
func (m *flowMap) keys() (keys []FlowKey, err error) {
	var key FlowKey
	var value uint32
	entries := m.flows.Iterate()
	for entries.Next(&key, &value) {
		keys = append(keys, key)
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("xdp: list connections of an earlier process: %w", err)
	}
	return keys, nil
}

// adopt takes over what the maps list, whoever put it there, and returns the
// connections. Address pairs that have none any more are unlisted.
func (m *flowMap) adopt() ([]FlowKey, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys, err := m.keys()
	if err != nil {
		return nil, err
	}
	clear(m.users)
	for _, key := range keys {
		m.users[[32]byte(key[:32])]++
	}
	m.n.Store(int64(len(keys)))
	var unused [][32]byte
	var pair [32]byte
	var value uint32
	entries := m.pairs.Iterate()
	for entries.Next(&pair, &value) {
		if m.users[pair] == 0 {
			unused = append(unused, pair)
		}
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("xdp: list address pairs of an earlier process: %w", err)
	}
	for _, pair := range unused {
		if err := m.pairs.Delete(pair); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("xdp: delete address pair from eBPF map: %w", err)
		}
	}
	return keys, nil
}

func (m *flowMap) releasePair(pair [32]byte) error {
	if m.users[pair]--; m.users[pair] > 0 {
		return nil
	}
	delete(m.users, pair)
	if err := m.pairs.Delete(pair); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("xdp: delete address pair from eBPF map: %w", err)
	}
	return nil
}

func (m *flowMap) wrap(what string, key FlowKey, err error) error {
	local, remote, _ := SplitFlowKey(key)
	return fmt.Errorf("xdp: %s flow %v-%v in eBPF map: %w", what, local, remote, err)
}

// readCounters sums a per-CPU array over the CPUs, by name.
func readCounters(m *ebpf.Map, names []string) (map[string]uint64, error) {
	out := make(map[string]uint64, len(names))
	var perCPU []uint64
	for i, name := range names {
		if err := m.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("xdp: read eBPF counter %s: %w", name, err)
		}
		var sum uint64
		for _, n := range perCPU {
			sum += n
		}
		out[name] = sum
	}
	return out, nil
}
