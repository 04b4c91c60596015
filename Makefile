# Eight words: setup, test, check, bench, soak, docs, audit, arm64. VENV may name another environment.
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup test check bench soak docs audit arm64
setup:
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[test]"

test:
	$(BIN)/python -m pytest -n auto --dist loadfile

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_packaging.py tests/test_docs.py

bench:
	$(BIN)/python -m workshop.pico evaluate

soak:
	$(BIN)/python -m workshop.soak --minutes 10
	$(BIN)/python -m workshop.interrupts --times 100

# The core alone, as users have it: what is in it, and whether anything of it is known to be unsafe.
audit:
	python3 -m venv build/audit/core
	build/audit/core/bin/python -m pip install -q .
	python3 -m venv build/audit/tools
	build/audit/tools/bin/python -m pip install -q cyclonedx-bom pip-audit
	build/audit/core/bin/python -m pip freeze --exclude edgevlm > build/audit/core.txt
	build/audit/tools/bin/cyclonedx-py environment build/audit/core/bin/python -o build/audit/sbom.json
	build/audit/tools/bin/pip-audit --no-deps --disable-pip -r build/audit/core.txt

# The extra alone is enough for it, and a checkout that has it asks nothing of the network.
docs: $(BIN)/zensical
	$(BIN)/python docs/generate.py
	$(BIN)/python -m docs.site

$(BIN)/zensical:
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[docs]"

arm64:
	$(BIN)/python -m workshop.arm64
