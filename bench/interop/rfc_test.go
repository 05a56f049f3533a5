package interop

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

var (
	tepNames  = []string{"p256", "p521", "x25519", "x448"}
	tepBytes  = map[string]byte{"p256": 0x21, "p521": 0x22, "x25519": 0x23, "x448": 0x24}
	aeadNames = []string{"aes128", "aes256", "chacha"}
	aeadBytes = map[string]uint16{"aes128": 1, "aes256": 2, "chacha": 0x10}
)

// Every TEP with every AEAD, in both roles. The peer offers or accepts that one
// combination alone.
func TestCombinations(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string, v6 bool) {
		r := newRig(t, v6, "--no-resume")
		for _, tep := range tepNames {
			for _, aead := range aeadNames {
				t.Run(tep+"-"+aead, func(t *testing.T) {
					rep := r.encrypted(t, mode, 30000, "--teps", tep, "--aeads", aead)
					if rep.TEP != tepBytes[tep] || rep.Cipher != aeadBytes[aead] {
						t.Errorf("TEP %#x and AEAD %#x", rep.TEP, rep.Cipher)
					}
				})
			}
		}
	})
}

// Both readings of the length of a NIST public key, as host A and as host B.
func TestPublicKeyLength(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string, v6 bool) {
		r := newRig(t, v6, "--no-resume")
		for _, tep := range []string{"p256", "p521"} {
			for _, form := range []string{"total", "pubkey"} {
				t.Run(tep+"-"+form, func(t *testing.T) {
					flags := []string{"--teps", tep, "--pubkey-len", form}
					want := "total"
					if mode == "active" {
						// Host B answers in host A's form.
						flags, want = append(flags, "--strict-pubkey-len"), form
					}
					if rep := r.encrypted(t, mode, 5000, flags...); rep.PubkeyLen != want {
						t.Errorf("our public key came in the form %q, want %q", rep.PubkeyLen, want)
					}
				})
			}
		}
	})
}

// chain checks that a connection used secret number i of its chain, 0 for a
// fresh exchange, with the roles of the chain's first session.
func (rep *report) chain(t *testing.T, i int, origRole string) {
	t.Helper()
	if rep.Resumed != (i > 0) || rep.SessionI == nil || *rep.SessionI != i || rep.OrigRole != origRole {
		at := "none"
		if rep.SessionI != nil {
			at = strconv.Itoa(*rep.SessionI)
		}
		t.Errorf("resumed %v with secret %s, the peer first as %s; want secret %d, as %s", rep.Resumed, at, rep.OrigRole, i, origRole)
	}
}

// Sessions go on, whoever opens the next connection, with nonces of every legal
// length on either side, and never end up in a session ID that was there before.
func TestResumption(t *testing.T) {
	const n = 4000
	eachIP(t, func(t *testing.T, v6 bool) {
		for length := range 9 {
			if v6 && length%4 != 0 {
				continue // the path has no part in it
			}
			t.Run(fmt.Sprintf("nonce of %d", length), func(t *testing.T) {
				r := newRig(t, v6, "--resume-nonce", strconv.Itoa(length))
				flags := []string{"--state", filepath.Join(t.TempDir(), "sessions.json"), "--nonce-len", strconv.Itoa(8 - length), "--teps", "p256,x25519"}
				resume := append(slices.Clone(flags), "--resume")
				ids := map[string]bool{}
				expect := func(rep report, i int) {
					t.Helper()
					rep.chain(t, i, "A")
					ids[rep.SessionID] = true
				}
				expect(r.encrypted(t, "active", n, flags...), 0)
				expect(r.encrypted(t, "active", n, resume...), 1)
				expect(r.encrypted(t, "active", n, append(resume, "--length-byte")...), 2)
				expect(r.encrypted(t, "passive", n, flags...), 3)
				expect(r.encrypted(t, "active", n, resume...), 4)
				expect(r.encrypted(t, "passive", n, append(flags, "--lookahead", "3")...), 5)
				if len(ids) != 6 {
					t.Errorf("%d session IDs of 6 connections", len(ids))
				}
			})
		}
	})
}

// The chain that our own connection began goes on in both directions.
func TestResumptionOfOurs(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		r := newRig(t, v6)
		flags := []string{"--state", filepath.Join(t.TempDir(), "sessions.json")}
		first := r.encrypted(t, "passive", 4000, flags...)
		first.chain(t, 0, "B")
		again := r.encrypted(t, "active", 4000, append(flags, "--resume")...)
		again.chain(t, 1, "B")
		// Now the peer has opened one: a listener of another port of its own may
		// be offered the chain.
		more := r.encrypted(t, "passive", 4000, flags...)
		more.chain(t, 2, "B")
	})
}

// Either side may decline: then the exchange is fresh, in the same handshake.
func TestResumptionDeclined(t *testing.T) {
	for _, c := range []struct {
		name  string
		ours  []string // our flags
		first []string // the peer's, in the first connection
		then  []string // in the second one
		mode  string
	}{
		{"by the peer", nil, nil, []string{"--no-resume"}, "passive"},
		{"by a peer that forgot", nil, []string{"--no-cache"}, nil, "passive"},
		{"by us", []string{"--no-resume"}, nil, []string{"--resume"}, "active"},
		{"by us, with a length byte", []string{"--no-resume"}, nil, []string{"--resume", "--length-byte"}, "active"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, false, c.ours...)
			state := []string{"--state", filepath.Join(t.TempDir(), "sessions.json")}
			r.encrypted(t, "active", 4000, append(c.first, state...)...)
			if rep := r.encrypted(t, c.mode, 4000, append(c.then, state...)...); rep.Resumed {
				t.Error("resumed")
			}
			if rep := r.encrypted(t, c.mode, 4000, append(c.then, state...)...); rep.Resumed {
				t.Error("resumed the next time")
			}
		})
	}
}

// A chain that one side has gone further along than the other: proposals that
// came to nothing have burnt some of its secrets.
func TestResumptionAhead(t *testing.T) {
	r := newRig(t, false)
	state := []string{"--state", filepath.Join(t.TempDir(), "sessions.json")}
	first := r.encrypted(t, "active", 4000, state...)
	first.chain(t, 0, "A")
	for range 3 {
		r.refused(t, append(state, "--resume")...)
	}
	rep := r.encrypted(t, "active", 4000, append(state, "--resume")...)
	rep.chain(t, 4, "A")
}

// Rekeying every few frames in both directions at once, with loss, by data and
// by empty frames.
func TestRekeying(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string, v6 bool) {
		for _, c := range []struct {
			name  string
			ours  []string
			flags []string
			least int // generations of ours
		}{
			{"ours", []string{"--rekey-frames", "3"}, nil, 20},
			{"theirs", nil, []string{"--rekey-every", "3"}, 20},
			{"both with loss", []string{"--rekey-frames", "2"}, []string{"--rekey-every", "3", "--tx-drop", "0.03", "--rx-drop", "0.03", "--linger", "0.6"}, 20},
			{"both with reordering", []string{"--rekey-frames", "4"}, []string{"--rekey-every", "2", "--tx-reorder", "0.1", "--rx-reorder", "0.1", "--tx-dup", "0.1", "--rx-dup", "0.1"}, 20},
			{"keep-alives", []string{"--rekey-frames", "5"}, []string{"--keepalive", "0.01", "--cwnd", "4000", "--tx-drop", "0.02", "--rx-drop", "0.02", "--linger", "0.6"}, 10},
		} {
			t.Run(c.name, func(t *testing.T) {
				r := newRig(t, v6, c.ours...)
				rep := r.encrypted(t, mode, 150000, append(c.flags, "--frame-size", "1000")...)
				if rep.GenRemote < c.least || rep.RekeysRx < c.least {
					t.Errorf("generations %d and %d, %d rekeying frames", rep.GenLocal, rep.GenRemote, rep.RekeysRx)
				}
			})
		}
	})
}

// Both SYNs cross; with b set on one side the connection is encrypted, and that
// side is host B (RFC 8547 section 4.3).
func TestSimultaneousOpen(t *testing.T) {
	for _, c := range []struct {
		name   string
		config string
		flags  []string
		role   string // the peer's
	}{
		{"peer is host B", "", []string{"--b-bit"}, "B"},
		{"peer is host A", "[[rule]]\nrole = \"B\"\n", nil, "A"},
		{"equals", "", nil, ""},
	} {
		eachIP(t, func(t *testing.T, v6 bool) {
			t.Run(c.name, func(t *testing.T) {
				needPeer(t)
				p, err := lab.Start(t).Middle(lab.Options{B: lab.EndOptions{NoAddress: true}})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := p.ForwardCrossing(lab.ForwarderOptions{}); err != nil {
					t.Fatal(err)
				}
				r := newRigOn(t, p.A, p.B, v6, config(t, c.config)...)
				for range 3 {
					if c.role == "" {
						// The SYN-ACK leaves ENO out that the SYN had: the second exception
						// of RFC 8547 section 4.6, which the peer counts all the same.
						r.plain(t, "simopen", 50000, c.flags, "syn_eno_altered")
					} else if rep := r.encrypted(t, "simopen", 50000, c.flags...); rep.Role != c.role {
						t.Errorf("the peer is host %s", rep.Role)
					}
				}
			})
		})
	}
}

// The a bit, and what follows from demanding it (RFC 8547 section 4.2).
func TestApplicationAware(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string, v6 bool) {
		for _, c := range []struct {
			name      string
			aware     string
			flags     []string
			encrypted bool
		}{
			{"off and off", "off", nil, true},
			{"off and on", "off", []string{"--app-aware"}, true},
			{"off and mandatory", "off", []string{"--mandatory-aa"}, false},
			{"on and off", "on", nil, true},
			{"on and mandatory", "on", []string{"--mandatory-aa"}, true},
			{"mandatory and off", "mandatory", nil, false},
			{"mandatory and on", "mandatory", []string{"--app-aware"}, true},
			{"mandatory and mandatory", "mandatory", []string{"--mandatory-aa"}, true},
		} {
			t.Run(c.name, func(t *testing.T) {
				r := newRig(t, v6, config(t, "[[rule]]\napp-aware = \""+c.aware+"\"\n")...)
				if !c.encrypted {
					// An active opener that will not have it leaves ENO out of the third
					// segment, although the SYN-ACK was good in itself.
					r.plain(t, mode, 5000, c.flags, "eno_missing_third_ack")
					return
				}
				rep := r.encrypted(t, mode, 5000, c.flags...)
				if rep.RemoteA == nil || (*rep.RemoteA == 1) != (c.aware != "off") {
					t.Errorf("our a bit: %v", rep.RemoteA)
				}
			})
		}
	})
}
