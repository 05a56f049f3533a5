package slowpath

import (
	"bytes"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// Job is the part of one flow's key exchange that is nothing but computing: the
// generation of this host's key, the agreement with the peer's, or both. An
// Agree action hands it out, and Machine.Agreed takes it back. Meanwhile it
// belongs to whoever runs it, and so does the private key.
type Job struct {
	f    *flow // the Machine's
	tep  crypto.TEP
	priv *crypto.PrivateKey // nil: Run makes it
	peer []byte             // the peer's key in its wire encoding; nil: there is none yet

	reason string // why the flow has to be aborted, one of the Reason constants
	es     []byte
	short  bool
}

// Run computes. It may be called once, from any goroutine, and uses the operating
// system's source of randomness.
func (j *Job) Run() {
	if j.priv == nil {
		key, err := crypto.GenerateKey(j.tep, nil)
		if err != nil {
			j.reason = ReasonNoRandom
			return
		}
		j.priv = key
	}
	j.reason = ""
	if j.peer == nil {
		return
	}
	es, short, err := j.priv.Shared(j.peer)
	if err != nil {
		j.reason = initReason(err)
		return
	}
	j.es, j.short = es, short
}

// erase forgets the secrets of a job that is of no use any more.
func (j *Job) erase() {
	clear(j.es)
	if j.priv != nil {
		j.priv.Erase()
	}
}

// Agreed takes back the Job of an Agree action and goes on with the key exchange
// of its flow, if that still exists. A job that nobody found the time to run
// comes back, too: its flow is aborted. The actions are valid until the next
// call of the Machine.
func (m *Machine) Agreed(j *Job, now time.Duration) []Action {
	m.begin(now)
	f := j.f
	if f.job != j {
		j.erase()
		return m.acts
	}
	if reason := m.agreed(f); reason != "" {
		m.abort(f, reason)
	}
	if m.flows[f.key] == f {
		m.timers.schedule(f)
	}
	return m.acts
}

// agree computes what follows from the peer's key, or, when that is nil, only
// makes this host's, here or in a Job. It returns a Reason constant when the
// flow has to be aborted.
func (m *Machine) agree(f *flow, peer []byte) (reason string) {
	if m.cfg.Offload != nil && m.cfg.Offload(f.tep) {
		f.job = &Job{f: f, tep: f.tep, priv: f.takeKey(), peer: bytes.Clone(peer), reason: ReasonOverload}
		m.emit(Action{Kind: Agree, Key: f.key, Job: f.job})
		return ""
	}
	if err := m.needKey(f); err != nil {
		return ReasonNoRandom
	}
	f.job = &Job{f: f, tep: f.tep, priv: f.takeKey(), peer: peer}
	f.job.Run()
	return m.agreed(f)
}

// agreed goes on when the flow's job is done.
func (m *Machine) agreed(f *flow) (reason string) {
	j := f.job
	f.job, f.priv = nil, j.priv
	switch {
	case j.reason != "":
		return j.reason
	case j.peer == nil:
		return m.sendInit1(f)
	}
	defer clear(j.es)
	return m.complete(f, j.es, j.short)
}

// takeKey takes the flow's private key if it is one of the negotiated TEP, and
// erases it if not.
func (f *flow) takeKey() *crypto.PrivateKey {
	k := f.priv
	f.priv = nil
	if k != nil && k.TEP() != f.tep {
		k.Erase()
		return nil
	}
	return k
}
