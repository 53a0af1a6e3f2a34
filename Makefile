# Needs Go (the version in go.mod) and, for what installs packages, apt-get. `make help` lists the targets.

GO         ?= go
TOOL       := $(GO) tool -modfile=go.tool.mod
FUZZTIME   ?= 5s
BENCH      ?= .
BENCHTIME  ?= 1s
COUNT      ?= 1

.DEFAULT_GOAL := help
.PHONY: help build demo test packages format check-format vet arch unit lint tidy fuzz bench bench-cas bench-exec soak-kills soak-cancels chaos test-compose conformance soak-cas scale-cas clean

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/jetfarm, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/jetfarm ./cmd/jetfarm

demo: ## run a real Bazel build on a farm on this machine, twice, and show what ran where
	@./integration/demo.sh

# One after another also under -j: the tests need the machine to themselves.
test: ## run everything that CI runs: format, vet, tests with a real Bazel, lint, tidy, fuzz
	@set -e; for step in packages check-format vet arch unit lint tidy fuzz; do \
		printf '\n== make %s\n' $$step; $(MAKE) --no-print-directory $$step; \
	done; printf '\nAll checks passed.\n'

packages: ## install the Debian packages that tests and demo need, if some are missing
	@./.ci/packages

format: ## format the source
	$(TOOL) gofumpt -w .

check-format: ## name the files that are not formatted
	@files=$$($(TOOL) gofumpt -l .); if [ -n "$$files" ]; then \
		printf 'not formatted, run make format:\n%s\n' "$$files"; exit 1; fi

vet: ## run go vet
	$(GO) vet ./...

arch: ## check the import rules, go statements and package comments
	$(GO) test -run '^TestArchitecture' ./integration

unit: ## run all Go tests, those with a real Bazel included
	@if [ "$$(id -u)" -ne 0 ]; then echo 'not root: the tests of actions that run as users of their own are skipped'; \
	elif ! unshare --mount --ipc true 2>/dev/null; then echo 'no CAP_SYS_ADMIN: the tests of the isolation "namespaces" are skipped'; fi
	$(GO) test -race -shuffle=on -timeout=15m ./...

lint: ## run golangci-lint; the first run builds it, which takes minutes
	$(TOOL) golangci-lint run ./...
	./.ci/seeded

tidy: ## check that go.mod and go.sum are complete and have nothing else
	$(GO) mod tidy -diff

fuzz: ## run every fuzz test for FUZZTIME (5s)
	@./.ci/fuzz $(FUZZTIME)

bench: ## run the benchmarks: BENCH=regexp BENCHTIME=1s COUNT=1; compare runs with benchstat
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -count $(COUNT) -benchmem ./...

bench-cas: ## run the benchmarks of the storage through a real farm, see docs/PERFORMANCE.md
	$(GO) test -run '^$$' -bench 'FindMissing|Batch|ByteStream|ActionResult|SmallRead' -benchtime $(BENCHTIME) -count $(COUNT) ./integration

bench-exec: ## run the benchmarks of execution through a real farm, see docs/PERFORMANCE.md
	$(GO) test -run '^$$' -bench '^BenchmarkExecute' -benchtime 2000x -count $(COUNT) ./integration
	$(GO) test -run '^$$' -bench '^BenchmarkWaitingStream' -benchtime 1x -count $(COUNT) ./integration
	$(GO) test -run '^$$' -bench '^BenchmarkWatcher' -benchtime 2x -count $(COUNT) ./broker

soak-kills: ## kill broker and frontend at 50 random points of uploads, takes two minutes
	JETFARM_KILLS=50 $(GO) test -run '^TestBlobsAreWholeAfterKills$$' -v ./integration

soak-cancels: ## cancel 200 calls while connections break and an upstream dies, with the race detector; takes a minute
	JETFARM_CANCELS=200 $(GO) test -race -run 'CancelsInAStorm' -count=1 -v ./integration

chaos: ## break a farm in every way during a build of 2 000 actions and a load of 20 000; 40 minutes
	JETFARM_CHAOS=20000 $(GO) test -run '^TestChaos$$' -v -count 1 -timeout 150m ./integration

test-compose: build ## run deployments/compose.yaml with a docker engine of its own, as root; takes minutes
	JETFARM_COMPOSE=1 $(GO) test -run '^TestCompose$$' -count=1 -timeout=25m -v ./integration

conformance: ## rewrite docs/CONFORMANCE.md from the names of the tests
	$(GO) test ./integration/conformance -update

soak-cas: ## write 20 GiB through a store of 1 GiB and check bounds, hot set and latency; 5 minutes
	JETFARM_SOAK=1 $(GO) test -run '^TestSoakCAS$$' -v -count 1 -timeout 60m ./integration

scale-cas: ## compare a store of 10 000 blobs with one of a million; 3 minutes
	JETFARM_SCALE=1 $(GO) test -run '^TestScaleCAS$$' -v -count 1 -timeout 60m ./integration

clean: ## remove what build made
	rm -rf bin
