package fastpath

import (
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// A SYN that follows the last ACK of a flow in the same vector finds it closed,
// and begins another one.
func TestReusedInOneVector(t *testing.T) {
	opening := seg{o: 1 << 20, flags: packet.SYN, noAck: true}
	for name, last := range map[string]func(r *rig){
		"outer": func(r *rig) {
			r.inner(seg{flags: packet.FIN})
			r.outer(seg{data: r.seal(crypto.FlagFIN, nil), flags: packet.FIN, ack: -1})
			r.events = nil
			r.outerFrames(r.peerFrame(seg{o: int64(r.sealed) + 1, ack: int64(r.f.sealO)}), r.peerFrame(opening))
		},
		"inner": func(r *rig) {
			r.auto = false
			r.inner(seg{flags: packet.FIN})
			r.outer(seg{data: r.seal(crypto.FlagFIN, nil), flags: packet.FIN, ack: int64(r.f.sealO)})
			r.events = nil
			r.inner(seg{o: 1, ack: 1}, opening)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{})
			last(r)
			if len(r.events) != 3 || r.events[0].Kind != FlowEnded || r.events[0].Info.Reason != ReasonClosed ||
				r.events[1].Kind != FlowGone || r.events[1].Destroy || r.events[2].Kind != SlowFrame {
				t.Errorf("events %+v", r.events)
			}
		})
	}
}

// Flows that are gone are remembered for a while, and then forgotten.
func TestLately(t *testing.T) {
	var l lately
	k, other := packet.Key{LPort: 1}, packet.Key{LPort: 2}
	now := 10 * lateFor
	l.add(k, now)
	for ; now < 11*lateFor; now += lateFor / 4 {
		if l.add(other, now); !l.has(k, now) {
			t.Errorf("forgotten after %v", now-10*lateFor)
		}
	}
	if now += lateFor / 2; !l.has(other, now) {
		t.Errorf("forgotten within %v", lateFor)
	}
	if now += 5 * lateFor; l.has(other, now) {
		t.Error("remembered for ever")
	}
}
