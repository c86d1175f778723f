#!/usr/bin/env bash
# Runs a command once, apart from the connection that asks for it, and shows what it prints until
# it ends: bash scripts/attach.sh NAME COMMAND [ARGUMENT...]
# Each line begins with the worker's name: a slice's hash and the worker's number in it.
# Asked again under the same name, as after a lost connection, it shows the command that runs
# already. The exit code is the command's; 143 where it has ended without one (a reboot).
set -euo pipefail

job="$HOME/dpo_jax_jobs/$1"
shift
mkdir -p "$HOME/dpo_jax_jobs"

if mkdir "$job" 2>/dev/null; then
    # ssh itself exits with 255, and so must no command
    run='code=0; "${@:2}" || code=$?; [ "$code" != 255 ] || code=254
        echo "$code" >"$1/code.new"; mv "$1/code.new" "$1/code"'
    : >"$job/log" # which tail may look for before the command has begun
    setsid nohup bash -c "$run" run "$job" "$@" </dev/null >>"$job/log" 2>&1 &
    echo "$!" >"$job/pid.new"
    mv "$job/pid.new" "$job/pid"
fi

for _ in $(seq 50); do
    if [ -s "$job/pid" ]; then break; fi
    sleep 0.2
done
if [ ! -s "$job/pid" ]; then exit 143; fi
tail -s 0.2 --pid="$(cat "$job/pid")" -n +1 -f "$job/log" | sed -u "s/^/[${HOSTNAME#t1v-n-}] /"
if [ ! -s "$job/code" ]; then exit 143; fi
exit "$(cat "$job/code")"
