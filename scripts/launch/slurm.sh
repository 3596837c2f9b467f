#!/usr/bin/env bash
# A run over the GPUs of several nodes of a SLURM cluster: one process a GPU, which JAX finds by SLURM's variables. Arguments
# are those of ple_jax; --workdir must be a folder that all nodes mount.
#
#   sbatch scripts/launch/slurm.sh --config hh --workdir /shared/runs/hh --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct \
#       --config.mesh.data=2 --config.mesh.tensor=8
#   sbatch --nodes=1 --gpus-per-node=4 --ntasks-per-node=4 scripts/launch/slurm.sh --config hh --workdir ...
#   sbatch --partition=long --account=mine --time=2-0 scripts/launch/slurm.sh ...
#
# PLE_JAX    how each process is started (ple_jax): a path, "python -m ple_jax.main", or "apptainer exec --nv image.sif ple_jax"
#
# Five minutes before the time is up all processes are told to stop; the run stops at a safe point, and the job goes back into
# the queue, where the same command goes on. So it does when a node fails or a process is killed, ten times at most.
#
#SBATCH --job-name=ple_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

read -ra command <<<"${PLE_JAX:-ple_jax}"
code=0
# every task sees all GPUs of its node and takes the one of its number: SLURM binding one to each would hide the others, which
# JAX's own numbering counts. Since SLURM 22.05 srun does not take --cpus-per-task from sbatch
srun --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "${command[@]}" "$@" || code=$?

# 143: it was told to stop, and did so. 75, or a signal: a process is gone. After a mistake (2) or a bug (1) it would end again
if ((code == 143)) || { ((code == 75 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < 10)); }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
