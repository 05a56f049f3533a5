package bench

import (
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// MicroRow is one figure of the Micro suite.
type MicroRow struct {
	Name   string  `json:"name"`
	Bytes  int     `json:"bytes,omitempty"`  // data bytes of a frame, or of what is summed
	Keys   int     `json:"keys,omitempty"`   // keys that take turns in random order
	Engine string  `json:"engine,omitempty"` // AEAD engine
	NsPer  float64 `json:"ns_per_op"`
	GBps   float64 `json:"gb_per_s,omitempty"`
	Allocs float64 `json:"allocs_per_op"`
}

// MicroOptions says what Micro measures. The zero value is all of it.
type MicroOptions struct {
	Engines []string      // AEAD engines; all that the machine has if empty
	Keys    []int         // numbers of keys
	Time    time.Duration // spent on each figure
	Log     func(string)  // told of what begins; may be nil
}

// microSizes are lengths of data in bytes.
var microSizes = []int{1, 64, 256, 1440, 4096, 9000, 16384}

// session returns the two ends of an established session with random keys.
func session(aead crypto.AEAD) (a, b *crypto.Session, err error) {
	var r [160]byte
	if _, err := rand.Read(r[:]); err != nil {
		return nil, nil, err
	}
	return sessionEnd(aead, crypto.RoleA, &r), sessionEnd(aead, crypto.RoleB, &r), nil
}

func sessionEnd(aead crypto.AEAD, role crypto.Role, r *[160]byte) *crypto.Session {
	return crypto.NewSession(role, aead, byte(crypto.TEPX25519), r[:16], r[16:48], r[48:80], r[80:112], r[112:144])
}

// Micro measures single operations: sealing and opening vectors of frames with
// each AEAD engine and number of keys, checksums, the ENO codec, key agreement
// and the key schedule. It changes the AEAD engine meanwhile, so no session may
// be made elsewhere.
func Micro(o MicroOptions) ([]MicroRow, error) {
	if len(o.Engines) == 0 {
		o.Engines = crypto.Engines()
	}
	if len(o.Keys) == 0 {
		o.Keys = []int{1, 1000, 100_000}
	}
	if o.Time == 0 {
		o.Time = 60 * time.Millisecond
	}
	if o.Log == nil {
		o.Log = func(string) {}
	}
	rows, err := o.frames()
	if err != nil {
		return nil, err
	}
	rows = append(rows, o.headers()...)
	more, err := o.handshake()
	return append(rows, more...), err
}

func (o *MicroOptions) frames() (rows []MicroRow, err error) {
	was := crypto.EngineName()
	defer func() {
		if e := crypto.SetEngine(was); err == nil {
			err = e
		}
	}()
	for _, aead := range crypto.AllAEADs {
		engines, keys := o.Engines, o.Keys
		if aead != crypto.AES128GCM {
			keys = keys[:1]
		}
		if aead == crypto.ChaCha20Poly1305 {
			engines = engines[len(engines)-1:] // they leave it to the same library
		}
		for _, n := range keys {
			o.Log(fmt.Sprintf("%v, %d keys", aead, n))
			var sets []*keySet
			for _, engine := range engines {
				s, err := newKeySet(engine, aead, n)
				if err != nil {
					return nil, err
				}
				sets = append(sets, s)
			}
			for _, size := range microSizes {
				rows = append(rows, o.vectors(aead, sets, n, size)...)
			}
		}
	}
	return rows, nil
}

// keySet are keys of one engine, in the order in which they take turns.
type keySet struct {
	engine string
	keys   []*crypto.Key
	next   int
}

// newKeySet makes n keys that are equal in content, so that each opens what
// another sealed, but lie at different places in memory.
func newKeySet(engine string, aead crypto.AEAD, n int) (*keySet, error) {
	if err := crypto.SetEngine(engine); err != nil {
		return nil, err
	}
	s := &keySet{engine: engine, keys: make([]*crypto.Key, n)}
	for i := range s.keys {
		s.keys[i] = sessionEnd(aead, crypto.RoleA, new([160]byte)).SendKey(0)
	}
	mrand.Shuffle(n, func(i, j int) { s.keys[i], s.keys[j] = s.keys[j], s.keys[i] })
	return s, nil
}

func (s *keySet) take() *crypto.Key {
	k := s.keys[s.next]
	s.next = (s.next + 1) % len(s.keys)
	return k
}

// vectors measures sealing and opening of vectors with each set of keys. The
// sets take turns, and for each the fastest vector counts: whoever else uses the
// machine disturbs all of them alike.
func (o *MicroOptions) vectors(aead crypto.AEAD, sets []*keySet, keys, size int) []MicroRow {
	n := max(16, min(1024, 1<<18/(size+64)))
	seals, opens := make([]crypto.SealOp, n), make([]crypto.OpenOp, n)
	stride := (size + crypto.Overhead + 63) &^ 63
	mem, sealed := make([]byte, n*stride), make([]byte, n*stride)
	for i := range n {
		frame := mem[i*stride:][:size+crypto.Overhead]
		seals[i] = crypto.SealOp{Dst: frame, Src: frame[crypto.FrameHeader:][:1+size], Offset: uint64(i)}
		opens[i] = crypto.OpenOp{Frame: frame, Offset: uint64(i)}
	}
	best := make([][2]time.Duration, len(sets))
	for spent, rounds := time.Duration(0), 0; spent < o.Time || rounds < 3; rounds++ {
		for i, s := range sets {
			for j := range n {
				k := s.take()
				seals[j].Key, opens[j].Key = k, k
			}
			for k, f := range []func(){func() { crypto.SealVec(seals) }, func() { crypto.OpenVec(opens) }} {
				// The other operation would have left the keys in the cache.
				if keys > 1 && k == 1 {
					copy(sealed, mem)
					for j := range n {
						opens[j].Key = s.take()
					}
					copy(mem, sealed)
				}
				t := time.Now()
				f()
				d := time.Since(t)
				if best[i][k] == 0 || d < best[i][k] {
					best[i][k] = d
				}
				if i == 0 {
					spent += d
				}
			}
		}
	}
	var rows []MicroRow
	for i, s := range sets {
		for j := range n {
			seals[j].Key, opens[j].Key = s.take(), s.keys[0]
		}
		for k, verb := range []string{"seal", "open"} {
			ns := float64(best[i][k].Nanoseconds()) / float64(n)
			allocs := testing.AllocsPerRun(3, func() { crypto.SealVec(seals) })
			if k == 1 {
				allocs = testing.AllocsPerRun(3, func() { crypto.OpenVec(opens) })
			}
			rows = append(rows, MicroRow{
				Name: verb + "-" + aead.String(), Bytes: size, Keys: keys, Engine: s.engine,
				NsPer: ns, GBps: float64(size) / ns, Allocs: allocs / float64(n),
			})
		}
	}
	return rows
}

// single measures one operation on n bytes, 0 if it has no length.
func (o *MicroOptions) single(name string, n int, fn func()) MicroRow {
	ns := perOp(o.Time, fn)
	r := MicroRow{Name: name, Bytes: n, NsPer: ns, Allocs: testing.AllocsPerRun(10, fn)}
	if n > 0 {
		r.GBps = float64(n) / ns
	}
	return r
}

func (o *MicroOptions) headers() (rows []MicroRow) {
	o.Log("checksum, ENO codec")
	for _, n := range microSizes {
		b := make([]byte, n)
		rows = append(rows, o.single("checksum", n, func() { packet.Sum(b, 0) }))
	}
	buf := make([]byte, 0, packet.MaxOptions)
	offer := func() { buf = slowpath.AppendOffer(buf[:0], 0, crypto.AllTEPs, slowpath.Suboption{}) }
	rows = append(rows, o.single("eno-offer", 0, offer))
	return append(rows, o.single("eno-parse", 0, func() { _, _ = slowpath.ParseENO(buf) }))
}

func (o *MicroOptions) handshake() (rows []MicroRow, err error) {
	o.Log("key agreement, key schedule")
	for _, tep := range crypto.AllTEPs {
		k, err := crypto.GenerateKey(tep, rand.Reader)
		if err != nil {
			return nil, err
		}
		peer := k.Public(false)
		rows = append(rows, o.single("keyagreement-"+tep.String(), 0, func() {
			if k, err := crypto.GenerateKey(tep, rand.Reader); err == nil {
				_, _, _ = k.Shared(peer)
			}
		}))
	}
	for _, aead := range crypto.AllAEADs {
		var r [160]byte
		row := o.single("keyschedule-"+aead.String(), 0, func() {
			s := sessionEnd(aead, crypto.RoleA, &r)
			s.SendKey(0)
			s.RecvKey(0)
		})
		row.Engine = crypto.EngineName()
		rows = append(rows, row)
	}
	return rows, nil
}

// perOp runs fn for about the time given, in twenty parts, and returns the
// fastest in ns.
func perOp(total time.Duration, fn func()) float64 {
	n := 1
	for part := total / 20; ; n *= 2 {
		t := time.Now()
		for range n {
			fn()
		}
		if time.Since(t) > part/2 {
			break
		}
	}
	best := 0.0
	for range 20 {
		t := time.Now()
		for range n {
			fn()
		}
		if ns := float64(time.Since(t).Nanoseconds()) / float64(n); best == 0 || ns < best {
			best = ns
		}
	}
	return best
}
