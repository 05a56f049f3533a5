package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"testing"
)

// Packets of all sizes come out as they went in, while producer and consumer
// run at different speeds, and what does not fit is refused.
func TestHandover(t *testing.T) {
	const total = 20000
	h := newHandover()
	sent := make(chan []uint32, 1)
	packetOf := func(i uint32, n int) []byte {
		b := bytes.Repeat([]byte{byte(i)}, max(n, 8))
		binary.BigEndian.PutUint32(b, i)
		binary.BigEndian.PutUint32(b[4:], uint32(len(b)))
		return b
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r := rand.New(rand.NewPCG(1, 1))
		var went []uint32
		for i := range uint32(total) {
			n := r.IntN(1600)
			if i%50 == 0 {
				n = r.IntN(tapBufSize)
			}
			if h.push(i&1, packetOf(i, n)) {
				went = append(went, i)
			} else {
				runtime.Gosched()
			}
			if i%16 == 0 {
				h.publish()
			}
		}
		h.publish()
		sent <- went
	}()
	var got []uint32
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		default:
		}
		limit := h.published.Load()
		for {
			kind, pkt, ok := h.take(limit)
			if !ok {
				break
			}
			i := binary.BigEndian.Uint32(pkt)
			if kind != i&1 || int(binary.BigEndian.Uint32(pkt[4:])) != len(pkt) || !bytes.Equal(pkt, packetOf(i, len(pkt))) {
				t.Fatalf("packet %d of kind %d and %d bytes is damaged", i, kind, len(pkt))
			}
			got = append(got, i)
			clear(pkt) // it may be written to
		}
		h.release()
	}
	went := <-sent
	if len(got) != len(went) {
		t.Fatalf("%d packets came out, %d went in", len(got), len(went))
	}
	for i := range got {
		if got[i] != went[i] {
			t.Fatalf("packet %d came instead of %d", got[i], went[i])
		}
	}
	if len(went) == total {
		t.Log("the queue was never full")
	}
}

func TestHandoverFull(t *testing.T) {
	h := newHandover()
	n := 0
	for h.push(recordOuter, make([]byte, 1500)) {
		n++
	}
	if n < handoverSize/1600 {
		t.Errorf("full after %d packets", n)
	}
	h.publish()
	for {
		if _, _, ok := h.take(h.published.Load()); !ok {
			break
		}
		n--
	}
	if n != 0 {
		t.Errorf("%d packets were lost", n)
	}
	if h.push(recordOuter, make([]byte, 1500)) {
		t.Error("room before release")
	}
	h.release()
	if !h.push(recordOuter, make([]byte, 1500)) {
		t.Error("no room after release")
	}
}
