package slowpath

import (
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// aheadFlows is how many half-open flows there may be for keys to be made
// ahead: a flood of SYNs must not buy key generation.
const aheadFlows = 64

// needKey makes sure that the flow has its ephemeral key. A key that was made
// ahead for another TEP is erased.
func (m *Machine) needKey(f *flow) (err error) {
	if f.priv = f.takeKey(); f.priv == nil {
		f.priv, err = crypto.GenerateKey(f.tep, m.rand)
	}
	return err
}

// Ahead makes a key that a half-open flow will probably need, while its peer is
// waited for. It is for times when there is nothing else to do, returns false
// when there is nothing to do either, and emits no actions.
func (m *Machine) Ahead(now time.Duration) bool {
	m.now = max(m.now, now)
	for len(m.wanting) > 0 {
		f := m.wanting[0]
		m.wanting = m.wanting[1:]
		if m.flows[f.key] != f || f.priv != nil || f.job != nil {
			continue
		}
		tep := f.tep
		switch f.phase {
		case phasePlainSYN:
			continue
		case phaseOffered:
			tep = m.cfg.TEPs[0]
		}
		key, err := crypto.GenerateKey(tep, m.rand)
		if err != nil {
			return false
		}
		f.priv = key
		return true
	}
	return false
}

// want notes that the flow will need a key soon, of the given TEP probably. Only
// quick ones are made ahead.
func (m *Machine) want(f *flow, tep crypto.TEP) {
	if len(m.flows) <= aheadFlows && len(m.wanting) < aheadFlows && (tep == crypto.TEPX25519 || tep == crypto.TEPP256) {
		m.wanting = append(m.wanting, f)
	}
}
