package slowpath

import (
	"sync"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// Key agreement with P-521 costs milliseconds, with X448 a quarter of one, so
// strangers get only so many in a second: about a fifth and a tenth of one CPU.
const (
	p521PerSecond = 64
	x448PerSecond = 512
)

// A Limiter bounds the costly key agreements that peers can cause. Several
// Machines may share one; it may be used from any goroutine.
type Limiter struct {
	mu         sync.Mutex
	p521, x448 bucket
}

// NewLimiter returns a Limiter whose buckets are full.
func NewLimiter() *Limiter {
	return &Limiter{
		p521: bucket{rate: p521PerSecond, tokens: p521PerSecond},
		x448: bucket{rate: x448PerSecond, tokens: x448PerSecond},
	}
}

// take reports whether an agreement with the TEP may be computed, and counts it.
func (l *Limiter) take(tep crypto.TEP, now time.Duration) bool {
	var b *bucket
	switch tep {
	case crypto.TEPP521:
		b = &l.p521
	case crypto.TEPX448:
		b = &l.x448
	default:
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return b.take(now)
}

// bucket is a token bucket that holds what comes in one second.
type bucket struct {
	rate   int // tokens a second
	tokens int
	last   time.Duration
}

func (b *bucket) take(now time.Duration) bool {
	period := time.Second / time.Duration(b.rate)
	if n := int64((now - b.last) / period); n > 0 {
		b.tokens = int(min(int64(b.tokens)+n, int64(b.rate)))
		b.last += time.Duration(n) * period
	}
	if b.tokens == 0 {
		return false
	}
	b.tokens--
	return true
}
