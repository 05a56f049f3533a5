package fastpath

import (
	"runtime"
	"sync"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// agreementQueue bounds the jobs that wait for a thread. What does not fit is
// not computed, and its connection fails.
const agreementQueue = 4096

// agreement computes key agreements off the workers.
type agreement struct {
	jobs chan agreementJob
	wg   sync.WaitGroup
}

type agreementJob struct {
	job *slowpath.Job
	w   *worker // that gets the result
}

// newAgreement starts threads for the given number of workers: as many as there
// are other CPUs, at least one.
func newAgreement(workers int) *agreement {
	a := &agreement{jobs: make(chan agreementJob, agreementQueue)}
	for range max(1, runtime.GOMAXPROCS(0)-workers) {
		a.wg.Go(func() {
			for j := range a.jobs {
				j.job.Run()
				j.w.post(func(w *worker) {
					now := w.now()
					w.slow.carryOut(w.slow.m.Agreed(j.job, now), now)
				})
			}
		})
	}
	return a
}

// add queues a job of w, and reports whether there was room.
func (a *agreement) add(w *worker, job *slowpath.Job) bool {
	select {
	case a.jobs <- agreementJob{job, w}:
		return true
	default:
		return false
	}
}

// close ends the threads when the queued jobs are done. Workers must have
// ended: nothing is added any more.
func (a *agreement) close() {
	close(a.jobs)
	a.wg.Wait()
}

// offloads says which agreements a worker leaves to the pool. One that has a CPU
// of its own leaves all: its time belongs to packets. One that shares its CPU
// computes the quick ones itself, which takes less time than to wake a thread.
func offloads(pinned bool) func(crypto.TEP) bool {
	return func(t crypto.TEP) bool {
		return pinned || t == crypto.TEPX448 || t == crypto.TEPP521
	}
}
