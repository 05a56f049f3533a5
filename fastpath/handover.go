package fastpath

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// A packet can reach a worker that does not have its flow: the TAP is steered
// only once a flow has an owner, ICMP errors and the answer to an active open
// arrive where the NIC's hash puts them, and the NIC's hash may change. Such
// packets go to the owner through a handover each.

// handoverSize is the room in one handover, in bytes: several of the largest
// packets that a TAP delivers.
const handoverSize = 1 << 20

// Kinds of records in a handover.
const (
	recordOuter = iota // a frame from the wire
	recordInner        // a packet from the TAP, with its virtio-net header, or a frame from the inner NIC
	recordSkip         // nothing: the next record begins at the start of the buffer
)

const recordHeader = 8 // length and kind

// handover is a queue of packets from one worker to another. One goroutine
// pushes and publishes, one other takes and releases.
type handover struct {
	buf []byte // length a power of two

	_         [64]byte
	published atomic.Uint64
	end       uint64 // the producer's: pushed up to here
	seen      uint64 // the producer's: newest value of released that it knows

	_        [64]byte
	released atomic.Uint64
	at       uint64 // the consumer's: taken up to here
}

func newHandover() *handover { return &handover{buf: make([]byte, handoverSize)} }

func recordLen(n int) uint64 { return uint64(recordHeader+n+7) &^ 7 }

// push copies a packet into the queue; false when there is no room. The
// consumer sees it after publish.
func (h *handover) push(kind uint32, pkt []byte) bool {
	need := recordLen(len(pkt))
	skip := uint64(0)
	if left := uint64(len(h.buf)) - h.end&uint64(len(h.buf)-1); left < need {
		skip = left
	}
	if h.end+skip+need-h.seen > uint64(len(h.buf)) {
		h.seen = h.released.Load()
		if h.end+skip+need-h.seen > uint64(len(h.buf)) {
			return false
		}
	}
	if skip > 0 {
		h.record(recordSkip, int(skip)-recordHeader)
	}
	copy(h.record(kind, len(pkt)), pkt)
	return true
}

func (h *handover) record(kind uint32, n int) []byte {
	b := h.buf[h.end&uint64(len(h.buf)-1):]
	binary.NativeEndian.PutUint32(b, uint32(n))
	binary.NativeEndian.PutUint32(b[4:], kind)
	h.end += recordLen(n)
	return b[recordHeader:][:n]
}

// publish makes what was pushed visible to the consumer.
func (h *handover) publish() { h.published.Store(h.end) }

// take returns the next record before limit, a value of published; ok is false
// when there is none. The packet may be written to, and is valid until release.
func (h *handover) take(limit uint64) (kind uint32, pkt []byte, ok bool) {
	for h.at < limit {
		b := h.buf[h.at&uint64(len(h.buf)-1):]
		n := int(binary.NativeEndian.Uint32(b))
		kind := binary.NativeEndian.Uint32(b[4:])
		h.at += recordLen(n)
		if kind != recordSkip {
			return kind, b[recordHeader:][:n:n], true
		}
	}
	return 0, nil, false
}

// release gives the room of all taken records back.
func (h *handover) release() { h.released.Store(h.at) }

// mailbox is what a worker gets from the others.
type mailbox struct {
	from    [maxWorkers]atomic.Pointer[handover] // by the sender's number; nil before its first packet
	pending atomic.Uint64                        // bit i: from[i] has something
}

// handOver passes a packet on to the worker that has its flow: a frame from the
// wire, or with inner a packet from the TAP. It goes out at publish.
func (w *worker) handOver(to int, dir packet.Direction, pkt []byte) {
	box := &w.peers[to].mail
	h := box.from[w.id].Load()
	if h == nil {
		h = newHandover()
		box.from[w.id].Store(h)
	}
	kind := uint32(recordOuter)
	if dir == packet.FromInner {
		kind = recordInner
	}
	if !h.push(kind, pkt) {
		w.st.handoverFull++
		return
	}
	w.pushed |= 1 << to
	if dir == packet.FromInner {
		w.st.handedInner++
	} else {
		w.st.handedOuter++
		w.ports[w.port].handed++
	}
}

// elsewhere is EngineConfig.Elsewhere.
func (w *worker) elsewhere(dir packet.Direction, k *packet.Key, pkt []byte) bool {
	o := w.owners.find(k)
	// What is out of date is for the slow path to tell.
	if o < 0 || o == w.id || w.stalled {
		return false
	}
	w.handOver(o, dir, pkt)
	return true
}

// publish lets the others see what was handed over to them since the last time.
func (w *worker) publish() {
	for ; w.pushed != 0; w.pushed &= w.pushed - 1 {
		p := w.peers[bits.TrailingZeros64(w.pushed)]
		p.mail.from[w.id].Load().publish()
		p.mail.pending.Or(1 << w.id)
		p.wake()
	}
}

// delivery is what the mailbox held at one moment.
type delivery struct {
	from   uint64 // bit i: something of worker i
	limits [maxWorkers]uint64
}

// collect notes what has been handed over. What was posted to this worker before
// that is run before handedOver works on it: a flow comes before its packets.
func (w *worker) collect() {
	d := &w.delivered
	if d.from = w.mail.pending.Load(); d.from == 0 {
		return
	}
	d.from = w.mail.pending.Swap(0)
	for b := d.from; b != 0; b &= b - 1 {
		i := bits.TrailingZeros64(b)
		d.limits[i] = w.mail.from[i].Load().published.Load()
	}
}

// handedOver works on what collect noted: frames are copied to chunks of this
// worker, packets of the local stack are worked on where they lie.
func (w *worker) handedOver() (n int) {
	for b := w.delivered.from; b != 0; b &= b - 1 {
		i := bits.TrailingZeros64(b)
		h := w.mail.from[i].Load()
		w.eng.SetVia(i)
		v := w.descs[:0]
		for {
			kind, pkt, ok := h.take(w.delivered.limits[i])
			if !ok {
				break
			}
			n++
			switch {
			case kind == recordInner && w.tap == nil:
				w.eng.InnerFrame(pkt, w.now())
			case kind == recordInner:
				w.eng.InnerIn(pkt, w.now())
			case len(pkt) > w.umem.ChunkSize()-xdp.Headroom:
				w.eng.OuterFrame(pkt, w.now())
			default:
				addr, ok := w.umem.Alloc()
				if !ok {
					w.st.handoverFull++
					continue
				}
				addr += xdp.Headroom
				copy(w.umem.Bytes(addr, len(pkt)), pkt)
				v = append(v, xdp.Desc{Addr: addr, Len: uint32(len(pkt))})
				if len(v) == cap(v) {
					w.eng.OuterIn(v, w.now())
					v = v[:0]
				}
			}
		}
		if len(v) > 0 {
			w.eng.OuterIn(v, w.now())
		}
		w.eng.Flush(w.now())
		w.eng.SetVia(-1)
		h.release()
	}
	w.delivered.from = 0
	w.st.handedIn += uint64(n)
	return n
}
