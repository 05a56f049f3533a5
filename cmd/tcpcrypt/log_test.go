package main

import (
	"bufio"
	"encoding/json"
	"io"
	"testing"
	"time"
)

// A log reader that does not read stops nobody who logs; what is lost is counted,
// where it is missing.
func TestLogWriter(t *testing.T) {
	r, w := io.Pipe()
	log, records := newAsyncLogger("json", w)
	// One record is being written while the queue fills up.
	log.Info("record", "n", 0)
	lines := bufio.NewScanner(r)
	type record struct {
		Msg     string
		N       int
		Records int
	}
	next := func() (rec record) {
		t.Helper()
		if !lines.Scan() {
			t.Fatal("the log has ended")
		}
		if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
			t.Fatal(err)
		}
		return rec
	}
	if rec := next(); rec.Msg != "record" || rec.N != 0 {
		t.Fatalf("%+v", rec)
	}
	const all = 3 * logQueue
	for n := 1; n <= all; n++ {
		log.Info("record", "n", n)
	}
	records.Close(0) // returns although nobody reads
	log.Info("late") // and nobody fails who logs afterwards, which is lost as well
	seen, lost := 0, 0
	for want := 1; want <= all+1; want++ {
		rec := next()
		if rec.Records != 0 {
			lost, want = lost+rec.Records, want+rec.Records-1
			continue
		}
		if seen++; rec.N != want {
			t.Fatalf("%+v, want %d", rec, want)
		}
	}
	// The queue, and perhaps the one that the writer had taken out of it.
	if seen < logQueue || seen > logQueue+1 || seen+lost != all+1 {
		t.Errorf("%d records came and %d were counted as lost, of %d", seen, lost, all+1)
	}
	go func() {
		for lines.Scan() {
		}
	}()
	records.Close(time.Minute)
	select {
	case <-records.done:
	default:
		t.Error("the writer did not end")
	}
}
