package fastpath

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

func pick[T any](rng *rand.Rand, v ...T) T { return v[rng.IntN(len(v))] }

// randomScenario derives everything from the seed.
func randomScenario(seed uint64) *scenario {
	return scenarioFrom(rand.New(rand.NewPCG(seed, 0)), seed)
}

func scenarioFrom(rng *rand.Rand, seed uint64) *scenario {
	one := func(n int) bool { return rng.IntN(n) == 0 }
	sc := &scenario{seed: seed, limit: 30 * time.Minute}
	// Of a stream of its own, so that the rest of a seed's scenario stays.
	other := rand.New(rand.NewPCG(seed, 5))
	for k := range sc.gateway {
		sc.gateway[k] = other.IntN(3) == 0
	}
	sc.chunkSize = pick(rng, 2048, 4096)
	for k := range sc.chunks {
		sc.chunks[k] = pick(rng, 512, 1024, 4096)
		sc.memory[k] = pick(rng, 0, 0, 4<<20, 512<<10)
	}
	sc.flowBudget = pick(rng, 0, 0, 256<<10)
	sc.rekeyFrames = pick[uint64](rng, 0, 0, 1, 7, 50, 300)
	sc.rekeyBytes = pick[uint64](rng, 0, 0, 0, 1, 5000, 100000)
	sc.rekeyEvery = pick[time.Duration](rng, 0, 0, 0, 20*time.Millisecond, time.Second)
	sc.tcpKeepalive = one(3)
	sc.pollDelay = pick[time.Duration](rng, 0, 0, 50*time.Microsecond, time.Millisecond, 10*time.Millisecond)
	sc.virtual = one(4)
	level := pick(rng, 0, 0, 1, 1, 2, 3)
	for k := range sc.net {
		n := &sc.net[k]
		n.delay = pick[time.Duration](rng, 0, 20*time.Microsecond, time.Millisecond, 10*time.Millisecond, 100*time.Millisecond)
		if level == 0 {
			n.merge = pick(rng, 0, 0.5)
			continue
		}
		n.jitter = pick(rng, time.Microsecond, time.Millisecond, 10*time.Millisecond, 100*time.Millisecond, 100*time.Millisecond, 3*time.Second)
		p := [...]float64{0, 0.005, 0.03, 0.2}[level]
		if !one(4) {
			n.loss = p * rng.Float64()
		}
		if one(3) {
			n.outEvery = pick(rng, 50*time.Millisecond, time.Second, 10*time.Second)
			n.outFor = n.outEvery / pick[time.Duration](rng, 4, 20, 100)
		}
		if one(2) {
			n.reorder = 2 * p
		}
		if one(2) {
			n.dup = p
		}
		if one(3) && !sc.virtual {
			n.corrupt = p / 2
		}
		if one(3) {
			n.split = pick(rng, 0.01, 0.1, 0.5)
		}
		if one(3) {
			n.merge = pick(rng, 0.1, 0.9)
		}
		if one(3) {
			tap := p * pick(rng, 0.1, 0.3, 1)
			n.tapLoss, n.tapReadLoss = tap, tap
			n.tapDup, n.tapRdDupe = tap, tap
		}
		if one(6) {
			n.mtu = 600 + rng.IntN(900)
			n.mtuAt = pick(rng, 0, time.Second+time.Duration(rng.Int64N(int64(2*time.Second))))
			n.blackhole = one(3)
		}
		if one(4) {
			n.stale = pick(rng, 0.001, 0.01)
		}
		if one(8) {
			n.noSACK = pick(rng, 0.1, 1)
		}
		if one(8) {
			n.noTS = pick(rng, 0.1, 1)
		}
		if one(3) {
			n.ce = pick(rng, 0.01, 0.1)
		}
		if one(16) {
			n.forge = 0.001
			sc.mayAbort = true
		}
		if one(6) {
			n.attack = pick(rng, 0.001, 0.01)
			sc.mayAbort = sc.mayAbort || one(3)
		}
	}
	if level > 0 {
		sc.quiet = time.Second + pick[time.Duration](rng, 2, 10, 60)*time.Second
	}
	lives := one(2)
	flows := pick(rng, 1, 1, 1, 2, 4)
	if lives {
		flows = pick(rng, 1, 2, 4, 8)
	}
	scale := 1.0
	if flows > 1 {
		scale = 0.4
	}
	for range flows {
		sc.flows = append(sc.flows, randomFlow(rng, sc, scale))
	}
	if lives {
		randomLives(rng, sc)
	}
	for i := range sc.flows {
		for k := range sc.flows[i].model {
			if m := &sc.flows[i].model[k]; sc.mayAbort {
				m.givesUp = sc.net[0].attack+sc.net[1].attack > 0
				if m.keepalive == 0 {
					m.keepalive = 3 * time.Second
				}
			}
		}
	}
	return sc
}

func randomFlow(rng *rand.Rand, sc *scenario, scale float64) flowConfig {
	one := func(n int) bool { return rng.IntN(n) == 0 }
	c := flowConfig{
		aead: pick(rng, crypto.AllAEADs...), roleA: rng.IntN(2), active: rng.IntN(2),
		resumed: one(4), v6: one(2), vlan: pick[uint16](rng, 0, 0, 7, 4094),
		mss:  pick(rng, 1460, 1440, 1460, 536, 1220, 300),
		sack: !one(3), ts: !one(3), ws: !one(3), ecn: one(3),
		initAcked: rng.IntN(3), lateInstall: one(4), lateTime: time.Duration(rng.Int64N(int64(500 * time.Millisecond))),
	}
	if sc.net[0].mtu != 0 || sc.net[1].mtu != 0 {
		c.v6 = false // below 1280 an IPv6 path cannot be told to its sender
	}
	if !c.lateInstall && one(3) {
		for k := range c.warp {
			r := pick[uint64](rng, 0, 1<<31, 1<<32) - rng.Uint64N(300000)
			c.warp[k] = warp{
				i: uint64(uint32(r)) + pick[uint64](rng, 0, 0, 1, 1<<12)<<32,
				o: uint64(uint32(r)) + pick[uint64](rng, 0, 1, 1<<12, 1<<29)<<32,
			}
		}
	}
	size := pick(rng, 0, 1, 100, 5000, 60000, 300000, 600000, 2000000)
	for k := range c.model {
		m := &c.model[k]
		m.gso = pick(rng, 0, 3000, 16000, 64000, 64000)
		m.rcvBuf = pick[uint64](rng, 2048, 4096, 16384, 65535, 1<<18, 1<<20, 1<<20)
		m.sndBuf = pick[uint64](rng, 2048, 16384, 1<<18, 1<<20)
		if one(8) {
			m.shrinkAfter = 1 + time.Duration(rng.Int64N(int64(pick(rng, 100*time.Millisecond, 3*time.Second))))
			m.shrinkTo = 2048 + rng.Uint64N(pick(rng, 1, m.rcvBuf))
		}
		m.shift = pick[uint8](rng, 0, 2, 7, 7, 14)
		m.sws, m.keepSACK = one(2), one(2)
		m.probe = probeKind(rng.IntN(int(numProbes)))
		m.recut = recutKind(rng.IntN(int(numRecuts)))
		m.delack = pick[time.Duration](rng, 0, 40*time.Millisecond, 40*time.Millisecond)
		m.minRTO = 200 * time.Millisecond
		m.tlp, m.mtuProbe = !one(3), !one(3) || sc.net[k].blackhole
		if one(4) {
			m.keepalive = pick(rng, 300*time.Millisecond, 5*time.Second)
		}
		m.urg = one(10)
		m.lossy = sc.net[k].tapLoss > 0 || sc.net[k].tapDup > 0 || sc.gateway[k]
		m.dscp = uint8(rng.IntN(64))
		a := &c.app[k]
		a.total = rng.Uint64N(uint64(float64(size)*scale) + 1)
		if one(3) {
			a.total = rng.Uint64N(uint64(float64(pick(rng, 0, 10, 5000, 300000)) + 1))
		}
		a.write = pick(rng, 1<<16, 1<<16, 5000, 1500, 100, 1)
		if a.write < 1000 {
			a.total = min(a.total, uint64(a.write)*1500)
		}
		if a.write < 1<<16 && one(2) {
			a.writeGap = pick(rng, 10*time.Microsecond, time.Millisecond)
		}
		if one(3) {
			a.read = pick[uint64](rng, 100, 3000, 50000)
			a.readGap = pick(rng, time.Millisecond, 20*time.Millisecond)
		}
		a.closeWait = one(4) && k == 0
		if one(40) {
			a.abortAt = 1 + rng.Uint64N(a.total+1)
			sc.mayAbort = true
		}
		c.iss[k] = rng.Uint32()
		if one(3) {
			c.iss[k] = -rng.Uint32N(200000)
		}
	}
	c.fix()
	return c
}

// TestSim plays random scenarios. It is the main test of the translator.
func TestSim(t *testing.T) {
	simRun(t, simGoal(t), randomScenario)
}
