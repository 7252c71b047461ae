# The appliance's verbs. Each is one line here; what is longer lives in scripts/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

##@ Run
up: setup ## start the appliance, wait until it answers, print URLs, first key and a curl (MODE=gpu|cpu|local)
	@scripts/up
down: ## stop everything that `make up` started and leave no process or port behind
	@scripts/down
status: ## what runs, what is ready, where
	@scripts/status
logs: ## follow the logs of all services
	@scripts/logs
stop: ## stop the services but keep containers and data
	@scripts/stop

##@ One service, in the foreground
vllm: setup ## the engine under its supervisor
	@scripts/run-service vllm
gateway: setup ## the gateway
	@scripts/run-service gateway
gpu-exporter: setup ## the GPU exporter
	@scripts/run-service gpu-exporter
monitoring: setup ## Prometheus, Grafana, Jaeger, Loki and Promtail
	@scripts/monitoring up
monitoring-down: ## stop the monitoring services
	@scripts/monitoring down

##@ Day two
fit: setup ## does a model fit the GPUs? (MODEL=…)
	@$(BIN)/engine fit $(MODEL)
doctor: setup ## read everything, change nothing, say what is wrong and how to mend it
	@scripts/doctor
backup: ## a consistent copy of keys, ledger and secrets while serving (TO=file)
	@scripts/backup
restore: ## put a backup back (FROM=file)
	@scripts/restore
upgrade: ## move to the checked-out version, with a way back
	@scripts/upgrade
rotate-secrets: ## new internal secrets
	@scripts/rotate-secrets
bundle: ## images, model and checksums on a medium for a site without a network (TO=folder)
	@scripts/bundle
load: ## install such a bundle (FROM=folder)
	@scripts/load
hosts: ## files for a model over several machines (HEAD=… WORKER=… SUBNET=… INTERFACE=…, docs/engine.md)
	@scripts/hosts
uninstall: ## remove containers, volumes and state (asks first; YES=1 does not)
	@scripts/uninstall

##@ Prove
setup: .venv/.done ## the Python environment in .venv
check: setup ## formatting, lint, types, configuration files
	@scripts/check
test: setup ## every test this machine can run; says what it left out and why
	@scripts/test
test-engine: setup ## only the tests against the real engine
	@scripts/test engine
test-stack: setup ## only the tests of the real `docker compose up`
	@scripts/test stack
test-long: setup ## the long proofs in full
	@scripts/test long
bench: setup ## side by side with other gateways
	@scripts/bench
sbom: setup ## what each image holds, as CycloneDX JSON (TO=folder)
	@scripts/sbom $(if $(TO),--to '$(TO)')
audit: setup ## locked packages against published advisories
	@scripts/audit
loadtest: setup ## load on the running appliance (CONCURRENCY=32 DURATION=120)
	@scripts/loadtest
gpu-proof: setup ## compare the GPU exporter with nvidia-smi on this machine, and record its GPUs (LOAD=command)
	@scripts/gpu-proof $(if $(LOAD),--load '$(LOAD)')
conformance: setup ## check any OpenAI-compatible endpoint (URL=… KEY=…)
	@scripts/conformance

.venv/.done: requirements/dev.txt services/gateway/pyproject.toml services/vllm/pyproject.toml services/gpu-exporter/pyproject.toml scripts/setup
	@scripts/setup

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up down status logs stop vllm gateway gpu-exporter monitoring monitoring-down fit doctor backup restore upgrade \
	rotate-secrets bundle load uninstall setup check test test-engine test-stack test-long bench loadtest gpu-proof conformance hosts sbom audit help
