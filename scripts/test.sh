#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them: bash scripts/test.sh [--all] [pytest's arguments]
# --all: also the slow tests and those against other implementations (which need torch and TRL), and
# programs are compiled as users compile them, where tests/conftest.py otherwise has it done quickly.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="test"
arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then
        extras="parity test"
        arguments+=(-m "")
        export XLA_FLAGS="${XLA_FLAGS-}"
    else
        arguments+=("$argument")
    fi
done
# shellcheck disable=SC2086
bash scripts/setup.sh $extras
# a process a core, since one process gains little from a second; a file's tests share what they made
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
    ${arguments[@]+"${arguments[@]}"}
