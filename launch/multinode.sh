#!/usr/bin/env bash
# Trains on several hosts: the same command on each, with --nodes 2 --node_rank 0 (or 1) --address HOST0.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

usage() {
    cat <<TEXT
Train on several hosts, by this command on each: ./launch/multinode.sh [options] --config RUN.yaml [--field value ...]

  --nodes N          hosts; LEAST:MOST trains on those that are there: it resumes without a host that is lost, and
                     takes one in that comes (not host 0)
  --node_rank R      this host's number, 0 to N - 1; host 0 holds the rendezvous
  --address A        host 0's name or address, as the others reach it
  --port P           host 0's port; default 29500
  --processes N      processes on this host, the same on all; default: one per GPU, one with a CPU engine
  --engine NAME      a file of launch/accelerate/ without .yaml ($(list_engines)),
                     or the path of an accelerate config; default: auto, which is
                     bf16, with ddp where the run fits on each GPU, else with the smallest ZeRO stage that fits
  --precision P      bf16 or fp32; default: what the engine's file says
  --module M         what to run instead of train, such as launch.doctor
  everything else    goes to \`python -m train\`

What is not given is taken from the environment, in this order: torchrun's (PET_NNODES or NNODES, PET_NODE_RANK or
NODE_RANK, MASTER_ADDR, MASTER_PORT), SLURM's srun, SkyPilot, a Kubernetes indexed Job (JOB_COMPLETION_INDEX).
The rendezvous port accepts connections without a password: keep it behind the cluster's firewall.
TEXT
}

nodes='' node_rank='' address='' port='' processes='' engine='' precision=() module=train train=()
while [ $# -gt 0 ]; do
    case $1 in
    --nodes | --node_rank | --address | --port | --processes | --engine | --precision | --module)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --nodes) nodes=$2 ;;
        --node_rank) node_rank=$2 ;;
        --address) address=$2 ;;
        --port) port=$2 ;;
        --processes) processes=$2 ;;
        --engine) engine=$2 ;;
        --precision) precision=(--mixed_precision "$(accelerate_precision "$2")") || exit 2 ;;
        --module) module=$2 ;;
        esac
        shift 2
        ;;
    --nodes=* | --node_rank=* | --address=* | --port=* | --processes=* | --engine=* | --precision=* | --module=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        ;;
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

nodes=${nodes:-${PET_NNODES:-${NNODES:-}}}
node_rank=${node_rank:-${PET_NODE_RANK:-${NODE_RANK:-}}}
address=${address:-${PET_MASTER_ADDR:-${MASTER_ADDR:-}}}
port=${port:-${PET_MASTER_PORT:-${MASTER_PORT:-}}}
if [ -n "${SLURM_STEP_ID:-}" ]; then
    nodes=${nodes:-$SLURM_STEP_NUM_NODES}
    node_rank=${node_rank:-$SLURM_NODEID}
    address=${address:-$(slurm_address)}
    port=${port:-$((20000 + SLURM_JOB_ID % 10000))} # jobs that share a host need ports of their own
    processes=${processes:-${SLURM_GPUS_ON_NODE:-}}
elif [ -n "${SKYPILOT_NODE_RANK:-}" ]; then
    nodes=${nodes:-$SKYPILOT_NUM_NODES}
    node_rank=${node_rank:-$SKYPILOT_NODE_RANK}
    address=${address:-$(head -n 1 <<<"$SKYPILOT_NODE_IPS")}
    processes=${processes:-${SKYPILOT_NUM_GPUS_PER_NODE:-}}
elif [ -n "${JOB_COMPLETION_INDEX:-}" ]; then
    node_rank=${node_rank:-$JOB_COMPLETION_INDEX}
fi
port=${port:-29500}

least=${nodes%%:*} most=${nodes#*:}
if ! is_count "$least" || ! is_count "$most" || [ "$least" -gt "$most" ]; then
    die "--nodes '$nodes': expected the number of hosts, or LEAST:MOST of them; the environment does not say it"
fi
if ! [[ $node_rank =~ ^[0-9]+$ ]] || [ "$node_rank" -ge "$most" ]; then
    die "--node_rank '$node_rank': expected this host's number, 0 to $((most - 1)) for --nodes $nodes"
fi
[ -n "$address" ] || die "--address: the name or address of host 0 is needed; the environment has no MASTER_ADDR"
is_count "$port" || die "--port $port: expected the same free port number on every host"
take_engine "$engine"
find_python
export PYTHONPATH=$duet_root${PYTHONPATH:+:$PYTHONPATH}
processes=$(processes_here "$processes") || exit 2
share_cores "$processes"
# gloo would take the address that this host's name resolves to, on Debian often a loopback one.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
    GLOO_SOCKET_IFNAME=$("$PYTHON" -m launch.network "$address") || exit 2
    if [ -n "$GLOO_SOCKET_IFNAME" ]; then export GLOO_SOCKET_IFNAME; else unset GLOO_SOCKET_IFNAME; fi
fi
if [ "$least" != "$most" ]; then
    export DUET_NODES=$nodes DUET_PROCESSES=$((least * processes)):$((most * processes))
fi
echo "host $node_rank of $nodes, $processes process(es) here, rendezvous at $address:$port" >&2
exec "$PYTHON" -m launch.start --config_file "$config" --num_machines "$most" --machine_rank "$node_rank" \
    --main_process_ip "$address" --main_process_port "$port" --num_processes $((most * processes)) \
    ${precision[@]+"${precision[@]}"} -m "$module" ${train[@]+"${train[@]}"}
