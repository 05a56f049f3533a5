GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 10s
SEGMENTS ?= 1e8
FIRST    ?= 1
DURATION ?= 10m

# What sudo made belongs to its user, whose make could not write it otherwise.
give-back = @[ -z "$$SUDO_UID" ] || chown -R "$$SUDO_UID:$$SUDO_GID" bin

.PHONY: all build demo test test-unit test-interop test-matrix test-limits sim soak twins bench profile generate lint fuzz clean root

all: build

build:
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o bin/tcpcrypt ./cmd/tcpcrypt
	$(give-back)

# Two network namespaces, a daemon in each, one encrypted download. Needs root.
demo: root build
	$(GO) run ./bench/demo

# Everything; the packages with ring buffers once more with ownership checks.
test: root
	$(GO) test -p 1 -count=1 -timeout 20m ./...
	$(GO) test -p 1 -count=1 -timeout 10m -tags xdpdebug ./xdp/... ./fastpath/...

# What needs neither root nor much time.
test-unit:
	$(GO) test -count=1 -timeout 10m -short ./...

# Against a second, independent implementation.
test-interop: root
	$(GO) test -count=1 -timeout 30m -v ./bench/interop

# The figures of docs/limits.md: a flood of a million SYNs, and a hundred
# thousand idle connections.
test-limits: root
	$(GO) test -count=1 -timeout 30m -v ./bench/e2e -run '^(TestSYNFlood|TestIdleFlows)$$' -flood.syns=1000000 -idle.flows=100000

# The simulator for long: SEGMENTS on the wire, over seeds from FIRST on.
sim:
	$(GO) test -count=1 -timeout 0 -run '^TestSim$$' -v ./fastpath -sim.segments=$(SEGMENTS) -sim.first=$(FIRST) -sim.progress=1m

# The simulator against bugs that are planted one at a time: it must find each.
.PHONY: sim-mutants
sim-mutants:
	$(GO) run ./bench/mutants

# Two hosts whose connections, wire and daemons are disturbed at random, for
# DURATION: every stream is exact or reset with a reason, nothing leaks or grows.
soak: root build
	$(GO) run ./bench/soak -duration $(DURATION)

# The same random connections over two pairs of hosts with random settings, one
# without and one with daemons, for DURATION: what is worse with them is shown.
twins: root build
	$(GO) run ./bench/twins -duration $(DURATION)

# The program on network cards with zero-copy, which are emulated: needs apt for
# the emulator and a kernel, which go to .cache, but neither root nor KVM.
# REFUSE=1 gives it cards that refuse zero-copy: then it must fail. ONLY=hosts and
# ONLY=gateway run one part.
test-zerocopy:
	$(GO) run ./bench/vm/zerocopy $(if $(REFUSE),-refuse) $(if $(ONLY),-only $(ONLY))

# Every cell of the matrix of paths and hosts, plain and encrypted, and longer
# transfers under random loss; rewrites docs/matrix.md.
test-matrix: root
	$(GO) test -count=1 -timeout 60m -v ./bench/matrix -matrix.all -matrix.table "$(CURDIR)/docs/matrix.md"

# Cryptography, the engine, and whole hosts against plain TCP, in one run; the
# charts are in bin/bench/report.html.
bench: root build
	@mkdir -p bin/bench
	bin/tcpcrypt bench micro --save bin/bench/micro.json
	bin/tcpcrypt bench pipeline --save bin/bench/pipeline.json
	bin/tcpcrypt bench wire --save bin/bench/wire.json
	bin/tcpcrypt bench capacity --save bin/bench/capacity.json
	bin/tcpcrypt bench report -o bin/bench/report.html bin/bench/*.json
	$(give-back)

# Where the engine spends its time, by which the compiler decides what of it to
# inline: due when functions of the hot path were renamed or rewritten.
profile:
	$(GO) run -trimpath ./bench/profile

# The BPF objects, which need clang, llvm-strip and the headers of libbpf, and
# the assembly.
generate:
	$(GO) generate ./...

lint:
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "not gofmt'ed:" $$unformatted >&2; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags xdpdebug ./xdp/... ./fastpath/...
	$(GO) vet -C crypto/internal/vaesgcm/gen .
	$(GO) tool staticcheck ./...

# A short round over every fuzz target.
fuzz:
	@set -e; \
	grep -rHoE '^func Fuzz[A-Za-z0-9_]*' --include='*_test.go' . | sort | while IFS=: read -r file func; do \
		echo "fuzz $${file%/*} $${func#func }"; \
		$(GO) test -run '^$$' -fuzz "^$${func#func }\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5x -timeout 0 "$${file%/*}" </dev/null; \
	done

clean:
	rm -rf bin

root:
	@[ "$$(id -u)" = 0 ] || { echo "this target needs root (network namespaces, AF_XDP, BPF): run it with sudo; 'make test-unit' does without" >&2; exit 1; }
