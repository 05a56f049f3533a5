package slowpath

import (
	"slices"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// A flow that was offered by one machine goes on in another one.
func TestMove(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	key := s.m.Flows()[0].Key
	first := s.m
	moved := first.Detach(key)
	if moved == nil || first.Len() != 0 || first.Knows(key) {
		t.Fatal("the flow did not leave")
	}
	if _, pending := first.Deadline(); pending {
		t.Error("the first machine still has a timer")
	}
	s.m = New(first.cfg, first.rand)
	if !s.m.Adopt(moved, s.now) || !s.m.Knows(key) {
		t.Fatal("the flow did not arrive")
	}
	s.peerENO = AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})
	s.outer(synack(s.peerENO))
	s.localInit = s.payload()
	s.outer(s.data(0, len(s.localInit), s.init2(crypto.TEPX25519, nil)))
	if est := s.installed(); est.Key != key || !est.Active {
		t.Errorf("installed %+v", est)
	}
}

// Only a flow that the peer has not answered can be moved, and only to a
// machine that does not have it.
func TestMoveRefused(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	key := s.m.Flows()[0].Key
	moved := s.m.Detach(key)
	if s.m.Detach(key) != nil {
		t.Error("detached twice")
	}
	s.connect()
	if s.m.Adopt(moved, s.now) || s.m.Len() != 1 {
		t.Error("two flows of one key")
	}
	s.outer(synack(option(1, x25519)))
	if s.m.Detach(key) != nil {
		t.Error("a flow that exchanges keys was detached")
	}
	l := newScript(t, Config{})
	l.listening(crypto.TEPX25519)
	if l.m.Detach(l.m.Flows()[0].Key) != nil {
		t.Error("a passive flow was detached")
	}
}

// The machine tells when it has forgotten a flow.
func TestForgotten(t *testing.T) {
	var forgotten []packet.Key
	s := newScript(t, Config{Forgotten: func(k packet.Key) { forgotten = append(forgotten, k) }})
	s.connect()
	key := s.m.Flows()[0].Key
	s.outer(synack(nil))
	if len(forgotten) != 0 || !s.m.Knows(key) {
		t.Fatal("forgotten before its tombstone went")
	}
	s.tick(2 * DefaultTombstoneFor)
	if !slices.Equal(forgotten, []packet.Key{key}) || s.m.Knows(key) {
		t.Errorf("forgotten %v", forgotten)
	}
}
