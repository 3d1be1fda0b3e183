#!/usr/bin/env bash
# Runs the tests: ./tests/run.sh [--slow] [pytest arguments]. Makes .venv at the first run; --slow adds the long tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

selection=("-m" "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(); else arguments+=("$argument"); fi
done

ensure_venv requirements.txt tests/requirements.txt
exec "$PYTHON" -m pytest ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
