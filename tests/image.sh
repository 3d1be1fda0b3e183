#!/usr/bin/env bash
# Builds the container image and tries it: tests/image.sh [options of the build, such as --volume /my/pip.conf:/etc/pip.conf:ro]
# With Docker where its engine answers, else with buildah, which needs none (as root; apt-get install buildah debootstrap).
# 15 GB of disk (twice that on vfs) and some ten minutes, so it is no part of the test suite. The demo data, which
# launch/quickstart.sh fetches, is taken from DUET_DATA (data/demo).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

image=duet base=docker.io/library/debian:bookworm-slim data=$(realpath "${DUET_DATA:-data/demo}")
[ -f "$data/openmoji/train/manifest.json" ] || { echo "error: DUET_DATA=$data has no demo data" >&2 && exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -m 777 "$work/runs"
volumes=(-v "$data:/work/data/demo:ro" -v "$work/runs:/work/runs")
# It is in the environment of the build, as a careless user would have it.
WANDB_API_KEY=secret$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export WANDB_API_KEY

if docker info >/dev/null 2>&1; then
    build() { docker build "$@" -f docker/Dockerfile -t "$image" .; }
    history() { docker history --no-trunc "$image" && docker inspect "$image"; }
    inside() { docker run --rm --ipc host -e WANDB_API_KEY= "${volumes[@]}" --entrypoint "$1" "$image" "${@:2}"; }
    inside_as_root() { docker run --rm --user 0 --entrypoint "$1" "$image" "${@:2}"; }
else
    # vfs works everywhere, but copies every layer.
    if [ -z "${STORAGE_DRIVER:-}" ]; then
        STORAGE_DRIVER=overlay
        STORAGE_DRIVER=overlay buildah info >/dev/null 2>&1 || STORAGE_DRIVER=vfs
    fi
    export STORAGE_DRIVER
    build() {
        buildah inspect --type image "$base" >/dev/null 2>&1 || buildah pull "$base" || make_base
        buildah bud --format docker --isolation chroot --network host --pull-never "$@" -f docker/Dockerfile -t "$image" .
    }
    make_base() { # where no registry answers
        local container
        debootstrap --variant=minbase bookworm "$work/root"
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$work/root" /
        buildah commit --quiet --rm "$container" "$base"
        rm -rf "$work/root"
    }
    history() { buildah inspect --type image "$image"; }
    container=''
    in_container() { # in_container [options] -- COMMAND...
        local options=()
        while [ "$1" != -- ]; do options+=("$1") && shift; done
        if [ -z "$container" ]; then container=$(buildah from --pull-never "$image"); fi
        buildah run --isolation chroot --network host "${options[@]}" "$container" "$@"
    }
    inside() { in_container "${volumes[@]}" -- env -u WANDB_API_KEY "$@"; }
    inside_as_root() { in_container --user 0 -- "$@"; }
    trap 'if [ -n "$container" ]; then buildah rm "$container" >/dev/null; fi; rm -rf "$work"' EXIT
fi

check() { # check WHAT COMMAND...: the end of what it printed, where it fails
    if "${@:2}" >"$work/log" 2>&1; then
        echo "ok    $1"
    else
        echo "FAIL  $1" >&2
        tail -n 40 "$work/log" >&2
        exit 1
    fi
}
is_1000() { [ "$(inside id -u)" = 1000 ]; }
holds_duet_only() {
    inside_as_root ls -A /work | sort >"$work/found"
    diff - "$work/found" <<<"$(printf '%s\n' accelerate_config.yaml data data_pipeline launch requirements.txt runs train)"
}
has_no_secret() { # neither in what describes the layers nor in what they hold
    history >"$work/history"
    ! grep -iE "${WANDB_API_KEY}|(api_?key|token|passw)[a-z_]*[=:]" "$work/history" &&
        ! inside_as_root grep -rlIF "$WANDB_API_KEY" /work /home /root /etc /tmp /usr/local /var/log
}
lasts() { # three steps, evaluation and report of the quickstart
    inside duet --config_file launch/accelerate/cpu.yaml --num_processes 1 --main_process_port 0 \
        -m train --config train/configs/quickstart.yaml --train.steps 3 --train.global_batch 32 --train.micro_batch 16 &&
        [ "$(grep -c '"loss"' "$work/runs/quickstart/metrics.jsonl")" = 3 ] &&
        [ -s "$work/runs/quickstart/report/index.html" ]
}
compose() { # of either client, where there is one (as root: apt-get install docker-compose)
    if docker compose version >/dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi
}

if docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; then
    check "compose.yaml" compose -f docker/compose.yaml --profile two config
else
    echo "skip  compose.yaml: neither docker compose nor docker-compose is installed"
fi
build "$@"
check "runs as user 1000" is_1000
check "three training steps of the quickstart" lasts
check "doctor" inside duet doctor --config train/configs/quickstart.yaml
check "health check" inside duet healthy
check "holds Duet and nothing else" holds_duet_only
check "no secret in any layer" has_no_secret
