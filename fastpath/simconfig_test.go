package fastpath

import (
	"math/rand/v2"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// netConfig is the network in one direction. Probabilities are per packet and
// apply until the scenario's quiet time.
type netConfig struct {
	delay, jitter          time.Duration
	loss                   float64
	outEvery, outFor       time.Duration // mean pause between outages, and mean length of one
	dup, reorder, corrupt  float64
	stale                  float64 // a copy turns up seconds later
	forge                  float64 // flips a payload bit and mends the checksum
	attack                 float64 // somebody adds a segment of his own
	split, merge           float64
	noSACK, noTS           float64 // the option is blanked out
	ce                     float64
	mtu                    int           // of the path, 0: no limit
	mtuAt                  time.Duration // when it becomes that
	blackhole              bool          // nobody tells the sender
	tapLoss, tapDup        float64
	tapReadLoss, tapRdDupe float64
}

// warp is how much an engine takes for sent in a direction when a flow begins:
// plain and outer bytes, equal modulo 2^32.
type warp struct{ i, o uint64 }

// What the network takes out of SYNs.
const (
	stripENO    = 1 << iota // of the SYN
	stripENOAck             // of the SYN-ACK
	stripSACK               // of the SYN
	stripTS                 // of the SYN
	stripWS                 // of the SYN
)

// flowConfig is one connection.
type flowConfig struct {
	aead              crypto.AEAD
	roleA             int // the node that has role A
	active            int // the node that opened
	resumed           bool
	v6                bool
	vlan              uint16
	mss               int // of both ends' MSS options
	sack, ts, ws, ecn bool
	model             [2]modelConfig
	app               [2]appConfig
	initAcked         int // 0: nothing of role B's Init2, 1: half, 2: all
	lateInstall       bool
	iss               [2]uint32
	lateTime          time.Duration
	startAt           time.Duration // lives: when it is opened
	crossing          bool          // lives: by both
	passiveRole       bool          // lives: with b = 1 on node 1
	strip             uint8         // lives: options that the network takes out of SYNs
	warp              [2]warp       // by sending node
}

type scenario struct {
	seed         uint64
	net          [2]netConfig // by sending node
	quiet        time.Duration
	flows        []flowConfig
	chunks       [2]int
	chunkSize    int
	memory       [2]int
	flowBudget   int
	rekeyFrames  uint64
	rekeyBytes   uint64
	rekeyEvery   time.Duration
	tcpKeepalive bool
	pollDelay    time.Duration // most time that packets gather to a vector
	virtual      bool          // checksum offload between virtual devices
	gateway      [2]bool       // the inner port is of AF_XDP, too
	mayAbort     bool          // a reset is a legal outcome
	lives        bool          // connections are opened by the slow path, or are plain
	daemon       [2]bool       // lives: the nodes that have one
	resume       bool          // lives: sessions are cached
	source       rand.Source   // of all chance, instead of the seed
	limit        time.Duration // everything must have ended by then
}

// rand returns one of the scenario's streams of chance.
func (sc *scenario) rand(stream uint64) *rand.Rand {
	if sc.source != nil {
		return rand.New(sc.source)
	}
	return rand.New(rand.NewPCG(sc.seed, stream))
}

// plainFlow is an unremarkable connection, the base of scenarios.
func plainFlow() flowConfig {
	c := flowConfig{aead: crypto.AES128GCM, mss: 1460, sack: true, ts: true, ws: true, initAcked: 2}
	for k := range c.model {
		c.model[k] = modelConfig{
			gso: 64000, rcvBuf: 1 << 20, sndBuf: 1 << 20, sack: true, ts: true, shift: 7, peerShift: 7,
			delack: 40 * time.Millisecond, minRTO: 200 * time.Millisecond,
		}
		c.app[k] = appConfig{total: 1 << 20, write: 1 << 16}
		c.iss[k] = 0xffff0000 + uint32(k)*77777
	}
	c.fix()
	return c
}

// fix makes the parameters agree that two ends have in common.
func (c *flowConfig) fix() {
	for k := range c.model {
		m := &c.model[k]
		m.sack, m.ts, m.ecn = c.sack, c.ts, c.ecn
		m.mss = c.mss - overhead
		m.ourMSS, m.ws = c.mss, c.ws
		m.rcvMSS = c.mss
		if c.ts {
			m.mss -= 12
			m.rcvMSS -= 12
		}
		if !c.ws {
			m.shift = 0
		}
		m.gso = max(m.mss, m.gso/m.mss*m.mss)
	}
	for k := range c.model {
		c.model[k].peerShift = c.model[1-k].shift
	}
}

func plainScenario(seed uint64) *scenario {
	return &scenario{
		seed: seed, flows: []flowConfig{plainFlow()}, chunks: [2]int{4096, 4096}, chunkSize: 2048,
		net: [2]netConfig{{delay: 5 * time.Millisecond}, {delay: 5 * time.Millisecond}}, limit: 10 * time.Minute,
	}
}
