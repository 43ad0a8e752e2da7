# Flipside. "make help" lists what there is.

GO        ?= .ci/go
BIN       := bin
PREFIX    ?= /usr
DESTDIR   ?=
GOFLAGS_  := -trimpath -tags grpcnotrace -buildvcs=auto -ldflags "-s -w"

# Packages whose tests are quick enough for the race detector in the usual loop.
RACE      := ./cmd/... ./updater/... ./omaha/... ./payload/bench ./payload/bsdiff ./payload/unxz ./payload/unbzip2 ./payload/bcj ./partition/... ./reboot/... ./lock/...
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
FUZZTIME  ?= 4s

# What a bare Debian 12 machine lacks. Installed by "make deps" when root runs it; only named otherwise.
DEB_PACKAGES := ca-certificates git gcc libc6-dev e2fsprogs gdisk cgpt fdisk dbus strace swtpm swtpm-tools systemd libtss2-esys-3.0.2-0 libtss2-rc0 libtss2-tcti-swtpm0 cryptsetup-bin systemd-boot-efi mmdebstrap squashfs-tools bsdiff openssl chromium fonts-dejavu-core

.PHONY: vm vm-images vm-soak vm-short vm-test help build demo test test-go test-race vet lint staticcheck fmt-check fuzz bench bench-lock bench-omaha screenshots bench-delta bench-payload simulate cluster powercut install clean deps peers toolchain

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: toolchain ## build bin/flipsided and bin/flipside
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build $(GOFLAGS_) -o $(BIN)/ ./cmd/flipsided ./cmd/flipside

demo: deps build ## watch three hosts update themselves (no root needed; touches only its own temporary directory)
	@$(BIN)/flipside demo $(DEMO_ARGS)

test: deps vet fmt-check staticcheck test-go test-race machines-short packages-short powercut screenshots vm-test fuzz ## everything that must hold, on a clean clone
	@echo "all tests passed"

test-go: toolchain peers
	PATH="$(CURDIR)/bin/peers/usr/bin:$$PATH" $(GO) test ./...

test-race: toolchain
	$(GO) test -race -short -timeout 20m $(RACE)
	$(GO) test -race -short -timeout 20m -run 'OtherPrograms|ResumeAnywhere|FailuresOnTheWay|Flipped|SameBytes|DeltaMakes' ./payload ./payload/build

vet: toolchain
	$(GO) vet ./...

fmt-check: toolchain
	@out=$$($(GO) run cmd/gofmt -l $$(git ls-files '*.go' 2>/dev/null || find . -name '*.go')); if [ -n "$$out" ]; then echo "gofmt would change:"; echo "$$out"; exit 1; fi

staticcheck: toolchain
	$(GO) run $(STATICCHECK) ./...

lint: vet fmt-check staticcheck ## vet, gofmt and staticcheck

# Without a bound Go spends up to a minute, most of FUZZTIME, on making the first interesting input smaller.
fuzz: toolchain ## run every fuzz target for FUZZTIME (4s) each
	@.ci/fuzz $(GO) $(FUZZTIME)

bench: toolchain ## benchmarks, with ratios against named references measured in the same run
	$(GO) test -run '^$$' -bench . -benchmem ./...

bench-lock: toolchain ## the semaphore on a real etcd: 50 waiters against the ideal time, and latencies
	$(GO) test ./lock/etcd -run '^$$' -bench . -benchtime 6x

bench-payload: toolchain ## applying payloads, against a C engine on the system's libraries in the same run (FLIPSIDE_BENCH_MIB: size of the image, 512)
	@.ci/deps libbz2-dev liblzma-dev libzstd-dev libssl-dev gcc libc6-dev
	FLIPSIDE_LONG=1 $(GO) test -count=1 -timeout 60m -run TestBenchPayload -v ./payload/bench

screenshots: toolchain ## the release server's page in a real browser; the pictures stay in bin/screenshots
	@mkdir -p $(BIN)/screenshots
	FLIPSIDE_SCREENSHOTS=$(CURDIR)/$(BIN)/screenshots $(GO) test -count=1 -run 'Screenshots|LivePage' ./omaha/server

bench-omaha: toolchain ## the release server with 100 000 known hosts, against go-omaha's example server
	FLIPSIDE_LONG=1 $(GO) test -count=1 -run TestBenchOmaha -v ./omaha/server

bench-delta: toolchain ## sizes and times of deltas and full payloads, against the C++ generators' and the system's tools (FLIPSIDE_BENCH_MIB: size of a file system, 128)
	@.ci/deps xz-utils bzip2 bsdiff e2fsprogs squashfs-tools
	FLIPSIDE_LONG=1 $(GO) test -count=1 -timeout 30m -run TestBenchDelta -v ./payload/build

simulate: toolchain ## 10 000 simulated hosts under the real decision code of the semaphore, and 1 000 real clients on one etcd
	FLIPSIDE_LONG=1 FLIPSIDE_SEED=$(SEED) $(GO) test -count=1 -timeout 30m -run Simulation -v ./lock
	FLIPSIDE_LONG=1 $(GO) test -count=1 -timeout 10m -run ThousandClients -v ./lock/etcd

cluster: toolchain ## the semaphore on a real etcd of three members that are killed, stopped and cut off one by one
	FLIPSIDE_LONG=1 $(GO) test -count=1 -timeout 15m -run ClusterLoses -v ./lock/etcd

powercut: toolchain ## enumerate crash states of a whole update and print the counts; kill the built programs at every write
	FLIPSIDE_LONG=1 $(GO) test -count=1 -timeout 30m -v -run 'Enumerate|Mutation|Faults|LyingDisk' ./partition/powercut
	FLIPSIDE_LONG=1 $(GO) test -count=1 -timeout 30m -v -run 'ExplainsPowerCuts|KilledAtEveryWrite' ./updater ./cmd/flipsided

VM        ?= dist/vm
VM_PACKAGES := qemu-system-x86 seabios ovmf mmdebstrap e2fsprogs cryptsetup-bin binutils cpio systemd-boot-efi dosfstools mtools gdisk kmod swtpm
VM_SCENARIOS ?= update,panic,hang,sick,cuts,table,journal,two,rollback,entries,bls,bls-cuts
VM_RELEASES ?=
CUTS      ?= 30
SEED      ?= 1
JOBS      ?= $(shell nproc)

vm-images: toolchain
	@.ci/deps $(VM_PACKAGES)
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build $(GOFLAGS_) -o $(BIN)/ ./cmd/...
	cmd/flipside-vm/build-images $(VM)/images $(VM_RELEASES)

vm: vm-images ## virtual machines that update, fall back and lose power (root; CUTS=30 SEED=1 JOBS=2), with a report in dist/vm
	$(BIN)/flipside-vm -images $(VM)/images -out $(VM)/out -run $(VM_SCENARIOS) -cuts $(CUTS) -seed $(SEED) -jobs $(JOBS)

vm-soak: ## the same with 100 power cuts, and as many on hosts with systemd-boot
	$(MAKE) vm CUTS=100

vm-short: ## one good update, one that falls back, three power cuts
	$(MAKE) vm VM_SCENARIOS=update,sick,cuts VM_RELEASES="base good next third sick" CUTS=3

# Where nothing can be mounted, or nothing installed, it says so and is no failure.
vm-test: ## one release that fails, one that is good, three power cuts; skipped with the reason where images cannot be built
	@if why=$$(.ci/can-vm $(VM_PACKAGES)); then \
	  $(MAKE) --no-print-directory vm VM_SCENARIOS=sick,cuts VM_RELEASES="base good next third sick" CUTS=3; \
	else echo "virtual machines: skipped: $$why"; fi

install: build ## install programs, units, alert rules and documents into $(DESTDIR)$(PREFIX)
	install -D -m 0755 $(BIN)/flipsided $(DESTDIR)$(PREFIX)/sbin/flipsided
	install -D -m 0755 $(BIN)/flipside $(DESTDIR)$(PREFIX)/bin/flipside
	install -D -m 0644 packaging/systemd/flipsided.service $(DESTDIR)$(PREFIX)/lib/systemd/system/flipsided.service
	install -m 0644 packaging/systemd/flipside-serve@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/
	install -m 0644 packaging/systemd/flipside-deadman.service packaging/systemd/flipside-deadman.timer $(DESTDIR)$(PREFIX)/lib/systemd/system/
	install -D -m 0755 packaging/systemd/deadman $(DESTDIR)$(PREFIX)/lib/flipside/deadman
	install -D -m 0644 packaging/systemd/flipside.catalog $(DESTDIR)$(PREFIX)/lib/systemd/catalog/flipside.catalog
	install -D -m 0755 packaging/systemd/account $(DESTDIR)$(PREFIX)/lib/flipside/account
	install -D -m 0644 packaging/sysusers/flipside.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/flipside.conf
	install -D -m 0644 packaging/tmpfiles/flipside.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/flipside.conf
	install -d $(DESTDIR)$(PREFIX)/share/dbus-1/system.d $(DESTDIR)$(PREFIX)/share/polkit-1/actions
	install -m 0644 packaging/dbus/*.conf $(DESTDIR)$(PREFIX)/share/dbus-1/system.d/
	install -m 0644 packaging/polkit/*.policy $(DESTDIR)$(PREFIX)/share/polkit-1/actions/
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BIN)/flipside completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/flipside
	$(BIN)/flipside completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_flipside
	$(BIN)/flipside completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/flipside.fish
	install -D -m 0644 packaging/man/flipsided.8 $(DESTDIR)$(PREFIX)/share/man/man8/flipsided.8
	$(BIN)/flipside man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/flipside/prometheus
	install -m 0644 packaging/prometheus/flipside.rules.yml packaging/prometheus/flipside.dashboard.json $(DESTDIR)$(PREFIX)/share/flipside/prometheus/
	install -d $(DESTDIR)$(PREFIX)/share/doc/flipside
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/flipside/pictures docs/pictures/*
	install -m 0644 README.md CHANGELOG.md docs/*.md packaging/examples/flipside.toml $(DESTDIR)$(PREFIX)/share/doc/flipside/
	install -m 0644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/flipside/copyright

VERSION ?= $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//; s/-/+/' | grep . || echo 0.1.0~git$$(git log -1 --format=%cd.%h --date=format:%Y%m%d 2>/dev/null || echo 0))
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

.PHONY: packages packages-short machines machines-short packages-test
packages: ## deb, rpm, tarball, system extension and SBOM in dist/; the same commit gives the same bytes
	@rm -rf dist/root && $(MAKE) --no-print-directory install DESTDIR=$(CURDIR)/dist/root
	@VERSION=$(VERSION) GO=$(abspath .ci/go) packaging/build

packages-test: packages ## what the packages hold; install, upgrade, remove and purge in a clean Debian (root and mmdebstrap); a second build, byte for byte
	@.ci/deps rpm
	@packaging/test

packages-short: ## the deb alone: in a clean Debian, and as the README says on a machine that reboots (root only; skipped with the reason where that cannot be)
	@rm -rf dist/root && $(MAKE) --no-print-directory -s install DESTDIR=$(CURDIR)/dist/root
	@VERSION=$(VERSION) GO=$(abspath .ci/go) packaging/build deb
	@packaging/test deb
	FLIPSIDE_DIST=$(CURDIR)/dist $(GO) test -count=1 -timeout 10m -run TestReadme -v ./updater/host/machinetest

machines: packages ## machines that really reboot, with the deb installed: one past all that is against it, two and five with an etcd, a bad release (root only)
	FLIPSIDE_DIST=$(CURDIR)/dist $(GO) test -count=1 -timeout 30m -v ./updater/host/machinetest

machines-short: build ## the same without the five, from the tree that "make install" makes (root only; skipped where the kernel forbids it)
	@rm -rf $(BIN)/tree && $(MAKE) --no-print-directory -s install DESTDIR=$(CURDIR)/$(BIN)/tree
	FLIPSIDE_TREE=$(CURDIR)/$(BIN)/tree $(GO) test -short -count=1 -timeout 10m -v ./updater/host/machinetest

clean: ## remove what the build made
	rm -rf $(BIN) dist

peers: # programs that Flipside talks to, for the tests; unpacked and not installed: they would run as services
	@.ci/peers bin/peers etcd-server prometheus

deps: # what the tests and the demo use of the system
	@.ci/deps $(DEB_PACKAGES)

toolchain:
	@$(GO) version >/dev/null
