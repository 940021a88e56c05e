# SPDX-License-Identifier: BSD-3-Clause
# `make help` lists the targets. Everything runs on Debian's own Python: nbdkit embeds it and `nbd` is there only.

PREFIX  ?= /usr/local
DESTDIR ?=
# Options or test names for pytest, for example: make test TESTS='tests/unit -k options'
TESTS   ?=
# Tests that run side by side: most of them wait for deadlines, so more than there are processors. (All of tests/e2e,
# tests/model and tests/torture take about 14 minutes of processor time.)
WORKERS ?= 4
# For `make power`: how many histories from seed SEED on, and how many states after a cut are looked at for each.
HISTORIES ?= 50
SAMPLES   ?= 80
# For `make torture`: any text as seed, how many kills, and the number of one history to replay. For `make test-vm`:
# how many hosts are killed, at moments that follow from the number SEED; without KILLS the tests of tests/vm.
SEED    ?=
KILLS   ?=
HISTORY ?=

# For `make test-cluster`: how many random rounds, in place of the tests.
ROUNDS ?=

# For `make soak`: how many seconds; SEED= is any text.
SOAK ?= 3600

# For `make test-debian` and `make test-deb`: the release, by its name.
RELEASE ?=

# For `make install`: 1 installs the modules compiled. For `make deb`: 0 leaves the compiled ones out.
COMPILED ?=

# Options for scripts/bench, for example: make bench BENCH='--quick --check'
BENCH   ?=

# Compiling all modules anew is two fifths of the processor time that nbdkit needs to start, and thousands are started.
unexport PYTHONDONTWRITEBYTECODE

PYTHON := .venv/bin/python
# Recursive on purpose: nbdkit is asked only by install and uninstall.
PLUGINDIR = $(shell nbdkit --dump-config | sed -n 's/^plugindir=//p')

LIBRARY := $(PREFIX)/lib/nbdkit-replication
VERSION  = $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' replication/__init__.py)
# For administrators. They find the library by their own place: ../lib/nbdkit-replication.
INSTALLED_SCRIPTS := replctl ft-agent nbdkit-replication replication-monitor
# For systemd, which looks below /usr/local as well.
UNITS     := nbdkit-replication@.service nbdkit-replication@.socket replication-monitor.service \
             nbdkit-replication-test@.service nbdkit-replication-test@.timer
UNITDIR   := $(PREFIX)/lib/systemd/system
# Where Pacemaker looks for agents, whatever PREFIX is.
OCFDIR    := /usr/lib/ocf/resource.d/nbdkit
# Who the service is, and its folders: PREFIX/lib/NAME.d/nbdkit-replication.conf.
USER_CONF := sysusers tmpfiles
# For Prometheus and Grafana.
MONITORING := alerts.yml grafana.json
HANDLERS   := mail wall webhook
SHARE      := $(PREFIX)/share/nbdkit-replication
# What is installed, and from where.
FROM    := $(if $(filter-out 0,$(COMPILED)),build/compiled,.)
MODULES  = $(shell cd '$(FROM)' && find replication *.so -path replication/demo -prune -o \
    '(' -name '*.py' -o -name '*.so' ')' -print 2>/dev/null)
# Scripts have no suffix; their first line says what they are.
PYTHON_SCRIPTS := $(shell grep -lsE '^\#!.*python' scripts/* scripts/ocf/* debian/tests/* tests/cluster/*)
SHELL_SCRIPTS  := $(shell grep -lsE '^\#!.*/(ba)?sh' scripts/* .ci/* tests/*.sh tests/cluster/*.sh debian/*) completion/replctl

.PHONY: help demo bench man compile test test-parallel test-compiled test-monitor test-debian test-deb deb test-vm test-libvirt test-cluster torture ledger soak power lint format install uninstall clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: ## Replicate a disk, fail over, and check the result
	@scripts/setup demo
	@scripts/demo
	@scripts/demo-installed

test: ## Run the tests (TESTS= picks some)
	@scripts/setup test
ifeq ($(TESTS),)
	@$(MAKE) --no-print-directory test-parallel
	@$(PYTHON) -m pytest -q --durations=3 -m alone
else
	@$(PYTHON) -m pytest -q --durations=10 $(TESTS)
endif

test-parallel: # All tests that may run side by side, or those in the files and folders of TESTS.
	@scripts/setup test
	@$(PYTHON) -m pytest -q --durations=50 -n $(WORKERS) --dist worksteal -m 'not alone' $(TESTS)

# NAME.SECTION of each page; its source is man/NAME.pod.
MAN_PAGES := nbdkit-replication-plugin.1 replctl.8 replication.toml.5 ft-agent.8 nbdkit-replication.8 replication-monitor.8 ocf_nbdkit_replication.7
MANDIR    := $(PREFIX)/share/man
# Where the package bash-completion looks.
BASHDIR   := $(PREFIX)/share/bash-completion/completions

man: $(addprefix build/man/,$(MAN_PAGES)) ## Make the manual pages, in build/man

# Renamed when it is whole: several installations may be made at once.
build/man/%: $(wildcard man/*.pod) replication/__init__.py
	@command -v pod2man >/dev/null || scripts/setup man
	@mkdir -p build/man
	@pod2man --errors=die --center=nbdkit-replication --release='$(VERSION)' --section='$(subst .,,$(suffix $*))' \
	    'man/$(basename $*).pod' "$@.$$$$" && mv "$@.$$$$" '$@'

compile: ## Make build/compiled/plugin.py, the same with its inner modules compiled: quicker with small requests
	@scripts/setup compile
	@scripts/compile

test-compiled: compile ## Run the tests that start the plugin with the compiled one (TESTS= picks some)
	@scripts/setup test
	@REPLICATION_PLUGIN='$(CURDIR)/build/compiled/plugin.py' $(PYTHON) -m pytest -q --durations=5 -n $(WORKERS) \
	    --dist worksteal -m 'not alone' $(or $(TESTS),tests/torture tests/e2e tests/model)

test-monitor: ## Try the monitor with a real Prometheus and a real browser (TESTS= picks some)
	@scripts/setup test metrics browser
	@$(PYTHON) -m pytest -q --durations=5 $(or $(TESTS),tests/monitor)

test-debian: ## Run the tests on another Debian, in a root under build/ (RELEASE=trixie, bookworm; TESTS= picks some)
	@test -n '$(RELEASE)' || { echo "test-debian: say which, for example: make test-debian RELEASE=trixie" >&2; exit 2; }
	@scripts/setup debian
	@scripts/debian '$(RELEASE)' scripts/setup test
	@scripts/debian '$(RELEASE)' make test TESTS='$(TESTS)' WORKERS='$(WORKERS)'

deb: ## Build the Debian package for this release, in build/deb (COMPILED=0: without compiled modules)
	@scripts/setup package
	@scripts/deb $(if $(filter 0,$(COMPILED)),--plain)

test-deb: ## Build and try the package on each supported Debian, in roots under build/ (RELEASE= for one of them)
	@scripts/setup debian trial
	@for release in $(or $(RELEASE),bookworm trixie); do \
	    scripts/debian "$$release" scripts/setup package && \
	    scripts/debian "$$release" make deb && \
	    scripts/debian "$$release" tests/package_lint.sh && \
	    scripts/debian --clean "$$release" tests/package_lifecycle.sh && \
	    tests/package_piuparts.sh "$$release" && \
	    scripts/debian --boot "$$release" tests/package_booted.sh || exit 1; done

test-vm: ## Run guests in QEMU, kill their hosts, and compare (KILLS=, SEED=; TESTS= picks some)
	@scripts/setup test vm
ifeq ($(KILLS),)
	@$(PYTHON) -m pytest -q --durations=5 $(or $(TESTS),tests/vm)
else
	@scripts/vm-failover --rounds '$(KILLS)' $(if $(SEED),--seed '$(SEED)')
endif

test-libvirt: ## Run a guest by Debian's libvirt on either host, with a failover between (TESTS= picks some)
	@scripts/setup test vm libvirt
	@$(PYTHON) -m pytest -q --durations=5 $(or $(TESTS),tests/libvirt)

# In a root of its own, so that the cluster's daemons and packages stay out of this machine.
test-cluster: ## Run two hosts with Debian's Pacemaker and corosync, and break them (ROUNDS=, SEED=; TESTS=; RELEASE=)
	@scripts/setup debian
	@scripts/debian '$(or $(RELEASE),$(shell . /etc/os-release && echo $$VERSION_CODENAME))' scripts/setup test vm libvirt cluster
	@scripts/debian '$(or $(RELEASE),$(shell . /etc/os-release && echo $$VERSION_CODENAME))' env ROUNDS='$(ROUNDS)' SEED='$(SEED)' \
	    .venv/bin/python -m pytest -q -s --durations=5 -o faulthandler_timeout=0 $(or $(TESTS),$(if $(ROUNDS),tests/cluster/test_rounds.py,tests/cluster))

bench: compile ## Compare with QEMU's own driver, about 35 minutes (BENCH= has options)
	@scripts/setup bench
	@scripts/bench --plugin plugin.py --plugin compiled=build/compiled/plugin.py $(BENCH)

torture: ## Kill processes at random and compare (SEED=, KILLS=, HISTORY=)
	@scripts/setup test
	@PYTHONPATH=tests $(PYTHON) -m torture --seed '$(SEED)' --kills '$(KILLS)' --history '$(HISTORY)'

ledger: ## Hold what a pair claims against the truth, at random (SEED=, HISTORIES=, HISTORY=)
	@scripts/setup test
	@PYTHONPATH=.:tests $(PYTHON) -m model.ledger --seed '$(SEED)' --histories '$(HISTORIES)' --history '$(HISTORY)'

soak: ## Everything that can go wrong, at once and at random, held to its bounds (SOAK= seconds, SEED=)
	@scripts/setup test
	@PYTHONPATH=.:tests $(PYTHON) -m soak --seed '$(SEED)' --seconds '$(SOAK)'

power: ## Cut the power at random and compare (SEED=, HISTORIES=, SAMPLES=)
	@scripts/setup test
	@first='$(or $(SEED),0)'; for seed in $$(seq "$$first" $$((first + $(HISTORIES) - 1))); do \
	    printf 'seed %s: ' "$$seed"; PYTHONPATH=.:tests $(PYTHON) -m power.simulator "$$seed" '$(SAMPLES)' || exit 1; done

lint: ## Check style, types and shell scripts
	@scripts/setup lint
	$(PYTHON) -m ruff check . $(PYTHON_SCRIPTS)
	$(PYTHON) -m ruff format --check . $(PYTHON_SCRIPTS)
	$(PYTHON) -m mypy
	shellcheck $(SHELL_SCRIPTS)

format: ## Lay the Python files out as lint wants them
	@scripts/setup lint
	$(PYTHON) -m ruff check --fix . $(PYTHON_SCRIPTS)
	$(PYTHON) -m ruff format . $(PYTHON_SCRIPTS)

# nbdkit runs an executable nbdkit-NAME-plugin in its plugin folder by its first line, so `nbdkit replication` runs
# plugin.py; plugin.py follows the symbolic link to find replication/ beside itself.
install: man $(if $(filter-out 0,$(COMPILED)),compile) ## Install, so that `nbdkit replication KEY=VALUE...` works (PREFIX, DESTDIR, COMPILED=1)
	@test -n "$(PLUGINDIR)" || { echo "install: nbdkit is missing: run scripts/setup runtime" >&2; exit 1; }
	rm -rf "$(DESTDIR)$(LIBRARY)" # modules of an older version
	for module in $(MODULES); do install -D -m 644 "$(FROM)/$$module" "$(DESTDIR)$(LIBRARY)/$$module" || exit 1; done
	install -m 755 plugin.py "$(DESTDIR)$(LIBRARY)/plugin.py"
	for file in $(MONITORING); do install -D -m 644 "monitoring/$$file" "$(DESTDIR)$(SHARE)/$$file" || exit 1; done
	for file in $(HANDLERS); do install -D -m 755 "monitoring/handlers/$$file" "$(DESTDIR)$(SHARE)/handlers/$$file" || exit 1; done
	test -n "$(DESTDIR)" || /usr/bin/python3 -m compileall -q "$(LIBRARY)" # a node may not write there; a package does it later
	install -d "$(DESTDIR)$(PLUGINDIR)"
	ln -sfn "$(LIBRARY)/plugin.py" "$(DESTDIR)$(PLUGINDIR)/nbdkit-replication-plugin"
	install -D -m 755 scripts/ocf/replication "$(DESTDIR)$(LIBRARY)/ocf/replication"
	install -d "$(DESTDIR)$(OCFDIR)"
	ln -sfn "$(LIBRARY)/ocf/replication" "$(DESTDIR)$(OCFDIR)/replication"
	for script in $(INSTALLED_SCRIPTS); do install -D -m 755 "scripts/$$script" "$(DESTDIR)$(PREFIX)/bin/$$script" || exit 1; done
	for unit in $(UNITS); do sed 's,/usr/bin/\(nbdkit-replication\|replication-monitor\|replctl\),$(PREFIX)/bin/\1,' "systemd/$$unit" | \
	    install -D -m 644 /dev/stdin "$(DESTDIR)$(UNITDIR)/$$unit" || exit 1; done
	for conf in $(USER_CONF); do install -D -m 644 "systemd/$$conf.conf" \
	    "$(DESTDIR)$(PREFIX)/lib/$$conf.d/nbdkit-replication.conf" || exit 1; done
	for page in $(MAN_PAGES); do install -D -m 644 "build/man/$$page" \
	    "$(DESTDIR)$(MANDIR)/man$${page##*.}/$$page" || exit 1; done
	install -D -m 644 completion/replctl "$(DESTDIR)$(BASHDIR)/replctl"

uninstall: ## Remove what install has put there
	@test -n "$(PLUGINDIR)" || { echo "uninstall: nbdkit is missing, so its plugin folder is unknown" >&2; exit 1; }
	rm -f "$(DESTDIR)$(PLUGINDIR)/nbdkit-replication-plugin"
	rm -f "$(DESTDIR)$(OCFDIR)/replication"
	rmdir "$(DESTDIR)$(OCFDIR)" 2>/dev/null || true
	rm -rf "$(DESTDIR)$(LIBRARY)"
	for file in $(HANDLERS); do rm -f "$(DESTDIR)$(SHARE)/handlers/$$file"; done
	for file in $(MONITORING); do rm -f "$(DESTDIR)$(SHARE)/$$file"; done
	for folder in handlers ''; do rmdir "$(DESTDIR)$(SHARE)/$$folder" 2>/dev/null || true; done
	for script in $(INSTALLED_SCRIPTS); do rm -f "$(DESTDIR)$(PREFIX)/bin/$$script"; done
	for unit in $(UNITS); do rm -f "$(DESTDIR)$(UNITDIR)/$$unit" || exit 1; done
	for conf in $(USER_CONF); do rm -f "$(DESTDIR)$(PREFIX)/lib/$$conf.d/nbdkit-replication.conf" || exit 1; done
	for page in $(MAN_PAGES); do rm -f "$(DESTDIR)$(MANDIR)/man$${page##*.}/$$page" || exit 1; done
	rm -f "$(DESTDIR)$(BASHDIR)/replctl"

clean: ## Remove everything that is not source, .venv included
	rm -rf .venv .hypothesis .pytest_cache .mypy_cache .ruff_cache build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
