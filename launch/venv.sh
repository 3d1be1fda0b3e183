# shellcheck shell=bash
# Sourced by the scripts of launch/, tests/run.sh and .ci/run: the Python that runs Duet, and its share of the cores.
# DUET_PYTHON names an interpreter that has everything already (a container, a conda environment): nothing is installed.

duet_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "error: $*" >&2
    exit 2
}

# ensure_venv REQUIREMENTS...: make .venv at the root and install the files into it, unless that was done already.
# Sets PYTHON. A stamp holds the hash of what was installed; concurrent callers wait for each other.
ensure_venv() {
    if [ -n "${DUET_PYTHON:-}" ]; then
        PYTHON=$DUET_PYTHON
        return
    fi
    PYTHON=$duet_root/.venv/bin/python
    # The lock is on this script itself: .venv may be cleared below, and the root holds no other file of its own.
    (
        if command -v flock >/dev/null; then flock 9; fi
        _install_venv "$@"
    ) 9<>"${BASH_SOURCE[0]}"
}

_install_venv() {
    local base=${DUET_BASE_PYTHON:-python3} file wanted=() stamps=$duet_root/.venv/.installed
    command -v "$base" >/dev/null || die "$base is missing; on Debian/Ubuntu: apt-get install python3 python3-venv"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Duet needs Python 3.10 or newer, $base is $("$base" -V 2>&1); name another one in DUET_BASE_PYTHON"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        echo "Making $duet_root/.venv"
        "$base" -m venv --clear "$duet_root/.venv" ||
            die "$base -m venv failed; on Debian/Ubuntu: apt-get install python3-venv"
    fi
    mkdir -p "$stamps"
    for file in "$@"; do
        [ "$(cat "$stamps/$(_stamp_name "$file")" 2>/dev/null)" = "$(_stamp "$file")" ] || wanted+=("$file")
    done
    [ ${#wanted[@]} -gt 0 ] || return 0
    echo "Installing ${wanted[*]} into .venv (5.8 GB at first, a minute or more)"
    (cd "$duet_root" && "$PYTHON" -m pip install --quiet --disable-pip-version-check "${wanted[@]/#/--requirement=}") ||
        die "pip could not install ${wanted[*]}: see its message above, then run the same command again"
    for file in "${wanted[@]}"; do
        _stamp "$file" >"$stamps/$(_stamp_name "$file")"
    done
}

_stamp_name() { tr / - <<<"$1"; }

_stamp() { sha256sum <"$duet_root/$1"; }

# find_python: sets PYTHON to DUET_PYTHON, else the .venv of this checkout, else python3; never installs.
find_python() {
    PYTHON=${DUET_PYTHON:-$duet_root/.venv/bin/python}
    if [ ! -x "$PYTHON" ]; then PYTHON=$(command -v "$PYTHON" || command -v python3) || die "no python3 found"; fi
}

# cores: CPU cores that this process may use, by affinity and by the container's CPU quota.
cores() {
    local count quota period
    count=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        quota=$(((quota + period - 1) / period))
        if [ "$quota" -lt "$count" ]; then count=$quota; fi
    fi
    echo "$count"
}

# share_cores PROCESSES: OMP_NUM_THREADS = cores / processes, unless it is set already.
share_cores() {
    local threads=$(($(cores) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}

# is_count VALUE: true for a whole number of at least 1.
is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# list_engines: names of the accelerate configs in launch/accelerate.
list_engines() {
    local file names=()
    for file in "$duet_root"/launch/accelerate/*.yaml; do names+=("$(basename "$file" .yaml)"); done
    echo "${names[*]}"
}

# take_engine NAME: sets config to the accelerate config that a --engine names. With auto, which is the default, the run
# itself chooses when its processes have met: DDP, or the ZeRO stage that the smallest of its GPUs needs.
take_engine() {
    local name=${1:-auto}
    unset DUET_ENGINE
    if [ "$name" = auto ]; then
        export DUET_ENGINE=auto
        name=ddp
    fi
    # shellcheck disable=SC2034  # for whoever sources this
    config=$(engine_file "$name") || exit 2
}

# engine_file NAME: the file of launch/accelerate of that name, or else the path that it is.
engine_file() {
    if [ -f "$duet_root/launch/accelerate/$1.yaml" ]; then
        echo "$duet_root/launch/accelerate/$1.yaml"
    elif [ -f "$1" ]; then
        echo "$1"
    else
        die "--engine $1: there is no such file, and launch/accelerate has: $(list_engines)"
    fi
}

# accelerate_precision NAME: accelerate's word for a --precision.
accelerate_precision() {
    case $1 in
    bf16) echo bf16 ;;
    fp32) echo no ;;
    *) die "--precision $1: expected bf16 or fp32" ;;
    esac
}

# processes_here COUNT: COUNT if it is one, else one where the accelerate config that take_engine found is for CPU cores,
# else the number of GPUs; an error where that is none.
processes_here() {
    local count=$1
    if [ -z "$count" ] && grep -q '^use_cpu: true' "$config"; then
        count=1
    elif [ -z "$count" ]; then
        count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
        [ "$count" != 0 ] || die "this host has no GPU that torch can use: give --engine cpu to train on its" \
            "cores, or run \`python -m launch.doctor\` to see why"
    fi
    is_count "$count" || die "--processes $count: expected a whole number of at least 1"
    echo "$count"
}

# slurm_address: the address that SLURM itself uses for the first node of the job; node names need not resolve.
slurm_address() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2
}
