#!/usr/bin/env bash
# Makes .venv and installs what the project needs, once: bash scripts/setup.sh [test] [parity] [tpu] ...
# The names are the extras of pyproject.toml. PYTHON=... picks another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recent='import sys; sys.exit(sys.version_info < (3, 11))'

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c "$recent" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    local found
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "not there")
    echo "error: Python 3.11 or newer is needed, and ${PYTHON:-python3} is $found;" \
        "name a newer one: PYTHON=python3.12 bash scripts/setup.sh" >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)" >&2
    if ! "$python" -m venv .venv >&2 </dev/null; then
        rm -rf .venv
        echo "error: $python has no working venv module; on Debian and Ubuntu:" \
            "apt install python3-venv" >&2
        exit 1
    fi
elif ! .venv/bin/python -c "$recent"; then
    echo "error: .venv holds $(.venv/bin/python --version), and Python 3.11 or newer is needed;" \
        "remove the folder .venv and run this again" >&2
    exit 1
fi

extra() { # the requirements of one extra, a line each
    .venv/bin/python - "$1" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
if sys.argv[1] not in extras:
    sys.exit(f"error: there is no extra {sys.argv[1]!r}; there are: {', '.join(extras)}")
print(*extras[sys.argv[1]], sep="\n")
PYTHON
}

install() { # pip install, quietly
    .venv/bin/python -m pip install -qq --disable-pip-version-check "$@" </dev/null >&2
}

# torch first: the other packages then take the versions that go with it
names="requirements"
for name in "$@"; do
    if [ "$name" = parity ]; then names="parity $names"; else names="$names $name"; fi
done
for name in $names; do
    if [ "$name" = requirements ]; then list=$(cat requirements.txt); else list=$(extra "$name"); fi
    stamp=".venv/installed-$name.txt" # what was installed last time
    if [ "$(cat "$stamp" 2>/dev/null)" = "$list" ]; then continue; fi
    echo "installing into .venv: $name" >&2
    printf '%s\n' "$list" >".venv/$name.txt"
    install -r ".venv/$name.txt"
    mv ".venv/$name.txt" "$stamp"
done
