package crypto

import (
	"crypto/hkdf"
	"crypto/sha256"
)

// keyLen is K_LEN in bytes (RFC 8548 section 5).
const keyLen = 32

// The CONST_* values of RFC 8548 section 4.3.
const (
	constNextK  = 0x01
	constSessID = 0x02
	constRekey  = 0x03
	constKeyA   = 0x04
	constKeyB   = 0x05
	constResume = 0x06
)

// extract is the Extract function of RFC 8548 section 3.1: HKDF-Extract with
// SHA-256.
func extract(salt, ikm []byte) [keyLen]byte {
	prk, err := hkdf.Extract(sha256.New, ikm, salt)
	if err != nil {
		panic("crypto: HKDF-Extract: " + err.Error())
	}
	defer clear(prk)
	return [keyLen]byte(prk)
}

// cprf fills out with CPRF(key, constant | context, len(out)), where CPRF is
// HKDF-Expand with SHA-256 (RFC 8548 sections 3.1 and 5).
func cprf(out []byte, key *[keyLen]byte, constant byte, context []byte) {
	info := make([]byte, 0, 32)
	info = append(append(info, constant), context...)
	okm, err := hkdf.Expand(sha256.New, key[:], string(info), len(out))
	if err != nil {
		panic("crypto: HKDF-Expand: " + err.Error())
	}
	copy(out, okm)
	clear(okm)
}

// ResumeLen is the length in bytes of half a resumption identifier (RFC 8548
// section 3.5).
const ResumeLen = 9

// MaxResumeNonce is the largest length in bytes of the resumption nonce that
// each host contributes to sn[i] (RFC 8548 section 3.5).
const MaxResumeNonce = 8

// Secret is a session secret ss[i] (RFC 8548 section 3.3). It may secure one
// connection only: whoever resumes with it, or merely proposes to, must first
// put Next in its place. The AEAD algorithm, the TEP and the original role that
// belong to it are kept by whoever keeps the secret.
//
// Using an erased Secret is a programming error and panics: keys derived from
// zeros would be public.
type Secret struct {
	ss     [keyLen]byte
	erased bool
}

func (s *Secret) live() *[keyLen]byte {
	if s.erased {
		panic("crypto: use of an erased session secret")
	}
	return &s.ss
}

// Next derives ss[i+1]. It leaves s as it is: the caller erases s.
func (s *Secret) Next() *Secret {
	next := new(Secret)
	cprf(next.ss[:], s.live(), constNextK, nil)
	return next
}

// ResumeHalf returns the half of the resumption identifier resume[i] that the
// host with the given original role sends (RFC 8548 section 3.5).
func (s *Secret) ResumeHalf(origRole Role) [ResumeLen]byte {
	var id [2 * ResumeLen]byte
	cprf(id[:], s.live(), constResume, nil)
	if origRole == RoleA {
		return [ResumeLen]byte(id[:])
	}
	return [ResumeLen]byte(id[ResumeLen:])
}

// Erase overwrites the secret. It may be called more than once.
func (s *Secret) Erase() {
	clear(s.ss[:])
	s.erased = true
}

// SessionIDLen is the length in bytes of a session ID (RFC 8548 section 3.4).
const SessionIDLen = 1 + keyLen

// Session holds the key schedule of one connection: its session ID, its traffic
// keys in both directions and generations, and the next session secret. It
// belongs to one goroutine.
type Session struct {
	id   [SessionIDLen]byte
	role Role
	aead AEAD

	next  *Secret // ss[i+1]; nil after Erase
	given bool    // next belongs to the caller

	send, recv keyChain
}

// NewSession makes the session of a fresh key exchange (RFC 8548 section 3.3).
//
// role is the host's role. aead must be valid. tepByte is the TEP byte that
// host B sent, its v bit included (zero here), and becomes the first byte of
// the session ID. transcript is the ENO option of host A followed by that of
// host B, each with its kind and length bytes (RFC 8547 section 4.8). init1 and
// init2 are the messages as they stood on the wire, ignored bytes included.
// nonceA is N_A, es the result of PrivateKey.Shared. Nothing is retained; the
// caller clears es.
func NewSession(role Role, aead AEAD, tepByte byte, transcript, init1, init2, nonceA, es []byte) *Session {
	ikm := make([]byte, 0, len(transcript)+len(init1)+len(init2)+len(es))
	ikm = append(ikm, transcript...)
	ikm = append(ikm, init1...)
	ikm = append(ikm, init2...)
	ikm = append(ikm, es...)
	ss := Secret{ss: extract(nonceA, ikm)}
	clear(ikm)
	defer ss.Erase()
	return newSession(role, aead, tepByte, &ss, nil)
}

// NewResumedSession makes the session of a resumption (RFC 8548 section 3.5).
//
// origRole is the role that the host had in the original session with ss[0]: it
// decides who seals with which traffic keys. aead is that of the original
// session. tepByte is the TEP byte that host B sent in this connection, with v
// = 1. ss is ss[i], sn is nonce_a | nonce_b, where a and b go by the original
// roles, 0 to 8 bytes each. ss is not retained: the caller erases it.
func NewResumedSession(origRole Role, aead AEAD, tepByte byte, ss *Secret, sn []byte) *Session {
	return newSession(origRole, aead, tepByte, ss, sn)
}

func newSession(role Role, aead AEAD, tepByte byte, ss *Secret, sn []byte) *Session {
	if !aead.Valid() {
		panic("crypto: session with " + aead.String())
	}
	s := &Session{role: role, aead: aead, next: ss.Next()}
	s.id[0] = tepByte
	cprf(s.id[1:], ss.live(), constSessID, sn)

	var mk [keyLen]byte
	cprf(mk[:], ss.live(), constRekey, sn)
	ab := keyChain{aead: aead, label: constKeyA, mk: mk}
	ba := keyChain{aead: aead, label: constKeyB, mk: mk}
	clear(mk[:])
	if role == RoleA {
		s.send, s.recv = ab, ba
	} else {
		s.send, s.recv = ba, ab
	}
	ab.erase()
	ba.erase()
	return s
}

// ID returns the session ID: the TEP byte of host B and 32 bytes (RFC 8548
// section 3.4). It is public, equal at both hosts, and survives Erase.
func (s *Session) ID() [SessionIDLen]byte { return s.id }

// AEAD returns the AEAD algorithm of the session.
func (s *Session) AEAD() AEAD { return s.aead }

// Role returns the role that decides the traffic keys: the host's role in the
// original session.
func (s *Session) Role() Role { return s.role }

// NextSecret returns the session secret ss[i+1], for a later resumption. Every
// call returns the same Secret, which belongs to the caller from the first call
// on; the session erases it only if it was never asked for. It returns nil
// after Erase.
func (s *Session) NextSecret() *Secret {
	s.given = true
	return s.next
}

// SendKey returns the key that seals frames of generation gen (RFC 8548 section
// 3.8), deriving it on first use. Generations count from 0 and are asked for in
// order. The keys of the newest generation asked for and the one before it are
// kept: asking for generation g makes the session forget those before g-1,
// without erasing them, so that operations prepared with them can still run;
// AdvanceSend erases.
//
// It returns nil for a generation that is forgotten, was skipped, or lies more
// than one beyond the newest, and after Erase.
func (s *Session) SendKey(gen uint32) *Key { return s.send.key(gen) }

// RecvKey returns the key that opens frames of generation gen. It keeps keys as
// SendKey does, independently of it: a frame with rekey = 1 is tried under
// generation g+1 while g stays available, and AdvanceRecv(g+1) follows when it
// was authentic.
func (s *Session) RecvKey(gen uint32) *Key { return s.recv.key(gen) }

// AdvanceSend erases the sending keys of the generations before gen, which is
// at most the newest that SendKey was asked for. No operation may be pending
// with them, and Keys of them that the caller still holds are dead.
func (s *Session) AdvanceSend(gen uint32) { s.send.advance(gen) }

// AdvanceRecv erases the receiving keys of the generations before gen, as
// AdvanceSend does.
func (s *Session) AdvanceRecv(gen uint32) { s.recv.advance(gen) }

// EraseSend erases all sending keys and what they are derived from: after FINp
// was sealed nothing more is (RFC 8548 section 3.7). SendKey returns nil from
// then on.
func (s *Session) EraseSend() { s.send.erase() }

// EraseRecv erases all receiving keys and what they are derived from: after a
// frame with FINp was opened none follows. RecvKey returns nil from then on.
func (s *Session) EraseRecv() { s.recv.erase() }

// Erase erases all keys, and the next session secret unless NextSecret handed
// it over. Keys that the caller still holds are dead. It may be called more
// than once.
func (s *Session) Erase() {
	s.send.erase()
	s.recv.erase()
	if s.next != nil && !s.given {
		s.next.Erase()
	}
	s.next = nil
}

// keyChain derives the traffic keys of one direction. Each direction steps
// through the master keys on its own, because the two ends of a connection may
// be generations apart and keeping what lies between them would let the peer
// decide how much.
type keyChain struct {
	aead   AEAD
	label  byte // constKeyA or constKeyB
	erased bool

	gen  uint32       // the newest generation, that of mk
	mk   [keyLen]byte // mk[gen]
	keys [2]*Key      // of gen and gen-1, by their lowest bit
}

func (c *keyChain) key(gen uint32) *Key {
	if c.erased {
		return nil
	}
	switch gen {
	case c.gen - 1:
		return c.keys[gen&1]
	case c.gen:
	case c.gen + 1:
		cprf(c.mk[:], &c.mk, constRekey, nil)
		c.gen = gen
		c.keys[gen&1] = nil
	default:
		return nil
	}
	if c.keys[gen&1] == nil {
		var raw [maxKeyLen + nonceLen]byte
		kn := raw[:c.aead.KeyLen()+nonceLen]
		cprf(kn, &c.mk, c.label, nil)
		c.keys[gen&1] = newKey(c.aead, kn[:c.aead.KeyLen()], [nonceLen]byte(kn[c.aead.KeyLen():]))
		clear(raw[:])
	}
	return c.keys[gen&1]
}

func (c *keyChain) advance(gen uint32) {
	if gen != c.gen {
		return
	}
	c.drop((gen - 1) & 1)
}

func (c *keyChain) drop(i uint32) {
	if c.keys[i] != nil {
		c.keys[i].erase()
		c.keys[i] = nil
	}
}

func (c *keyChain) erase() {
	c.drop(0)
	c.drop(1)
	clear(c.mk[:])
	c.erased = true
}
