package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/spf13/cobra"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

// A capture is a request like the others, answered by a line for each packet
// until the client closes its side of the connection: first an empty packet, which
// says that the capture runs, or an error. The packets that came before that are
// still answered, and then a line that ends the capture.

// captured is a line of a running capture.
type captured struct {
	Packet *fastpath.Captured `json:"packet,omitempty"`
	End    *captureEnd        `json:"end,omitempty"`
	Error  string             `json:"error,omitempty"`
}

type captureEnd struct {
	Lost uint64 `json:"lost"` // packets of the whole capture that were lost
}

// serveCapture answers one capture request.
func serveCapture(conn net.Conn, h host, req *request) {
	cfg := fastpath.CaptureConfig{Wire: req.Side != "inner", Inner: req.Side == "inner" || req.Side == "both", Snap: req.Snap}
	if req.Local != "" || req.Remote != "" {
		var err error
		if cfg.Local, cfg.Remote, err = parseEndpoints(req.Local, req.Remote); err != nil {
			reply(conn, captured{Error: err.Error()})
			return
		}
	}
	if !reply(conn, captured{Packet: &fastpath.Captured{}}) {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		// The client has nothing more to say; the read ends with the connection.
		_, _ = io.Copy(io.Discard, conn)
		cancel()
	}()
	lost, err := h.Capture(ctx, cfg, func(p *fastpath.Captured) error {
		if !reply(conn, captured{Packet: p}) {
			return net.ErrClosed
		}
		return nil
	})
	if err == nil {
		reply(conn, captured{End: &captureEnd{Lost: lost}})
	}
}

// captureSides are the interfaces of the file, in the order of their numbers.
var captureSides = []string{"wire", "inner"}

// captureSummary is what a capture wrote.
type captureSummary struct {
	File    string      `json:"file"`
	Seconds float64     `json:"seconds"`
	Packets uint64      `json:"packets"`
	Bytes   uint64      `json:"bytes"` // of the packets, before they were cut to --snap
	Lost    uint64      `json:"lost"`  // packets that came faster than they were written
	Wire    captureSide `json:"wire"`
	Inner   captureSide `json:"inner"`
}

type captureSide struct {
	In  uint64 `json:"in"`
	Out uint64 `json:"out"`
}

func (s *captureSummary) add(p *fastpath.Captured) {
	side := &s.Wire
	if p.Inner {
		side = &s.Inner
	}
	if p.Out {
		side.Out++
	} else {
		side.In++
	}
	s.Packets++
	s.Bytes += uint64(p.Len)
	s.Lost = p.Lost
}

func newCaptureCommand() *cobra.Command {
	q := &query{}
	side := choice{"wire", []string{"wire", "inner", "both"}}
	var file string
	var count uint64
	var duration time.Duration
	var snap int
	cmd := &cobra.Command{
		Use:   "capture --write FILE [LOCAL REMOTE]",
		Short: "Write packets of connections to a pcapng file",
		Long: `Capture writes the packets of the connection between two address:port pairs, or
of all connections that the daemon handles, to a pcapng file, until it is
interrupted, or --count or --duration is reached.

The wire side, which tcpdump does not show, is what the network card receives
and sends: encrypted, but for the handshake. The inner side is what the daemon and
the local stack exchange: PLAINTEXT, in segments as large as the stack makes them.
In the file each side is an interface, and each packet has its direction.`,
		Example: "  tcpcrypt capture --write wire.pcapng --duration 10s 192.0.2.1:43210 192.0.2.2:443",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 0 && len(args) != 2 {
				return errors.New("capture takes LOCAL and REMOTE, or nothing")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			req := request{Method: "capture", Side: side.value, Snap: snap}
			switch {
			case file == "":
				return errors.New("capture: --write FILE is missing")
			case file == "-":
				return errors.New("write: packets go to a file, not to the standard output")
			case snap < 0:
				return fmt.Errorf("snap: %d is negative", snap)
			case duration < 0:
				return fmt.Errorf("duration: %v is negative", duration)
			}
			if len(args) == 2 {
				if _, _, err := parseEndpoints(args[0], args[1]); err != nil {
					return err
				}
				req.Local, req.Remote = args[0], args[1]
			}
			ctx, cancel := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer cancel()
			if duration > 0 {
				ctx, cancel = context.WithTimeout(ctx, duration)
				defer cancel()
			}
			sum, err := runCapture(ctx, q.control, req, file, count, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if q.json {
				return printJSON(cmd.OutOrStdout(), sum)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d packets (%s) written to %s, %d lost\n", sum.Packets, byteCount(sum.Bytes), sum.File, sum.Lost)
			return outputError(err)
		},
	}
	cmd.Flags().StringVarP(&file, "write", "w", "", "the pcapng `FILE`, which is overwritten")
	cmd.Flags().Var(&side, "side", "what to capture")
	cmd.Flags().DurationVar(&duration, "duration", 0, "end after so long (default: when interrupted)")
	cmd.Flags().Uint64Var(&count, "count", 0, "end after so many packets (default: when interrupted)")
	cmd.Flags().IntVar(&snap, "snap", 0, "write so many `BYTES` of a packet at most (default all)")
	q.flags(cmd)
	return cmd
}

// runCapture writes what the daemon answers to a file, until ctx is done, count
// packets were written, or the daemon ends. It tells w when the capture runs.
func runCapture(ctx context.Context, control string, req request, path string, count uint64, w io.Writer) (sum captureSummary, err error) {
	sum.File = path
	conn, err := dialControl(control)
	if err != nil {
		return sum, err
	}
	defer conn.Close()
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return sum, failuref("no daemon answers at %s: %w", control, err)
	}
	lines := json.NewDecoder(conn)
	next := func() (c captured, err error) {
		if err := lines.Decode(&c); err != nil {
			return c, err
		}
		switch {
		case c.Error != "":
			return c, failure{errors.New(c.Error)}
		case c.Packet == nil && c.End == nil:
			return c, failuref("the daemon at %s is of another version", control)
		}
		return c, nil
	}
	if _, err := next(); err != nil {
		if f := (failure{}); errors.As(err, &f) {
			return sum, f
		}
		return sum, failuref("no daemon answers at %s: %w", control, err)
	}
	_ = conn.SetDeadline(time.Time{})
	// Others must not read it: the inner side is plaintext.
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return sum, failure{err}
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	buf := bufio.NewWriterSize(file, 1<<16)
	ng, err := newCaptureWriter(buf, req.Snap)
	if err != nil {
		return sum, failure{err}
	}
	fmt.Fprintf(w, "capturing to %s\n", path)
	start := time.Now()
	// The daemon answers what it has captured so far, and how much it lost.
	defer context.AfterFunc(ctx, func() {
		_ = conn.SetReadDeadline(time.Now().Add(callTimeout))
		_ = conn.CloseWrite()
	})()
	for count == 0 || sum.Packets < count {
		c, err := next()
		if err != nil {
			break // the daemon has ended, or hangs
		}
		if c.End != nil {
			sum.Lost = c.End.Lost
			break
		}
		sum.add(c.Packet)
		if err := writeCaptured(ng, c.Packet); err != nil {
			return sum, failure{err}
		}
	}
	sum.Seconds = time.Since(start).Seconds()
	if err := errors.Join(ng.Flush(), buf.Flush()); err != nil {
		return sum, failure{err}
	}
	return sum, nil
}

func newCaptureWriter(w io.Writer, snap int) (*pcapgo.NgWriter, error) {
	side := func(i int) pcapgo.NgInterface {
		return pcapgo.NgInterface{Name: captureSides[i], LinkType: layers.LinkTypeEthernet, TimestampResolution: 9, SnapLength: uint32(snap)}
	}
	ng, err := pcapgo.NewNgWriterInterface(w, side(0), pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{Application: "tcpcrypt " + buildVersion().Version}})
	if err != nil {
		return nil, err
	}
	_, err = ng.AddInterface(side(1))
	return ng, err
}

func writeCaptured(ng *pcapgo.NgWriter, p *fastpath.Captured) error {
	ci := gopacket.CaptureInfo{Timestamp: p.At, CaptureLength: len(p.Frame), Length: p.Len}
	if p.Inner {
		ci.InterfaceIndex = 1
	}
	flags := pcapgo.NgEpbFlags{Direction: pcapgo.NgEpbFlagDirectionInbound}
	if p.Out {
		flags.Direction = pcapgo.NgEpbFlagDirectionOutbound
	}
	return ng.WritePacketWithOptions(ci, p.Frame, pcapgo.NgPacketOptions{Flags: &flags})
}
