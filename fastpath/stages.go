package fastpath

import "time"

// Stages of an Engine's work on a vector of packets.
const (
	StageParse     = iota // headers, which come from memory
	StageLookup           // flow table, and fetching what it finds
	StageTranslate        // checks, checksums of what came, the flow's state, custody
	StageAEAD             // sealing and opening
	StageEmit             // what is due per flow, headers, copies, checksums of what goes
	NumStages
)

// StageNames are the stages' names, in their order.
var StageNames = [NumStages]string{"parse", "lookup", "translate", "aead", "emit"}

// StageTimes adds up the time that an Engine spends in each stage.
type StageTimes struct {
	Times [NumStages]time.Duration

	last time.Time
	// ended, if not nil, is called at the end of each stage instead. Tests set it.
	ended func(stage int)
}

// Begin ends the time that counts for none of the stages, such as that of the
// caller since its last call of the engine.
func (s *StageTimes) Begin() { s.last = time.Now() }

// Measure has the engine add its times to s, or to nothing if s is nil. s is used
// by the engine's goroutine. It costs a reading of the clock for every few
// packets. Where packets of one vector cannot wait for the end of it, a part of a
// stage may count for its neighbour.
func (e *Engine) Measure(s *StageTimes) { e.stages = s }

// mark counts the time since the last mark for a stage.
func (e *Engine) mark(stage int) {
	if e.stages != nil {
		e.stages.mark(stage)
	}
}

func (s *StageTimes) mark(stage int) {
	if s.ended != nil {
		s.ended(stage)
		return
	}
	now := time.Now()
	s.Times[stage] += now.Sub(s.last)
	s.last = now
}
