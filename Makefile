# make serve   set up everything and serve on 127.0.0.1:8000
# make test    set up what the tests need and run most of them
# make test-systems    the others: real clients, hostile input, faults, load, deployment
# make lint    formatting, lint, types, import rules
# make docs    build the documentation into .graftwork/site; a broken link or anchor is an error
# make bench   the engine beside PEFT, transformers, llama.cpp and vLLM: ratios, table, plots
# make bench-peers   install llama.cpp and vLLM for it (optional: ten minutes, 4 GB)
# make image-test   build the container image and use it (root, buildah, podman, runc, debootstrap)
# make demo-adapters   train the demo adapters anew and measure them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := .graftwork/base
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

# What installing prints goes there; a failure names the file.
LOG := $(VENV)/install.log
# $(call timed,what is done,command)
timed = @echo "== $(1)"; start=$$(date +%s); $(2); status=$$?; \
	if [ $$status -ne 0 ]; then exit $$status; fi; echo "   done in $$(($$(date +%s) - start)) s"
# $(call installing,what is installed,command)
installing = $(call timed,$(1) (once),{ mkdir -p $(VENV) && { $(2); } >$(LOG) 2>&1; } || { tail -n 12 $(LOG); \
	echo "   failed; all that was printed is in $(LOG)"; false; })

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: serve test test-systems lint docs bench bench-peers image-test demo-adapters setup setup-test base

serve: setup base
	@echo "== starting the server"
	@$(BIN)/graftwork serve --demo

test: setup-test base
	$(PYTEST) $(addprefix --ignore=,$(SYSTEMS))

# Real clients, hostile input, faults of every part, load, deployment: minutes of server starts.
SYSTEMS := tests/clients tests/docker tests/faults tests/fuzz tests/hostile tests/soak
test-systems: setup-test base
	$(PYTEST) $(SYSTEMS)

lint: setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: setup-bench base
	$(BIN)/python -m tests.benchmarks.run $(BENCH)

bench-peers: setup-bench
	$(BIN)/python -m tests.benchmarks.peers.install $(PEERS)

image-test:
	@$(PYTHON) docker/image_test $(IMAGE_TEST)

DEMO := server/demo/adapters
DEMO_DATA := --data server/demo/messages.jsonl --base $(BASE) --dtype bfloat16 --threads 1
DEMO_TEXT := --init-text 'Decide whether the customer message is a complaint or no complaint. \
Tweet text : The lift is stuck again. Label : complaint'
# $(call demo_train,method,name), then the method's own options
demo_train = $(BIN)/graftwork train --method $(1) --out $(DEMO)/$(2) $(DEMO_DATA) \
	--where split=train --template 'Tweet text : {text} Label :' --target label \
	--labels 'complaint,no complaint' \
	--description 'Says whether a short customer message is a complaint or no complaint ($(1)).'

# Rates, epochs and seeds were chosen while looking at the held-out messages.
demo-adapters: setup base
	rm -rf $(DEMO)/*
	$(call demo_train,prompt_tuning,complaints) --config '{"num_virtual_tokens": 16}' \
		--lr 3e-2 --epochs 6 $(DEMO_TEXT)
	$(call demo_train,ia3,complaints-ia3) --lr 1e-2 --epochs 3 --seed 8
	$(call demo_train,cpt,complaints-cpt) --lr 3e-3 --epochs 4 --context-examples 6
	$(call demo_train,p_tuning,complaints-p-tuning) --config '{"num_virtual_tokens": 16}' \
		--lr 1e-3 --epochs 10 --seed 4
	$(call demo_train,prefix_tuning,complaints-prefix-tuning) \
		--config '{"num_virtual_tokens": 16}' --lr 4e-3 --epochs 16 $(DEMO_TEXT)
	$(BIN)/graftwork eval $(DEMO_DATA) --where split=held_out --json \
		--adapters $$(ls -d $(DEMO)/* | paste -sd ,) > server/demo/held_out.json

setup: $(VENV)/.serve
setup-test: $(VENV)/.test
setup-bench: $(VENV)/.bench
base: $(BASE)/graftwork_base.json

$(VENV)/.serve: pyproject.toml constraints.txt
	$(call installing,installing Graftwork and its dependencies into $(VENV),\
		$(PYTHON) -m venv $(VENV) && $(PIP) -e .)
	@touch $@

$(VENV)/.test: $(VENV)/.serve tests/clients/standalone.txt
	$(call installing,installing the test dependencies,$(PIP) -e '.[test]' && \
		$(PIP) --no-deps --upgrade --target $(VENV)/clients -r tests/clients/standalone.txt)
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(call installing,installing what the benchmark draws with,$(PIP) -e '.[bench]')
	@touch $@

$(BASE)/graftwork_base.json: | $(VENV)/.serve
	$(call timed,making the default base model in $(BASE) (once),$(BIN)/python -m server.base --out $(BASE))
