package slowpath

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// hexBytes is a string of hexadecimal digits.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// resumeVectors are the handshakes of resumed connections in the vectors of the
// cryptography.
type resumeVectors struct {
	Vectors []struct {
		TEP        crypto.TEP  `json:"tep"`
		AEAD       crypto.AEAD `json:"aead"`
		NA         hexBytes    `json:"n_a"`
		ES         hexBytes    `json:"es"`
		Transcript hexBytes    `json:"transcript"`
		Init1      hexBytes    `json:"init1"`
		Init2      hexBytes    `json:"init2"`
		Resumed    []struct {
			Opener    string   `json:"active_opener_original_role"`
			NonceA    hexBytes `json:"nonce_a"`
			NonceB    hexBytes `json:"nonce_b"`
			ENOSYN    hexBytes `json:"eno_syn"`
			ENOSYNACK hexBytes `json:"eno_synack"`
			SessionID hexBytes `json:"session_id"`
		} `json:"resumed"`
	} `json:"vectors"`
}

// The options of resumed handshakes and the session IDs that follow from them
// are those of an independent implementation, for both openers and both original
// roles.
func TestResumeVectors(t *testing.T) {
	b, err := os.ReadFile("../crypto/testdata/tcpcrypt.json")
	if err != nil {
		t.Fatal(err)
	}
	var file resumeVectors
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Vectors) < 12 {
		t.Fatalf("%d vectors", len(file.Vectors))
	}
	for _, v := range file.Vectors {
		for i, r := range v.Resumed {
			t.Run(fmt.Sprintf("%v %v %d", v.TEP, v.AEAD, i), func(t *testing.T) {
				opener, nonces := crypto.RoleA, [2][]byte{r.NonceA, r.NonceB}
				if r.Opener == "B" {
					opener, nonces = crypto.RoleB, [2][]byte{r.NonceB, r.NonceA}
				}
				// begin makes a Machine that shares the key exchange.
				begin := func(role crypto.Role, nonce []byte) *script {
					sess := crypto.NewSession(role, v.AEAD, byte(v.TEP), v.Transcript, v.Init1, v.Init2, v.NA, v.ES)
					cfg := Config{TEPs: []crypto.TEP{v.TEP}, Cache: NewCache(0, 0), ResumeNonce: len(nonce)}
					k := link{}.key(1, clientPort, 2, serverPort)
					cfg.Cache.add(&k, true, v.TEP, v.AEAD, role, sess.NextSecret(), 0)
					s := newScript(t, cfg)
					s.m.rand = bytes.NewReader(nonce)
					return s
				}
				check := func(s *script, eno []byte) {
					t.Helper()
					if !bytes.Equal(s.localENO, eno) {
						t.Errorf("option %x, want %x", s.localENO, eno)
					}
				}
				a := begin(opener, nonces[0])
				a.connect()
				check(a, r.ENOSYN)
				a.outer(tightSYNACK(r.ENOSYNACK))
				p := begin(opener.Peer(), nonces[1])
				p.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), r.ENOSYN)})
				p.answered()
				check(p, r.ENOSYNACK)
				p.outer(firstACK(true, 0, nil))
				for _, s := range []*script{a, p} {
					if e := s.installed(); e.Session.ID() != [crypto.SessionIDLen]byte(r.SessionID) || e.Session.AEAD() != v.AEAD || !e.Resumed {
						t.Errorf("session ID %x", e.Session.ID())
					}
				}
			})
		}
	}
}
