#!/usr/bin/env bash
# Runs an experiment on every host of a Cloud TPU slice. Not tested on real hardware yet.
#
#   experiments/scale/tpu_slice.sh NAME ZONE EXPERIMENT RUN_DIR [--key=value ...]
#   experiments/scale/tpu_slice.sh my-v5p-256 us-east5-a experiments/scale/salt_2.8b.py /shared/runs/salt_2.8b
#
# NAME is a TPU VM that is there already; the code is in ~/slm_assist on each of its hosts, installed as
# `pip install -e '.[tpu]'`. RUN_DIR and the corpus are on a disk that all hosts share. The hosts find one another: JAX
# asks the TPU's metadata who they are. SLM_ASSIST_PILE and SLM_ASSIST_VOCABULARY go along. After a preemption the same
# command goes on with the run.
set -euo pipefail
if (( $# < 4 )); then
  sed -n '2,10p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 experiment=$3 run_dir=$4
shift 4

# Quoted once more, because the command passes through a second shell on the hosts.
command="cd ~/slm_assist &&"
command+=" SLM_ASSIST_PILE=$(printf %q "${SLM_ASSIST_PILE:-pile}")"
command+=" SLM_ASSIST_VOCABULARY=$(printf %q "${SLM_ASSIST_VOCABULARY:-}")"
command+=" slm-assist train$(printf ' %q' "$experiment" "--run_dir=$run_dir" "$@")"

gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
