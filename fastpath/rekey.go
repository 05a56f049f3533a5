package fastpath

import (
	"math"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// DefaultRekeyBytes is how many plaintext bytes one traffic key seals by
// default: what a stolen key discloses is bounded. It lies below every AEAD's
// own limit, which counts frames and holds beside it: 2^36 bytes are 2^32
// blocks of AES.
const DefaultRekeyBytes = 64 << 30

// Hard limits. They end a flow rather than be passed; no connection comes near
// them, since rekeying happens long before.
const (
	maxSealO = math.MaxInt64 // frame offset: half of what the nonce can count
	maxGen   = math.MaxUint32 - 1
)

// advanceTx takes the next sending key into use, if the frame that is about to
// be sealed has to be the first under it: as the answer to the peer, or because
// this side initiates rekeying (TC 3.8). An empty frame must not initiate while
// the peer still owes an answer, so it may be one more than the limit. The
// caller sets the frame's rekey bit.
func (e *Engine) advanceTx(f *flow, empty bool) bool {
	switch {
	case f.rxGen > f.txGen:
	case empty && f.txGen > f.rxGen:
		return false
	case f.rekeyNext, f.txKeyFrames >= f.keyFrames, f.txKeyBytes >= e.cfg.RekeyBytes:
	default:
		return false
	}
	// Operations already queued use the key that is given up now.
	e.runSeal()
	f.txGen++
	f.txKey = f.sess.SendKey(f.txGen)
	f.sess.AdvanceSend(f.txGen)
	f.txKeyFrames, f.txKeyBytes, f.rekeyNext = 0, 0, false
	f.disarm(timerRekey)
	f.rekeysOut++
	return true
}

// exhausted reports whether no further frame may be sealed.
func (f *flow) exhausted() bool { return f.sealO >= maxSealO || f.txGen >= maxGen }

// sealedData counts plaintext under the current key, whose time runs from the
// first byte.
func (e *Engine) sealedData(f *flow, n int) {
	f.txKeyBytes += uint64(n)
	if e.cfg.RekeyEvery > 0 && f.timers[timerRekey] == 0 {
		e.arm(f, timerRekey, e.now+e.cfg.RekeyEvery)
	}
}

// rekey initiates rekeying with an empty frame, and reports whether it did: one
// initiation at most is under way (TC 3.8), and after FINp there is none.
func (e *Engine) rekey(f *flow) bool {
	if f.state != flowLive || f.finSealed || f.txGen > f.rxGen || f.rxGenQ > f.txGen {
		return false
	}
	f.rekeyNext = true
	if !e.sealFrame(f, nil, source{}, 0, -1, true) {
		return false
	}
	f.ctlRTO, f.ctlTries = max(minRTO, 3*f.rtt), 0
	e.touch(f)
	return true
}

// Rekey initiates rekeying on the flow k, or on every flow when k is nil, and
// returns on how many: not on those that have a rekeying under way or have
// ended their sending half.
func (e *Engine) Rekey(k *packet.Key, now time.Duration) (n int) {
	e.now = now
	e.tab.each(func(f *flow) {
		if (k == nil || f.key == *k) && e.rekey(f) {
			n++
		}
	})
	e.flush()
	return n
}

// verify has the peer prove that it is alive: it must answer a frame of a new
// generation with one (TC 3.9). A forged ACK is no proof. It reports whether
// the peer can be asked: not after either end of stream, nor while a window is
// shut, also ours. The answer would have to wait behind the data that does not
// fit it until the application reads on.
func (e *Engine) verify(f *flow) bool {
	if e.cfg.TCPKeepalive || f.finSealed || f.finp || f.held || f.wndShownI == 0 || f.rxEdge < f.nxtO+uint64(f.rcvMSS) {
		return false
	}
	if f.txGen <= f.rxGen && !e.rekey(f) {
		return false
	}
	f.verifying = true
	return true
}

// verified takes an authentic frame of a new generation from the peer.
func (f *flow) verified() {
	if f.verifying && f.rxGen >= f.txGen {
		f.verifying, f.ackMustI = false, true
	}
}
