// Package peer is a tcpcrypt endpoint (RFC 8547 and RFC 8548) for tests, which
// can follow the rules and break each of them. It runs in user space on a packet
// socket of an interface whose kernel has no address there, with a small TCP of
// its own: handshake, cumulative acknowledgments, go-back-N retransmission and
// flow control, but no congestion control and no SACK. From the code under test
// it takes only package crypto; ENO, framing and TCP are written again here.
//
//	p, _ := l.Pair(lab.Options{B: lab.EndOptions{NoAddress: true}})
//	h, _ := peer.Open(p.B)
//	ln, _ := h.Listen(80, peer.Config{FrameSize: 100, SegmentSize: 7})
//	c, _ := ln.Accept(ctx)
//	c.Write([]byte("sealed in frames of 100 bytes, sent in segments of 7"))
//	c.CloseWrite()
//
// What is sent is under the test's control at four levels. Config has the
// ordinary choices (TEPs, frame and segment sizes, how Init messages are cut).
// WriteFrame seals one frame with any header and flags and may damage it.
// WriteRaw and FIN put bytes and the end into TCP's stream as they are. Send and
// SendRST make segments that have nothing to do with the connection's state.
//
// What was received is in the Report: the opened plaintext, whether its end was
// authentic, the session ID, and under Anomalies the rules that the other side
// broke.
//
// A Host and its connections may be used from any goroutine. Hooks are called
// with the host locked and must not call its methods.
package peer
