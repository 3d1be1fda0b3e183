#!/usr/bin/env bash
# Runs the tests: ./tests/run.sh [--slow] [pytest arguments]. Makes .venv at the first run; --slow adds the long tests.
# Two files of tests run side by side; with --slow one after another, since long tests fill a machine (-n N says another).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

# A file's tests stay together: they share what is dear to start.
selection=("-m" "not slow" "-n" "2" "--dist" "loadfile")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(); else arguments+=("$argument"); fi
done

ensure_venv requirements.txt tests/requirements.txt
exec "$PYTHON" -m pytest ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
