// Command tcpcrypt encrypts the TCP connections of unmodified applications
// with tcpcrypt (RFC 8548), negotiated by TCP-ENO (RFC 8547).
//
// This package is wiring only: flags and configuration, the control socket,
// metrics, logs and signals around a fastpath.Host.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
)

// Exit codes of the command.
const (
	exitOK      = 0
	exitFailure = 1 // the command was right, but could not be carried out
	exitUsage   = 2 // flags, configuration or the machine: nothing was started
)

// failure is an error that exits with exitFailure. Every other error exits
// with exitUsage, which is what the errors of cobra and pflag mean.
type failure struct{ error }

// Unwrap returns the error that the command failed with.
func (f failure) Unwrap() error { return f.error }

func failuref(format string, args ...any) error {
	return failure{fmt.Errorf(format, args...)}
}

func main() {
	os.Exit(run(os.Args[1:], startFastpath, os.Stdout, os.Stderr))
}

// run executes one command line and returns its exit code.
func run(args []string, start startFunc, stdout, stderr io.Writer) (code int) {
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(stderr, "tcpcrypt: internal error: %v\n%s", r, debug.Stack())
			code = exitFailure
		}
	}()
	root := newRoot(start)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, "tcpcrypt: "+oneLine(err))
	if f := (failure{}); errors.As(err, &f) {
		return exitFailure
	}
	return exitUsage
}

// oneLine is the text of err without line breaks, which joined errors and
// some libraries bring along.
func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool {
		return r == '\n' || r == '\r'
	}), "; ")
}
