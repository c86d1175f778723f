#!/usr/bin/env bash
# From nothing to an aligned model on this machine's CPU: bash scripts/quickstart.sh
# Makes .venv, installs requirements.txt, and runs the built-in task.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python

# jobs
