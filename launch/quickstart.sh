#!/usr/bin/env bash
# From a fresh clone to a trained model and a page of pictures, on CPU cores: ./launch/quickstart.sh
# Whatever is there already is kept: run it again after an interruption and it resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

usage() {
    cat <<TEXT
Install, fetch the demo data, train and evaluate: ./launch/quickstart.sh [options] [--field value ...]

  --processes N      training processes, each on half of the cores (or its share of them); default 2
  --precision P      bf16 or fp32; default: fp32 on CPU cores, bf16 on GPUs
  --gpu              train on the GPUs of this host instead of its CPU cores; --processes is then one per GPU
  everything else    goes to \`python -m train\`, which lists its fields with --help
TEXT
}

processes='' precision='' engine=cpu fields=() runs=runs name=quickstart
while [ $# -gt 0 ]; do
    case $1 in
    --processes | --precision | --name | --runs_dir)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --processes) processes=$2 ;;
        --precision) precision=$2 ;;
        --name) name=$2 ;;
        --runs_dir) runs=$2 ;;
        esac
        shift 2
        ;;
    --processes=* | --precision=* | --name=* | --runs_dir=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --gpu)
        engine=ddp
        shift
        ;;
    -h | --help)
        usage
        exit
        ;;
    *)
        fields+=("$1")
        shift
        ;;
    esac
done
if [ "$engine" = cpu ] && [ -z "$processes" ]; then processes=$(($(cores) > 1 ? 2 : 1)); fi
if [ -n "$processes" ] && ! is_count "$processes"; then
    die "--processes $processes: expected a whole number of at least 1"
fi
if [ "$engine" = cpu ]; then
    # As many threads for one process as for two: over how many a sum is split shows in its last digit, which training
    # amplifies. So the curve is the same to the last bit.
    share_cores "$((processes > 2 ? processes : 2))"
fi
if [ -z "$precision" ]; then
    precision=bf16
    # Every CPU has fp32, and so the same figures; with bf16 it is done in two thirds of the time where the CPU has that.
    if [ "$engine" = cpu ]; then precision=fp32; fi
fi
accelerate_precision "$precision" >/dev/null || exit 2

there() { if [ -e "$1" ]; then echo " (there already)"; fi; }

echo "[1/3] Python environment in .venv$(there .venv/.installed/requirements.txt)"
ensure_venv requirements.txt

echo "[2/3] Demo data in data/demo$(there data/demo/openmoji/train/manifest.json)"
"$PYTHON" -m data_pipeline demo data/demo

run=$runs/$name
echo "[3/3] Train in $run, ${processes:-one per GPU} process(es), $precision$(there "$run/config.yaml")"
export DUET_PYTHON=$PYTHON
fields=(--config train/configs/quickstart.yaml ${fields[@]+"${fields[@]}"})

train() {
    ./launch/local.sh --engine "$engine" --precision "$precision" ${processes:+--processes "$processes"} \
        "${fields[@]}" "$@"
}

# How long it will take, from a few steps of the same run; where these fail, the run itself says why.
estimate() {
    local trial
    trial=$(mktemp -d)
    trap 'rm -rf "$trial"; exit 130' INT TERM
    if train --name trial --runs_dir "$trial" --train.steps 8 --data.val '' --eval.tasks '[]' \
        --tracking.wandb disabled >"$trial/log" 2>&1; then
        "$PYTHON" -m launch.estimate "$trial/trial" "${fields[@]}"
    fi
    rm -rf "$trial"
    trap - INT TERM
}

if [ ! -e "$run/config.yaml" ]; then estimate; fi
train --name "$name" --runs_dir "$runs"

report=$run/report/index.html
[ -f "$report" ] || die "the run in $run ended without $report"
echo "Done. Pictures, curves and results: $(realpath "$report")"
