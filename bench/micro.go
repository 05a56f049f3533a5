package bench

import (
	"crypto/rand"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// MicroRow is one figure of the Micro suite.
type MicroRow struct {
	Name   string  `json:"name"`
	Bytes  int     `json:"bytes,omitempty"` // data bytes of a frame
	NsPer  float64 `json:"ns_per_op"`
	GBps   float64 `json:"gb_per_s,omitempty"`
	Allocs float64 `json:"allocs_per_op"`
}

// session returns the two ends of an established session with random keys.
func session(aead crypto.AEAD) (a, b *crypto.Session, err error) {
	var r [160]byte
	if _, err := rand.Read(r[:]); err != nil {
		return nil, nil, err
	}
	mk := func(role crypto.Role) *crypto.Session {
		return crypto.NewSession(role, aead, byte(crypto.TEPX25519), r[:16], r[16:48], r[48:80], r[80:112], r[112:144])
	}
	return mk(crypto.RoleA), mk(crypto.RoleB), nil
}

// Micro measures sealing and opening of single frames and key agreement.
func Micro() ([]MicroRow, error) {
	var rows []MicroRow
	for _, aead := range crypto.AllAEADs {
		for _, n := range []int{1, 64, 1440, 16000} {
			a, b, err := session(aead)
			if err != nil {
				return nil, err
			}
			ks, kr := a.SendKey(0), b.RecvKey(0)
			frame := make([]byte, n+crypto.Overhead)
			src := frame[crypto.FrameHeader : crypto.FrameHeader+1+n]
			row := func(name string, ns float64, fn func()) {
				rows = append(rows, MicroRow{Name: name + "-" + aead.String(), Bytes: n, NsPer: ns, GBps: float64(n) / ns, Allocs: testing.AllocsPerRun(100, fn)})
			}
			seal := func() { ks.Seal(frame, src, 0, 0) }
			sealNs := perOp(seal)
			row("seal", sealNs, seal)
			sealed := make([]byte, len(frame))
			ks.Seal(frame, src, 0, 0)
			copy(sealed, frame)
			// Opening destroys the frame: the copy that restores it is timed
			// apart and taken off.
			restore := func() { copy(frame, sealed) }
			open := func() {
				copy(frame, sealed)
				kr.Open(frame, 0)
			}
			row("open", perOp(open)-perOp(restore), open)
		}
	}
	for _, tep := range crypto.AllTEPs {
		k, err := crypto.GenerateKey(tep, rand.Reader)
		if err != nil {
			return nil, err
		}
		peer := k.Public(false)
		agree := func() {
			if k, err := crypto.GenerateKey(tep, rand.Reader); err == nil {
				_, _, _ = k.Shared(peer)
			}
		}
		rows = append(rows, MicroRow{Name: "keyagreement-" + tep.String(), NsPer: perOp(agree), Allocs: testing.AllocsPerRun(3, agree)})
	}
	return rows, nil
}

// perOp runs fn for about 20 ms, five times, and returns the fastest in ns.
func perOp(fn func()) float64 {
	n := 1
	for {
		t := time.Now()
		for range n {
			fn()
		}
		if d := time.Since(t); d > 20*time.Millisecond {
			break
		}
		n *= 2
	}
	best := 0.0
	for range 5 {
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
