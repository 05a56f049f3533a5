package slowpath

import (
	"container/list"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Defaults and bounds of a Cache.
const (
	DefaultCacheChains = 65536
	DefaultCacheTTL    = 12 * time.Hour

	chainsPerPeer = 16 // of one address, so that nobody fills the cache alone; behind it may be many hosts
	lookahead     = 4  // secrets that the peer may skip
	maxUnused     = 16 // secrets of a chain that are kept for connections still on their way
)

// Cache keeps the session secrets ss[i] of earlier connections, so that later
// ones between the same hosts need no key agreement (RFC 8548 section 3.5). It
// lives in memory only: nothing of it survives a crash or a restart. A secret
// leaves it before it is used, so none is ever used twice.
//
// Times are on the clock of the Machines that share the Cache. All methods may
// be called from any goroutine; none belongs on the path of a packet.
type Cache struct {
	max int
	ttl time.Duration

	mu     sync.Mutex
	peers  map[[16]byte][]*chain // oldest first
	halves map[[crypto.ResumeLen]byte]*unused
	all    list.List // oldest first, which is also the order of expiry
	// Oldest first. Chains that never served are the first to go: a peer
	// that only opens connections must not evict those that come back.
	untried, proven list.List
}

// chain is what one key exchange left: the secrets derived from its ss[0].
type chain struct {
	peer    [16]byte
	port    uint16 // of the peer when it was the passive opener, else 0
	opened  bool   // the peer opened a connection of this chain, whatever port it has
	tep     crypto.TEP
	aead    crypto.AEAD
	role    crypto.Role // that this host had in the exchange
	born    time.Duration
	expires time.Duration

	secrets []*unused // by ascending i
	tail    *crypto.Secret
	tailI   uint32 // tail is ss[tailI], the first that is not in secrets
	used    uint32 // highest i that was taken

	proven bool
	age    *list.Element // in Cache.all; nil when the chain has left the cache
	elem   *list.Element // in Cache.untried or Cache.proven
}

// unused is a secret that may secure one connection.
type unused struct {
	c      *chain
	i      uint32
	secret *crypto.Secret
	theirs [crypto.ResumeLen]byte // half of the identifier that the peer sends
	kept   bool                   // this host was about to propose it, but did not
	named  bool                   // the peer proposed it
}

// ours returns the half of the identifier that this host sends.
func (u *unused) ours() [crypto.ResumeLen]byte { return u.secret.ResumeHalf(u.c.role) }

// suboption returns the resumption suboption that names u.
func (u *unused) suboption(nonce []byte) Suboption {
	half := u.ours()
	return Suboption{TEP: u.c.tep, V: true, Data: append(half[:], nonce...)}
}

// session makes the session of a connection that resumes with u, from the
// nonces of this host and of the peer, and erases the secret. The next one is
// known to the chain already: a copy in the session would outlive its use.
func (u *unused) session(tepByte byte, ourNonce, theirNonce []byte) *crypto.Session {
	sn := slices.Concat(ourNonce, theirNonce)
	if u.c.role == crypto.RoleB {
		sn = slices.Concat(theirNonce, ourNonce)
	}
	s := crypto.NewResumedSession(u.c.role, u.c.aead, tepByte, u.secret, sn)
	s.NextSecret().Erase()
	u.secret.Erase()
	return s
}

// CacheEntry describes a chain for people.
type CacheEntry struct {
	Peer    string  `json:"peer"`
	Port    uint16  `json:"port"` // that was connected to; 0: the peer opened the connection
	TEP     string  `json:"tep"`
	AEAD    string  `json:"aead"`
	Role    string  `json:"role"` // of this host in the key exchange
	Next    uint32  `json:"next"` // lowest i that was not used to negotiate
	Age     float64 `json:"age_s"`
	Expires float64 `json:"expires_s"` // seconds left
}

// NewCache returns a Cache for so many key exchanges, each kept for ttl; zero
// values stand for the defaults.
func NewCache(chains int, ttl time.Duration) *Cache {
	if chains <= 0 {
		chains = DefaultCacheChains
	}
	if ttl <= 0 {
		ttl = DefaultCacheTTL
	}
	return &Cache{
		max: chains, ttl: ttl,
		peers: make(map[[16]byte][]*chain), halves: make(map[[crypto.ResumeLen]byte]*unused),
	}
}

// List describes what is cached, oldest first.
func (c *Cache) List(now time.Duration) []CacheEntry {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(now)
	es := make([]CacheEntry, 0, c.all.Len())
	for e := c.all.Front(); e != nil; e = e.Next() {
		h := e.Value.(*chain)
		key := packet.Key{Remote: h.peer}
		es = append(es, CacheEntry{
			Peer: key.RemoteAddr().Addr().String(), Port: h.port, TEP: h.tep.String(), AEAD: h.aead.String(), Role: h.role.String(),
			Next: h.next().i, Age: (now - h.born).Seconds(), Expires: (h.expires - now).Seconds(),
		})
	}
	return es
}

// Expire erases what is too old. Every other use does so, too; a caller that
// calls it now and then keeps old secrets out of an idle host's memory.
func (c *Cache) Expire(now time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(now)
}

// Flush erases what is cached of a peer, or everything when peer is the zero
// Addr, and returns of how many key exchanges (RFC 8548 section 3.5).
func (c *Cache) Flush(peer netip.Addr) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for addr, chains := range c.peers {
		key := packet.Key{Remote: addr}
		if peer.IsValid() && key.RemoteAddr().Addr() != peer.Unmap() {
			continue
		}
		for _, h := range slices.Clone(chains) {
			c.remove(h)
			n++
		}
	}
	return n
}

// add keeps ss[1] of a key exchange with the peer of k. It takes over secret.
func (c *Cache) add(k *packet.Key, active bool, tep crypto.TEP, aead crypto.AEAD, role crypto.Role, secret *crypto.Secret, now time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(now)
	if old := c.peers[k.Remote]; len(old) >= chainsPerPeer {
		i := slices.IndexFunc(old, func(h *chain) bool { return !h.proven })
		c.remove(old[max(0, i)])
	}
	if c.all.Len() >= c.max {
		c.evict()
	}
	h := &chain{
		peer: k.Remote, tep: tep, aead: aead, role: role, born: now, expires: now + c.ttl,
		tail: secret, tailI: 1,
	}
	if active {
		h.port = k.RPort
	}
	h.age, h.elem = c.all.PushBack(h), c.untried.PushBack(h)
	c.peers[h.peer] = append(c.peers[h.peer], h)
	c.extend(h)
}

// extend derives the secrets that the peer may name next.
func (c *Cache) extend(h *chain) {
	for h.tailI <= h.used+lookahead {
		u := &unused{c: h, i: h.tailI, secret: h.tail, theirs: h.tail.ResumeHalf(h.role.Peer())}
		h.tail = u.secret.Next()
		h.tailI++
		h.secrets = append(h.secrets, u)
		c.halves[u.theirs] = u
	}
	for len(h.secrets) > maxUnused {
		u := h.secrets[0]
		c.take(u)
		u.secret.Erase()
	}
}

// take takes u out of its chain.
func (c *Cache) take(u *unused) {
	delete(c.halves, u.theirs)
	h := u.c
	h.secrets = slices.DeleteFunc(h.secrets, func(x *unused) bool { return x == u })
	h.used = max(h.used, u.i)
}

// propose takes the lowest unused secret to resume with the peer of k, for good;
// nil when there is none. The exchange was with that very endpoint, or the peer
// has opened a connection of the chain itself: behind other ports of the address
// may be other hosts, and those could want a key agreement that has no room
// beside the proposal. Newer exchanges come first.
func (c *Cache) propose(k *packet.Key, usable func(crypto.TEP, crypto.AEAD) bool, now time.Duration) *unused {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(now)
	var best *chain
	for _, h := range slices.Backward(c.peers[k.Remote]) {
		if h.expires <= now || !usable(h.tep, h.aead) {
			continue
		}
		if h.port == k.RPort {
			best = h
			break
		}
		if best == nil && (h.port == 0 || h.opened) {
			best = h
		}
	}
	if best == nil {
		return nil
	}
	u := best.next()
	c.take(u)
	c.extend(best)
	return u
}

// next returns the lowest secret that was not used to negotiate. The peer named
// secrets in order, too, so what lies below one that it named it has used,
// although that may still be on its way.
func (h *chain) next() *unused {
	i := slices.IndexFunc(h.secrets, func(u *unused) bool { return u.kept || u.i > h.used })
	return h.secrets[i]
}

// reserve takes the unused secret that the peer named by its half of the
// identifier; nil when there is none for that TEP. It is used when encryption is
// enabled, and goes back by restore when that does not come about.
func (c *Cache) reserve(half []byte, tep crypto.TEP, usable func(crypto.TEP, crypto.AEAD) bool, now time.Duration) *unused {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(now)
	u := c.halves[[crypto.ResumeLen]byte(half)]
	if u == nil || u.c.tep != tep || u.c.expires <= now || !usable(tep, u.c.aead) {
		return nil
	}
	c.take(u)
	c.extend(u.c)
	u.named = true
	return u
}

// keep puts back a secret that this host did not propose after all.
func (c *Cache) keep(u *unused) {
	u.kept = true
	c.restore(u)
}

// restore puts back a secret that the peer named and that was not used.
func (c *Cache) restore(u *unused) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := u.c
	if h.age == nil {
		u.secret.Erase()
		return
	}
	at, _ := slices.BinarySearchFunc(h.secrets, u.i, func(x *unused, i uint32) int { return int(int64(x.i) - int64(i)) })
	h.secrets = slices.Insert(h.secrets, at, u)
	u.named = false
	c.halves[u.theirs] = u
	c.extend(h)
}

// served notes that a connection resumed with u. That one may not want anything
// to be kept that comes of it.
func (c *Cache) served(u *unused, keep bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !keep {
		c.remove(u.c)
		return
	}
	u.c.opened = u.c.opened || u.named
	if h := u.c; h.age != nil && !h.proven {
		c.untried.Remove(h.elem)
		h.proven, h.elem = true, c.proven.PushBack(h)
	}
}

// refused forgets the key exchange that u comes from: the peer has.
func (c *Cache) refused(u *unused) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u.secret.Erase()
	c.remove(u.c)
}

// evict makes room for one chain.
func (c *Cache) evict() {
	if e := c.untried.Front(); e != nil {
		c.remove(e.Value.(*chain))
	} else if e := c.proven.Front(); e != nil {
		c.remove(e.Value.(*chain))
	}
}

// expire removes the chains whose time is over.
func (c *Cache) expire(now time.Duration) {
	for e := c.all.Front(); e != nil && e.Value.(*chain).expires <= now; e = c.all.Front() {
		c.remove(e.Value.(*chain))
	}
}

// remove erases a chain.
func (c *Cache) remove(h *chain) {
	if h.age == nil {
		return
	}
	if h.proven {
		c.proven.Remove(h.elem)
	} else {
		c.untried.Remove(h.elem)
	}
	c.all.Remove(h.age)
	h.age = nil
	for _, u := range h.secrets {
		delete(c.halves, u.theirs)
		u.secret.Erase()
	}
	h.secrets = nil
	h.tail.Erase()
	c.peers[h.peer] = slices.DeleteFunc(c.peers[h.peer], func(x *chain) bool { return x == h })
	if len(c.peers[h.peer]) == 0 {
		delete(c.peers, h.peer)
	}
}
