package lab

import (
	"errors"
	"time"
)

// TB is what Start uses of a *testing.T or *testing.B.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
}

// Start returns a new lab for a test and closes it when the test ends. Without
// the privileges for it the test is skipped, any other failure ends the test.
// Shortly before the test binary's -timeout, which runs no cleanup, the lab is
// closed as well.
func Start(t TB) *Lab {
	t.Helper()
	l, err := New()
	if errors.Is(err, ErrPrivilege) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
	var timer *time.Timer
	if d, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if end, ok := d.Deadline(); ok {
			timer = time.AfterFunc(time.Until(end)-time.Second, func() { _ = l.Close() })
		}
	}
	t.Cleanup(func() {
		if timer != nil {
			timer.Stop()
		}
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	return l
}
