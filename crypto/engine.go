package crypto

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto/internal/vaesgcm"
)

// EngineEnv is the environment variable that names the AEAD engine where nothing
// else does.
const EngineEnv = "TCPCRYPT_AEAD"

// engine is an implementation of the AEAD algorithms. All of them leave
// ChaCha20-Poly1305 to its library.
type engine struct {
	name   string
	vector bool // AES-GCM by package vaesgcm in this form
	form   vaesgcm.Form
}

// engines are all of them, the fastest first. The last one runs everywhere.
var engines = [...]engine{
	{"vaes-avx512", true, vaesgcm.Wide},
	{"vaes-avx2", true, vaesgcm.Narrow},
	{"std", false, 0},
}

func (e *engine) available() bool { return !e.vector || vaesgcm.Supported(e.form) }

// current makes the keys. It changes before there are any, or in tests.
var current atomic.Pointer[engine]

func init() {
	e, err := findEngine(os.Getenv(EngineEnv))
	if err != nil {
		e, _ = findEngine("") // SetEngine tells
	}
	current.Store(e)
}

// findEngine returns the engine of that name, the fastest that this machine has
// if it is empty.
func findEngine(name string) (*engine, error) {
	var names []string
	for i := range engines {
		e := &engines[i]
		names = append(names, e.name)
		if name == "" && e.available() {
			return e, nil
		}
		if name == e.name {
			if !e.available() {
				return nil, fmt.Errorf("%q: %w", name, ErrNoEngine)
			}
			return e, nil
		}
	}
	return nil, fmt.Errorf("%q: %w: want %s", name, ErrUnknownEngine, strings.Join(names, ", "))
}

// Engines returns the names of the AEAD engines that this machine can use, the
// fastest first. "std", the standard library, is always among them.
func Engines() []string {
	var names []string
	for i := range engines {
		if engines[i].available() {
			names = append(names, engines[i].name)
		}
	}
	return names
}

// SetEngine chooses the engine that new keys use, by name. If name is empty,
// EngineEnv counts, and without it the fastest engine is taken. It fails with
// ErrUnknownEngine and ErrNoEngine, and then changes nothing. It is called
// before the first session is made.
func SetEngine(name string) error {
	from := ""
	if name == "" {
		name = os.Getenv(EngineEnv)
		from = EngineEnv + ": "
	}
	e, err := findEngine(name)
	if err != nil {
		return fmt.Errorf("%s%w", from, err)
	}
	current.Store(e)
	return nil
}

// EngineName names the AEAD engine in use, for status output.
func EngineName() string { return current.Load().name }
