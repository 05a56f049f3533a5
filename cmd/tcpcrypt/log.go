package main

import (
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	logQueue   = 1024        // records that may wait for the log's reader
	logGoodbye = time.Second // for those that still wait at the end
)

func newLogger(format string, w io.Writer) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}

// logWriter hands what is written to a goroutine, so that a log reader that stops
// reading, a terminal after ctrl-S for instance, does not stop the daemon. When too
// much waits the rest is lost, and a record says how much was.
type logWriter struct {
	w      io.Writer
	notice *slog.Logger // to w
	queue  chan logRecord
	lost   atomic.Uint64 // records since the last one that found room
	quit   chan struct{}
	once   sync.Once
	done   chan struct{}
}

type logRecord struct {
	text []byte
	lost uint64 // before this one
}

// newAsyncLogger returns a logger of the given format whose records a goroutine
// writes to w until Close.
func newAsyncLogger(format string, w io.Writer) (*slog.Logger, *logWriter) {
	l := &logWriter{w: w, notice: newLogger(format, w), queue: make(chan logRecord, logQueue), quit: make(chan struct{}), done: make(chan struct{})}
	go l.write()
	return newLogger(format, l), l
}

// Write takes one record. It does not block; handlers of slog call it one at a time.
func (l *logWriter) Write(b []byte) (int, error) {
	r := logRecord{append([]byte(nil), b...), l.lost.Swap(0)}
	select {
	case l.queue <- r:
	default:
		l.lost.Add(r.lost + 1)
	}
	return len(b), nil
}

func (l *logWriter) write() {
	defer close(l.done)
	for {
		select {
		case r := <-l.queue:
			l.put(r)
			continue
		case <-l.quit:
		}
		for {
			select {
			case r := <-l.queue:
				l.put(r)
				continue
			default:
			}
			l.tell(l.lost.Load())
			return
		}
	}
}

func (l *logWriter) put(r logRecord) {
	l.tell(r.lost)
	// Whoever cannot be written to cannot be told so either.
	_, _ = l.w.Write(r.text)
}

func (l *logWriter) tell(lost uint64) {
	if lost > 0 {
		l.notice.Warn("records of this log were lost, as its reader was too slow", "records", lost)
	}
}

// Close returns when everything that was written before it is with the reader, but
// after no more than the given time. Later records are not written.
func (l *logWriter) Close(wait time.Duration) {
	l.once.Do(func() { close(l.quit) })
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-l.done:
	case <-t.C:
	}
}
