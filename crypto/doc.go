// Package crypto is the cryptography of tcpcrypt (RFC 8548): key agreement for
// its four TEPs, the Init1 and Init2 messages, the key schedule with session
// IDs, resumption and rekeying, and sealing and opening of encryption frames.
// It knows no packets, does no I/O and keeps no global state but the choice of an
// AEAD engine, which is made once.
//
// # Ownership
//
// No type has a lock. A PrivateKey, Session or Key belongs to one goroutine at
// a time and may be handed over between goroutines by a message that
// synchronises them. A Secret may be read by several goroutines as long as none
// erases it.
//
// # Erasure
//
// Secrets are overwritten once they are of no further use: session secrets and
// master keys when the next one has been derived, traffic keys on
// Session.AdvanceSend, Session.AdvanceRecv and Session.Erase. Go limits what
// that is worth. Expanded AES keys are overwritten too, unless the AEAD engine is
// the standard library's. Its expanded AES and ChaCha20 keys and the NIST
// private keys live inside the standard library, which offers no way to
// overwrite them: they are unreferenced at once, and their memory is reused
// after the next garbage collection. Copies that the compiler or the standard
// library made in registers, on stacks or in hash states are out of reach.
package crypto
