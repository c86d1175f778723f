#!/usr/bin/env bash
# Makes .venv on a TPU VM: bash scripts/setup_tpu_vm.sh [extra] ... (extras of pyproject.toml)
# Where Python is older than 3.11, as Ubuntu 22.04's is, it first installs python3.11.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recent='import sys; sys.exit(sys.version_info < (3, 11))'
if ! python3 -c "$recent" && ! command -v python3.11 python3.12 python3.13 >/dev/null; then
    # the VM's own updates may hold the lock in its first minutes
    wait_for_lock=(-o DPkg::Lock::Timeout=600)
    sudo apt-get "${wait_for_lock[@]}" update -qq
    sudo apt-get "${wait_for_lock[@]}" install -qq -y python3.11 python3.11-venv
fi
bash scripts/setup.sh tpu gcs "$@"
