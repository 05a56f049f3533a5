package main

import (
	"context"
	"net/netip"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// host is what the command line needs of a *fastpath.Host. All methods may be
// called from any goroutine.
type host interface {
	Status() fastpath.Status
	Flows() []fastpath.FlowInfo
	Stats() fastpath.Stats
	// Session describes the encrypted flow between two addresses; the error
	// is one line that says that there is none.
	Session(local, remote netip.AddrPort) (fastpath.FlowInfo, error)
	// CacheList describes the cached sessions, CacheFlush erases those of a
	// peer, or all of them when peer is the zero Addr.
	CacheList() []slowpath.CacheEntry
	CacheFlush(peer netip.Addr) int
	// Rekey initiates rekeying on one flow, or on all when both addresses are
	// zero, and returns on how many.
	Rekey(local, remote netip.AddrPort) (int, error)
	// Capture gives fn the selected packets until ctx is done, the host ends or
	// fn fails.
	Capture(ctx context.Context, cfg fastpath.CaptureConfig, fn func(*fastpath.Captured) error) (lost uint64, err error)
	// Drain stops new offers and waits until no flow is encrypted any more;
	// what is left when ctx is done is aborted.
	Drain(ctx context.Context)
	// Close detaches everything.
	Close() error
	// Done is closed when the host died by itself, and Err then says why.
	Done() <-chan struct{}
	Err() error
}

// startFunc attaches everything that cfg asks for, or nothing and returns an
// error of one line. ctx limits the start alone, not the life of the host.
type startFunc func(ctx context.Context, cfg fastpath.HostConfig) (host, error)

func startFastpath(ctx context.Context, cfg fastpath.HostConfig) (host, error) {
	h, err := fastpath.StartHost(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return h, nil
}
