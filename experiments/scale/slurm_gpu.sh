#!/usr/bin/env bash
# Runs an experiment on the GPUs of a Slurm allocation, one process a GPU. Not tested on real hardware yet.
#
#   sbatch --nodes=8 experiments/scale/slurm_gpu.sh EXPERIMENT RUN_DIR [--key=value ...]
#   sbatch --nodes=8 experiments/scale/slurm_gpu.sh experiments/scale/salt_2.8b.py /shared/runs/salt_2.8b
#
# Submit it from the repository, installed as `pip install -e '.[gpu]'` in the environment that is active. RUN_DIR and
# the corpus are on a disk that all nodes share. The processes find one another: JAX reads Slurm's variables. Change the
# lines below for nodes with another number of GPUs or cores. SIGTERM comes five minutes before the time is up: the run
# saves and leaves, and the same command goes on with it.
#SBATCH --job-name=slm_assist
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --exclusive
set -euo pipefail
if (( $# < 2 )); then
  sed -n '2,10p' "$0" >&2
  exit 2
fi
experiment=$1 run_dir=$2
shift 2

# Of a GPU's memory; JAX takes 0.75 by default. `slm-assist plan` counts on this.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

# srun starts the processes and hands Slurm's SIGTERM to each of them.
srun --kill-on-bad-exit=1 slm-assist train "$experiment" --run_dir="$run_dir" "$@"
