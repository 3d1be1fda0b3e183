#!/usr/bin/env bash
# Trains on every GPU of this host: ./launch/local.sh --config train/configs/seed.yaml [fields of the run]
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

usage() {
    cat <<TEXT
Train on this host: ./launch/local.sh [options] --config RUN.yaml [--field value ...]

  --engine NAME      a file of launch/accelerate/ without .yaml ($(list_engines)),
                     or the path of an accelerate config; default: auto, which is
                     bf16, with ddp where the run fits on each GPU, else with the smallest ZeRO stage that fits
  --processes N      processes; default: one per GPU of this host, one with a CPU engine
  --precision P      bf16 or fp32; default: what the engine's file says
  --port N           port of the rendezvous; default: a free one
  everything else    goes to \`python -m train\`, which lists its fields with --help
TEXT
}

engine='' processes='' port=0 precision=() train=()
while [ $# -gt 0 ]; do
    case $1 in
    --engine | --processes | --precision | --port)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --engine) engine=$2 ;;
        --processes) processes=$2 ;;
        --precision) precision=(--mixed_precision "$(accelerate_precision "$2")") || exit 2 ;;
        --port) port=$2 ;;
        esac
        shift 2
        ;;
    --engine=* | --processes=* | --precision=* | --port=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    -h | --help)
        usage
        exit
        ;;
    *)
        train+=("$1")
        shift
        ;;
    esac
done
if [ "$port" != 0 ] && ! is_count "$port"; then die "--port $port: expected the number of a free port"; fi
take_engine "$engine"
find_python
processes=$(processes_here "$processes") || exit 2
share_cores "$processes"
export PYTHONPATH=$duet_root${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m launch.start --config_file "$config" --num_processes "$processes" --main_process_port "$port" \
    ${precision[@]+"${precision[@]}"} -m train ${train[@]+"${train[@]}"}
