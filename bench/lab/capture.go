package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// Capture writes what crosses a Forwarder to a pcapng file with two interfaces,
// "a" and "b", one for each link. A frame that passes appears on both.
type Capture struct {
	mu   sync.Mutex
	w    *pcapgo.NgWriter
	buf  *bufio.Writer
	file io.Closer // nil when the caller gave a writer
	err  error
	done bool
}

// Capture starts to write a new pcapng file. The forwarder's Close finishes it,
// if the capture was not closed before.
func (f *Forwarder) Capture(path string) (*Capture, error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, fmt.Errorf("lab: capture: %w", err)
	}
	c, err := f.CaptureTo(file)
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	c.file = file
	return c, nil
}

// CaptureTo is Capture to a writer, which it does not close.
func (f *Forwarder) CaptureTo(w io.Writer) (*Capture, error) {
	ngIface := func(l Link) pcapgo.NgInterface {
		return pcapgo.NgInterface{Name: l.String(), LinkType: layers.LinkTypeEthernet, TimestampResolution: 9}
	}
	c := &Capture{buf: bufio.NewWriterSize(w, 1<<16)}
	var err error
	if c.w, err = pcapgo.NewNgWriterInterface(c.buf, ngIface(LinkA), pcapgo.DefaultNgWriterOptions); err == nil {
		_, err = c.w.AddInterface(ngIface(LinkB))
	}
	if err != nil {
		return nil, fmt.Errorf("lab: capture: %w", err)
	}
	for {
		old := f.captures.Load()
		var list []*Capture
		if old != nil {
			list = append(list, *old...)
		}
		list = append(list, c)
		if f.captures.CompareAndSwap(old, &list) {
			return c, nil
		}
	}
}

func (c *Capture) write(l Link, _ Dir, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done || c.err != nil {
		return
	}
	c.err = c.w.WritePacket(gopacket.CaptureInfo{
		Timestamp: time.Now(), CaptureLength: len(b), Length: len(b), InterfaceIndex: int(l),
	}, b)
}

// Close ends the capture and returns the first error of its writer. Further
// calls return the same.
func (c *Capture) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return c.err
	}
	c.done = true
	errs := []error{c.err, c.w.Flush(), c.buf.Flush()}
	if c.file != nil {
		errs = append(errs, c.file.Close())
	}
	c.err = errors.Join(errs...)
	return c.err
}
