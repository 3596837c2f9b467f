#!/usr/bin/env bash
# Starts a run on the Ascend NPUs of this machine, one process each; arguments are those of `python -m ple_jax.main`.
#
#   scripts/launch/ascend.sh --workdir runs/paper                       configs/ascend_hh_llama3_8b.py on 8 NPUs
#   scripts/launch/ascend.sh --config configs/hh.py --workdir runs/hh --config.mesh.data=8
#   NPROC_PER_NODE=1 scripts/launch/ascend.sh --workdir runs/one --config.mesh.data=1
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/launch/ascend.sh --workdir /shared/runs/two --config.mesh.data=16
#                                                                the same on the second machine with NODE_RANK=1
#
# NPROC_PER_NODE  processes of a machine (8)
# NNODES          machines (1); then also NODE_RANK, from 0, and MASTER_ADDR, the first one's; MASTER_PORT (29500)
# CANN_SET_ENV    CANN's set_env.sh, where it is not found
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

stop() {
    echo "error: $*" >&2
    exit 2
}

# CANN's libraries, unless this shell has them
if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
    for file in "${CANN_SET_ENV:-}" {/usr/local,"$HOME"}/Ascend/{cann,ascend-toolkit}/set_env.sh; do
        [[ -f $file ]] && break
    done
    [[ -f $file ]] || stop "CANN's set_env.sh is not found; source it first, or set CANN_SET_ENV=/path/to/set_env.sh"
    set +u # it reads variables that may not be set
    # shellcheck source=/dev/null
    source "$file"
    set -u
fi

if command -v npu-smi >/dev/null; then
    npu-smi info >/dev/null || stop "npu-smi info fails: no device, or a driver that does not answer"
else
    echo "npu-smi is not here: a container without it, or no driver; going on" >&2
fi

torchrun=$(command -v torchrun || echo "$root/.venv/bin/torchrun")
[[ -x $torchrun ]] || stop "torchrun is not found; pip install -e '.[ascend]', or activate the environment that has it"

config=(--config "$root/configs/ascend_hh_llama3_8b.py")
# what is missing for an NPU is an error, where `auto` would take the CPU
own=(--backend=torch --config.model.device=npu)
for argument in "$@"; do
    # these take no settings
    [[ $argument =~ ^--?against(=|$) || $argument =~ ^(--?mode=)?init$ ]] && own=(--backend=torch)
    [[ $argument =~ ^--?config(=|$) ]] && config=()
    # these take the config from the run
    [[ $argument =~ ^(--?mode=)?(evaluate|generate|harness|replay|export|chat)$ ]] && config=()
done

nodes=${NNODES:-1}
if ((nodes == 1)); then
    where=(--standalone)
else
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] || stop "NNODES=$nodes needs NODE_RANK (0 to $((nodes - 1))) and MASTER_ADDR"
    where=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "$torchrun" "${where[@]}" --nproc-per-node "${NPROC_PER_NODE:-8}" -m ple_jax.main "${config[@]}" "${own[@]}" "$@"
