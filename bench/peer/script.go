package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// MaxData is the largest number of data bytes in a frame without urgent field.
const MaxData = crypto.MaxPlain - 1

// Frame is one encryption frame to be sealed (RFC 8548 section 4.2). The zero
// value is an empty frame.
type Frame struct {
	Data    []byte // at most MaxData bytes
	FINp    bool
	Urgent  bool
	UrgentN uint16 // urgent field, with Urgent
	Rekey   bool   // initiate rekeying: next generation, rekey = 1
	Control byte   // further bits of control
	Flags   byte   // further bits of flags
	// Mutate replaces the sealed frame before it enters the stream.
	Mutate func(sealed []byte) []byte
}

// seal seals a frame and puts it into the stream.
func (c *Conn) seal(f Frame) ([]byte, error) {
	if c.session == nil {
		return nil, errNotNegotiated
	}
	if len(f.Data) > MaxData || f.Urgent && len(f.Data) > MaxData-crypto.UrgentLen {
		return nil, errors.New("peer: too much data for a frame")
	}
	if f.Rekey {
		c.genOut++
		c.rekeyDue = true
	}
	control, flags := f.Control, f.Flags
	if c.rekeyDue {
		control |= crypto.ControlRekey
		c.rekeyDue = false
	}
	if f.FINp {
		flags |= crypto.FlagFIN
		c.finpOut = true
	}
	if f.Urgent {
		flags |= crypto.FlagURG
	}
	src := []byte{flags}
	if f.Urgent {
		src = binary.BigEndian.AppendUint16(src, f.UrgentN)
	}
	src = append(src, f.Data...)
	b := make([]byte, crypto.FrameHeader+len(src)+crypto.TagLen)
	c.session.SendKey(c.genOut).Seal(b, src, control, uint64(len(c.out)))
	if f.Mutate != nil {
		b = f.Mutate(b)
	}
	c.report.FramesOut++
	c.out = append(c.out, b...)
	c.frameTo = append(c.frameTo, len(c.out))
	return b, nil
}

// do runs f with the host locked, then sends.
func (c *Conn) do(f func() error) error {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	if c.state == stateClosed {
		if c.err != nil {
			return c.err
		}
		return errors.New("peer: connection closed")
	}
	if err := f(); err != nil {
		return err
	}
	c.pump()
	return nil
}

// Write sends data, in frames as Config says, or as it is on a plain connection.
// It does not wait for anything: see WaitReady and Flush.
func (c *Conn) Write(data []byte) (int, error) {
	err := c.do(func() error {
		if c.session == nil {
			if !c.decided {
				return errNotNegotiated
			}
			c.out = append(c.out, data...)
			return nil
		}
		size := c.cfg.FrameSize
		if size == 0 {
			size = max(min(c.cfg.MSS, c.peerMSS)-crypto.Overhead-len(c.timestamps(nil)), 1)
		}
		for rest := data; len(rest) > 0; {
			n := size
			if c.cfg.FrameRandom {
				n = 1 + c.rng.IntN(size)
			}
			n = min(n, len(rest), MaxData)
			if _, err := c.seal(Frame{Data: rest[:n]}); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return len(data), nil
}

// WriteFrame seals one frame and sends it. It returns the bytes that entered the
// stream, a copy of the caller's.
func (c *Conn) WriteFrame(f Frame) (sealed []byte, err error) {
	err = c.do(func() error {
		b, err := c.seal(f)
		sealed = bytes.Clone(b)
		return err
	})
	return sealed, err
}

// WriteRaw puts bytes into TCP's stream as they are.
func (c *Conn) WriteRaw(b []byte) error {
	return c.do(func() error {
		c.out = append(c.out, b...)
		c.frameTo = append(c.frameTo, len(c.out))
		return nil
	})
}

// CloseWrite ends the stream as it should be: FINp in an empty frame, and FIN.
func (c *Conn) CloseWrite() error {
	return c.do(func() error {
		if c.session != nil && !c.finpOut {
			if _, err := c.seal(Frame{FINp: true}); err != nil {
				return err
			}
		}
		c.fin = true
		return nil
	})
}

// FIN ends TCP's stream where it is, whatever was sealed.
func (c *Conn) FIN() error {
	return c.do(func() error {
		c.fin = true
		return nil
	})
}

// Cork holds back new data until Uncork, so that several frames share segments.
func (c *Conn) Cork() {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	c.corked = true
}

// Uncork sends what was held back. sizes are those of the next segments, in data
// bytes; after them Config decides again.
func (c *Conn) Uncork(sizes ...int) error {
	return c.do(func() error {
		c.corked = false
		c.sizes = append(c.sizes, sizes...)
		return nil
	})
}

// Resend sends bytes of the stream that were sent before once more, from one
// offset to another, in segments of the given sizes, the last of which repeats.
func (c *Conn) Resend(from, to int, sizes ...int) error {
	return c.do(func() error {
		if from < 0 || to > min(c.sent, len(c.out)) || len(sizes) == 0 {
			return errors.New("peer: not sent yet")
		}
		for from < to {
			n := max(min(sizes[0], to-from), 1)
			if len(sizes) > 1 {
				sizes = sizes[1:]
			}
			s := c.base(from)
			s.Flags |= frame.PSH
			s.Window = c.windowField(false)
			s.Options = c.timestamps(nil)
			s.Payload = c.out[from : from+n]
			c.transmit(&s, from, true)
			from += n
		}
		return nil
	})
}

// Segment is a segment that Send makes.
type Segment struct {
	Offset  int    // of its sequence number from the next byte to be sent
	Ack     int    // of its acknowledgment number from the right one
	Flags   uint8  // ACK is not implied
	Options []byte // besides a timestamp
	Payload []byte
	Urgent  uint16
}

// Send sends a segment that is no part of the stream and leaves the connection's
// state as it is. It works on closed connections too.
func (c *Conn) Send(s Segment) {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	o := c.base(c.sentOrAcked())
	o.Seq += uint32(s.Offset)
	o.Ack = c.ackNumber() + uint32(s.Ack)
	o.Flags, o.Urgent, o.Payload = s.Flags, s.Urgent, s.Payload
	o.Window = c.windowField(false)
	o.Options = append(c.timestamps(nil), s.Options...)
	c.h.send(o.Append(nil))
}

// SendRST sends an RST whose sequence number is offset bytes beyond the next one
// to be sent; only 0 is exact. The connection stays as it is here.
func (c *Conn) SendRST(offset int) {
	c.Send(Segment{Offset: offset, Flags: frame.RST | frame.ACK})
}

// Abort resets the connection.
func (c *Conn) Abort() {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	c.reset(ErrAborted)
}

// SetWindow changes the receive window in bytes and announces it. The right edge
// that was announced before never retreats.
func (c *Conn) SetWindow(n int) error {
	return c.do(func() error {
		c.window = n
		c.sendACK()
		return nil
	})
}

// SentOffset returns the offset of the next byte that enters the stream.
func (c *Conn) SentOffset() int {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	return len(c.out)
}

// WaitReady waits until the connection is encrypted or plain TCP.
func (c *Conn) WaitReady(ctx context.Context) error {
	return c.wait(ctx, "the handshake", func() bool {
		alive := c.state == stateEstablished || c.state == stateClosed && c.err == nil
		return alive && (c.decided || c.enabled && c.cfg.NoSession)
	})
}

// WaitReceived waits until at least n bytes have been received and opened.
func (c *Conn) WaitReceived(ctx context.Context, n int) error {
	return c.wait(ctx, "data", func() bool { return len(c.plain) >= n })
}

// WaitEnd waits for the end of the other side's data: an authentic one, or a FIN
// on a plain connection.
func (c *Conn) WaitEnd(ctx context.Context) error {
	return c.wait(ctx, "the end of data", func() bool { return c.finpIn || c.finIn && !c.enabled })
}

// WaitReset waits for an acceptable RST.
func (c *Conn) WaitReset(ctx context.Context) error {
	return c.wait(ctx, "a reset", func() bool { return c.report.RST })
}

// WaitClosed waits until the connection is over, in whatever way.
func (c *Conn) WaitClosed(ctx context.Context) error {
	return c.wait(ctx, "the end of the connection", func() bool { return c.state == stateClosed })
}

// WaitRekey waits until a frame of the given generation was received.
func (c *Conn) WaitRekey(ctx context.Context, gen uint32) error {
	return c.wait(ctx, "rekeying", func() bool { return c.genIn >= gen })
}

// WaitAnomaly waits until the other side broke a rule, by the name in
// Report.Anomalies.
func (c *Conn) WaitAnomaly(ctx context.Context, name string) error {
	return c.wait(ctx, "anomaly "+name, func() bool { return c.report.Anomalies[name] > 0 })
}

// Flush waits until everything that was written has been acknowledged.
func (c *Conn) Flush(ctx context.Context) error {
	return c.wait(ctx, "acknowledgments", func() bool { return c.una >= c.end() })
}
