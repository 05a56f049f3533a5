package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

func newRunCommand(start startFunc) *cobra.Command {
	s := newSettings()
	flags := s.flags()
	var config string
	var clean bool
	cmd := &cobra.Command{
		Use:   "run --interface IF",
		Short: "Run the daemon in the foreground",
		Long: `Run encrypts the TCP connections of this host that go through one network
interface or, with --inner-interface, those of the hosts behind another one. It
stays in the foreground, logs to stderr, and logs "ready" once everything is
attached. SIGTERM or SIGINT makes it wait for encrypted connections to finish
(--drain-timeout), abort the rest, and detach everything; a second signal
aborts them at once.

Every flag except --config and --cleanup is also a key of the TOML file, and
wins over it. The file may also have rules, which no flag can express.`,
		Example: "  tcpcrypt run --interface eth0 --exclude-ports 22",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if config != "" {
				if err := s.applyFile(flags, config); err != nil {
					return err
				}
			}
			if err := s.check(); err != nil {
				return err
			}
			if err := useEngine(s.engine); err != nil {
				return err
			}
			if clean {
				return cleanup(s.iface, s.inner, s.guardPins, cmd.OutOrStdout())
			}
			return runDaemon(cmd.Context(), s, start, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().AddFlagSet(flags)
	cmd.Flags().BoolVar(&clean, "cleanup", false, "remove what a killed daemon left on the interface, and end")
	cmd.Flags().StringVar(&config, "config", "", "read TOML `FILE`, whose keys are the other flags")
	return cmd
}

// cleanup removes what a daemon left on the interface, or on both of a gateway.
func cleanup(iface, inner, pins string, w io.Writer) error {
	if inner != "" {
		switch found, err := fastpath.CleanupGateway(iface, inner); {
		case err != nil:
			return failure{err}
		case found:
			_, err = fmt.Fprintf(w, "the bypass between %s and %s is removed\n", iface, inner)
			return outputError(err)
		default:
			_, err = fmt.Fprintf(w, "nothing is left on %s and %s\n", iface, inner)
			return outputError(err)
		}
	}
	found, ended, err := fastpath.Cleanup(iface, pins)
	switch {
	case err != nil:
		return failure{err}
	case !found:
		_, err = fmt.Fprintf(w, "nothing is left on %s\n", iface)
	default:
		_, err = fmt.Fprintf(w, "guard removed from %s, %d connections ended\n", iface, ended)
	}
	return outputError(err)
}

// runDaemon runs until a signal, until ctx is done, or until the host dies.
func runDaemon(ctx context.Context, s *settings, start startFunc, stderr io.Writer) error {
	log, records := newAsyncLogger(s.logFormat.value, stderr)
	defer records.Close(logGoodbye)
	// A log reader that went away must not kill the daemon with everything attached.
	signal.Ignore(syscall.SIGPIPE)
	stop, abort, release := stopSignals(ctx, log)
	defer release()

	control, err := listenControl(s.control, log)
	if err != nil {
		return err
	}
	defer control.close()
	metrics, err := listenMetrics(s.metrics, log)
	if err != nil {
		return err
	}
	defer metrics.close()

	// The first signal ends a start that has not finished, but not the host:
	// that one still has to drain.
	startCtx, cancelStart := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelStart()
	started := context.AfterFunc(stop, cancelStart)
	h, err := start(startCtx, s.hostConfig(log))
	started()
	if err != nil {
		if stop.Err() != nil {
			log.Info("stopped while starting")
			return nil
		}
		return err
	}
	closed := false
	defer func() {
		if !closed { // a panic: still leave nothing attached
			_ = h.Close()
		}
	}()
	control.serve(h)
	metrics.serve(h)
	logReady(log, h.Status(), s.control)
	notify(log, daemon.SdNotifyReady)

	var died error
	select {
	case <-h.Done():
		if died = h.Err(); died == nil {
			died = errors.New("the host ended by itself, for a reason that it does not know")
		}
	case <-stop.Done():
	}
	notify(log, daemon.SdNotifyStopping)
	if died == nil {
		log.Info("draining", "flows", h.Status().Flows, "timeout", s.drain.String())
		drain, cancel := context.WithTimeout(abort, s.drain)
		h.Drain(drain)
		cancel()
	}
	metrics.close()
	control.close()
	closed = true
	err = h.Close()
	switch {
	case died != nil:
		return failure{died}
	case err != nil:
		return failuref("detaching: %w", err)
	}
	log.Info("stopped")
	return nil
}

// stopSignals returns two contexts: stop is done after the first signal (or
// with ctx), abort after the second. A third signal kills the process.
func stopSignals(ctx context.Context, log *slog.Logger) (stop, abort context.Context, release func()) {
	stop, cancelStop := context.WithCancel(ctx)
	abort, cancelAbort := context.WithCancel(context.WithoutCancel(ctx))
	received := make(chan os.Signal, 2)
	signal.Notify(received, syscall.SIGTERM, syscall.SIGINT)
	if !signal.Ignored(syscall.SIGHUP) { // not below nohup
		signal.Notify(received, syscall.SIGHUP)
	}
	released := make(chan struct{})
	go func() {
		for _, next := range []context.CancelFunc{cancelStop, cancelAbort} {
			select {
			case sig := <-received:
				log.Info("signal", "signal", sig.String())
				next()
			case <-released:
				return
			}
		}
		signal.Stop(received)
	}()
	return stop, abort, func() {
		signal.Stop(received)
		close(released)
		cancelStop()
		cancelAbort()
	}
}

func logReady(log *slog.Logger, st fastpath.Status, control string) {
	log.Info("ready",
		"interface", st.Interface,
		"mode", st.Mode,
		"queues", queueModes(st.Queues),
		"workers", len(st.Workers),
		"inner", st.Inner,
		"guard", st.Guard,
		"engine", st.Engine,
		"control", control,
		"version", buildVersion().Version)
}

// queueModes are the queues in a log record: an array of objects in JSON, and
// one string in text.
type queueModes []fastpath.QueueStatus

func (q queueModes) String() string {
	texts := make([]string, len(q))
	for i, s := range q {
		texts[i] = fmt.Sprintf("%s/%d:%s", s.Interface, s.Queue, s.Mode)
		if s.Refused != "" {
			texts[i] += " (" + s.Refused + ")"
		}
	}
	return strings.Join(texts, ", ")
}

// notify tells the service manager, when there is one.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("the service manager cannot be told", "state", state, "err", err)
	}
}
