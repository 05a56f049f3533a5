package crypto

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto/internal/vaesgcm"
)

// wycheproofDir is a folder beside the checkout, relative to this package.
const wycheproofDir = "../../shared/vectors/wycheproof"

type wycheproofTest struct {
	ID      int      `json:"tcId"`
	Comment string   `json:"comment"`
	Flags   []string `json:"flags"`
	Result  string   `json:"result"` // valid, acceptable or invalid

	Key, IV, AAD, Msg, CT, Tag hexBytes // AEAD
	IKM, Salt, Info, OKM       hexBytes // HKDF
	Size                       int
	Public, Private, Shared    hexBytes // key agreement
}

type wycheproofGroup struct {
	IVSize, KeySize, TagSize int // in bits
	Tests                    []wycheproofTest
}

// wycheproof runs f over the cases of one file and checks how many f took.
func wycheproof(t *testing.T, file string, atLeast int, f func(t *testing.T, g *wycheproofGroup, c *wycheproofTest) (used bool)) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(wycheproofDir, file))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skipf("the Wycheproof vectors are not beside the checkout (%s)", wycheproofDir)
	}
	if err != nil {
		t.Fatal(err)
	}
	var suite struct{ TestGroups []wycheproofGroup }
	if err := json.Unmarshal(raw, &suite); err != nil {
		t.Fatal(err)
	}
	used := 0
	for i := range suite.TestGroups {
		g := &suite.TestGroups[i]
		for j := range g.Tests {
			if f(t, g, &g.Tests[j]) {
				used++
			}
		}
	}
	if used < atLeast {
		t.Errorf("%d cases used, want at least %d", used, atLeast)
	}
	t.Logf("%d cases", used)
}

func TestWycheproofAEAD(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		aead       AEAD
		atLeast    int
	}{
		{"AES128GCM", "aes_gcm_test.json", AES128GCM, 60},
		{"AES256GCM", "aes_gcm_test.json", AES256GCM, 60},
		{"ChaCha20Poly1305", "chacha20_poly1305_test.json", ChaCha20Poly1305, 300},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wycheproof(t, tc.file, tc.atLeast, func(t *testing.T, g *wycheproofGroup, c *wycheproofTest) bool {
				if g.IVSize != 8*nonceLen || g.TagSize != 8*TagLen || g.KeySize != 8*tc.aead.KeyLen() {
					return false
				}
				aead := newAEAD(tc.aead, c.Key)
				sealed := append(bytes.Clone(c.CT), c.Tag...)
				plain, err := aead.Open(nil, c.IV, sealed, c.AAD)
				if c.Result == "invalid" {
					if err == nil {
						t.Errorf("case %d (%s) opens", c.ID, c.Comment)
					}
					return true
				}
				if err != nil {
					t.Errorf("case %d (%s): %v", c.ID, c.Comment, err)
				}
				equal(t, "plaintext", plain, c.Msg)
				equal(t, "ciphertext", aead.Seal(nil, c.IV, c.Msg, c.AAD), sealed)
				return true
			})
		})
	}
}

// TestWycheproofVector runs the cases of AES-GCM on the vector engines.
func TestWycheproofVector(t *testing.T) {
	e := current.Load()
	if !e.vector {
		t.Skip("the engine is the standard library, which TestWycheproofAEAD tests")
	}
	wycheproof(t, "aes_gcm_test.json", 120, func(t *testing.T, g *wycheproofGroup, c *wycheproofTest) bool {
		if g.IVSize != 8*nonceLen || g.TagSize != 8*TagLen || g.KeySize == 192 {
			return false
		}
		var k vaesgcm.Key
		k.Init(e.form, c.Key)
		nonce := vaesgcm.NonceOf((*[nonceLen]byte)(c.IV))
		sealed := append(bytes.Clone(c.CT), c.Tag...)
		opened := bytes.Clone(sealed)
		ok := k.Open(nonce, k.AAD(c.AAD), opened)
		if c.Result == "invalid" {
			if ok {
				t.Errorf("case %d (%s) opens", c.ID, c.Comment)
			}
			return true
		}
		if !ok {
			t.Errorf("case %d (%s) does not open", c.ID, c.Comment)
		}
		equal(t, "plaintext", opened[:len(c.Msg)], c.Msg)
		got := append(bytes.Clone(c.Msg), make([]byte, TagLen)...)
		k.Seal(nonce, k.AAD(c.AAD), got, got[:len(c.Msg)])
		equal(t, "ciphertext", got, sealed)
		return true
	})
}

func TestWycheproofHKDF(t *testing.T) {
	wycheproof(t, "hkdf_sha256_test.json", 50, func(t *testing.T, g *wycheproofGroup, c *wycheproofTest) bool {
		// cprf puts one constant byte before the context and is never asked for
		// more than a traffic key.
		if c.Result != "valid" || len(c.Info) == 0 {
			return false
		}
		prk := extract(c.Salt, c.IKM)
		out := make([]byte, c.Size)
		cprf(out, &prk, c.Info[0], c.Info[1:])
		equal(t, c.Comment, out, c.OKM)
		return true
	})
}

func TestWycheproofMontgomery(t *testing.T) {
	for _, tc := range []struct {
		file string
		tep  TEP
	}{
		{"x25519_test.json", TEPX25519},
		{"x448_test.json", TEPX448},
	} {
		t.Run(tc.tep.String(), func(t *testing.T) {
			zero := 0
			wycheproof(t, tc.file, 500, func(t *testing.T, g *wycheproofGroup, c *wycheproofTest) bool {
				key, err := NewPrivateKey(tc.tep, c.Private)
				if err != nil {
					t.Fatalf("case %d: %v", c.ID, err)
				}
				es, _, err := key.Shared(c.Public)
				switch {
				case len(c.Public) != tc.tep.PubLen():
					if !errors.Is(err, ErrBadKey) {
						t.Errorf("case %d (%s): error %v, want ErrBadKey", c.ID, c.Comment, err)
					}
				case !slices.ContainsFunc(c.Shared, func(b byte) bool { return b != 0 }):
					zero++
					if !errors.Is(err, ErrZeroShared) {
						t.Errorf("case %d (%s): error %v, want ErrZeroShared", c.ID, c.Comment, err)
					}
				case err != nil:
					t.Errorf("case %d (%s): %v", c.ID, c.Comment, err)
				default:
					equal(t, c.Comment, es, c.Shared)
				}
				return true
			})
			if zero == 0 && !t.Skipped() {
				t.Error("no case with an all-zero shared secret")
			}
		})
	}
}

func TestWycheproofNIST(t *testing.T) {
	for _, tc := range []struct {
		file string
		tep  TEP
	}{
		{"ecdh_secp256r1_ecpoint_test.json", TEPP256},
		{"ecdh_secp521r1_ecpoint_test.json", TEPP521},
	} {
		t.Run(tc.tep.String(), func(t *testing.T) {
			_, _, size, _ := nistCurve(tc.tep)
			compressed, converted := 0, 0
			wycheproof(t, tc.file, 300, func(t *testing.T, g *wycheproofGroup, c *wycheproofTest) bool {
				// Scalars stand there as signed integers of variable length.
				raw := make([]byte, size)
				scalar := bytes.TrimLeft(c.Private, "\x00")
				copy(raw[size-len(scalar):], scalar)
				key, err := NewPrivateKey(tc.tep, raw)
				if err != nil {
					t.Fatalf("case %d: %v", c.ID, err)
				}
				for _, short := range []bool{false, true} {
					es, gotShort, err := key.Shared(nistWire(c.Public, short))
					isCompressed := len(c.Public) == 1+size && (c.Public[0] == 2 || c.Public[0] == 3)
					if !isCompressed || c.Result == "invalid" {
						if !errors.Is(err, ErrBadKey) {
							t.Errorf("case %d (%s): error %v, want ErrBadKey", c.ID, c.Comment, err)
						}
						continue
					}
					compressed++
					if err != nil || gotShort != short {
						t.Errorf("case %d (%s): %v, short %v", c.ID, c.Comment, err, gotShort)
					}
					equal(t, c.Comment, es, c.Shared)
				}
				if c.Result == "valid" && len(c.Public) == 1+2*size && c.Public[0] == 4 {
					converted++
					es, _, err := key.Shared(nistWire(compress(c.Public, size), false))
					if err != nil {
						t.Errorf("case %d (%s): %v", c.ID, c.Comment, err)
					}
					equal(t, c.Comment, es, c.Shared)
				}
				return true
			})
			if (compressed == 0 || converted == 0) && !t.Skipped() {
				t.Errorf("%d compressed and %d converted points", compressed, converted)
			}
		})
	}
}

// nistWire puts pubkey_len before a point.
func nistWire(point []byte, short bool) []byte {
	n := len(point)
	if !short {
		n += nistPrefix
	}
	return append(binary.BigEndian.AppendUint16(nil, uint16(n)), point...)
}
