#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster by XPK (https://github.com/AI-Hypercomputer/xpk): one process a host, which GKE tells
# where the others are. Arguments are those of ple_jax; --workdir must be a folder that all hosts mount.
#
#   CLUSTER=mine IMAGE=REGION-docker.pkg.dev/PROJECT/ple/tpu:0.1 STORAGE=runs scripts/launch/xpk.sh ple-hh v5litepod-64 \
#       --config hh --workdir /runs/hh --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct --config.mesh.data=8 --config.mesh.tensor=8
#
# CLUSTER, IMAGE    of XPK (`xpk cluster create`), of scripts/images/tpu.Dockerfile
# STORAGE           a storage of the cluster (`xpk storage create`) that is mounted where --workdir is
# SLICES            how many of them (1)
# XPK               more arguments of `xpk workload create`: --zone=..., --spot, --dry-run
#
# XPK starts the same command again, which goes on, after a stop at a safe point (exit code 143: maintenance, preemption) and
# where a host or a process is gone (75, or a signal), ten times at most; not after a mistake (2).
set -euo pipefail

stop() {
    echo "error: $*" >&2
    exit 2
}

(($# >= 2)) || stop "two arguments come first: a name for the workload, and the kind of slice, such as v5litepod-64"
name=$1 kind=$2
shift 2
[[ -n ${CLUSTER:-} ]] || stop "CLUSTER is not set: a cluster that xpk cluster create made"
[[ -n ${IMAGE:-} ]] || stop "IMAGE is not set: an image of scripts/images/tpu.Dockerfile that the cluster may pull"
# words of the command again, as XPK puts them into a shell
command=$(printf '%q ' ple_jax "$@")
read -ra more <<<"${XPK:-}"
exec xpk workload create --cluster="$CLUSTER" --workload="$name" --tpu-type="$kind" --num-slices="${SLICES:-1}" \
    --docker-image="$IMAGE" ${STORAGE:+--storage="$STORAGE"} --termination-grace-period-seconds=300 \
    --max-restarts=10 --restart-on-exit-codes=75 --command="$command" "${more[@]}"
