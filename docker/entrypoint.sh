#!/usr/bin/env bash
# Entry point of the image. Arguments are those of `accelerate launch`; two words of its own come first:
#   doctor [options]   python -m launch.doctor
#   healthy            the health check: the newest metrics.jsonl under runs/, or this container where that is older than
#                      it, is younger than DUET_STALE_MINUTES (60)
#   bash, python, ./launch/...   run as they are
set -euo pipefail
cd /work

case ${1:-doctor} in
doctor)
    exec python3 -m launch.doctor "${@:2}"
    ;;
healthy)
    newest=$(find runs -maxdepth 2 -name metrics.jsonl -printf '%T@\n' 2>/dev/null | sort -n | tail -n 1)
    # No run yet: the container is as healthy as its Python.
    [ -n "$newest" ] || exec python3 -c 'import torch, accelerate'
    # A run that resumes after days has an old one until its first step.
    started=$(python3 -c 'import psutil; print(int(psutil.Process(1).create_time()))')
    newest=${newest%.*}
    age=$(($(date +%s) - (newest > started ? newest : started)))
    [ "$age" -lt $((${DUET_STALE_MINUTES:-60} * 60)) ]
    ;;
bash | sh | python | python3 | ./*)
    exec "$@"
    ;;
*)
    case " $* " in
    *" --config_file "*) config=() ;;
    *) config=(--config_file accelerate_config.yaml) ;;
    esac
    # TERM (docker stop) makes the run save a checkpoint and leave with code 85: give it time, --stop-timeout 300.
    exec python3 -m launch.start ${config[@]+"${config[@]}"} "$@"
    ;;
esac
