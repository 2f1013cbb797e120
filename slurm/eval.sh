#!/usr/bin/env bash
# Evaluate a checkpoint on one GPU; benchmarks are the tasks of an array:
#   sbatch slurm/eval.sh --bench sintel --root /data/sintel --ckpt runs/nodes_8x8/checkpoints/step-00002750
#   BENCHES="sintel bonn tum" ROOTS="/data/sintel /data/bonn /data/tum" sbatch --array=0-2 slurm/eval.sh --ckpt ...
# Where there are no GPUs: sbatch --gpus-per-node=0 slurm/eval.sh ... train.accelerator=auto
# By environment: VENV, and the site settings of slurm/env.sh (`source slurm/env.sh` first for partition and account).
# Predictions are stored as they are made: a task that was requeued, or submitted again, goes on where it was.
#SBATCH --job-name=one4d-eval
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-eval-%A_%a.out
# EVAL_LIMIT: longest run of a task (default: 11h30m).
set -euo pipefail

# sbatch runs a copy of this file: the checkout is where the job was submitted
cd "${SLURM_SUBMIT_DIR:-.}"
[ ! -f slurm/env.sh ] || source slurm/env.sh
python=${VENV:-.venv}/bin/python
[ -n "${CONTAINER:-}" ] || [ -x "$python" ] || { echo "eval: no Python at $python; run make setup, or set VENV" >&2; exit 2; }

chosen=()
if [ -n "${BENCHES:-}" ]; then
    read -ra benches <<<"$BENCHES"
    read -ra roots <<<"${ROOTS:-}"
    task=${SLURM_ARRAY_TASK_ID:-0}
    if [ "$task" -ge "${#benches[@]}" ] || [ "${#roots[@]}" -ne "${#benches[@]}" ]; then
        echo "eval: task $task of BENCHES=\"$BENCHES\" with ROOTS=\"${ROOTS:-}\"; need a root for each and --array=0-$((${#benches[@]} - 1))" >&2
        exit 2
    fi
    chosen=(--bench "${benches[$task]}" --root "${roots[$task]}")
elif [ $# -lt 1 ]; then
    echo "usage: sbatch slurm/eval.sh --bench NAME --root FOLDER --ckpt ADAPTER [arguments of one4d evaluate]" >&2
    exit 2
fi

# a filesystem that hangs must not hold the node for ever; what was begun is resumed
limit=${EVAL_LIMIT:-690m}
status=0
timeout --kill-after=60 "$limit" ${CONTAINER:-} "$python" -m one4d_pl evaluate "${chosen[@]}" "$@" || status=$?
[ "$status" -ne 124 ] || echo "eval: stopped after $limit; submit the same line again to go on" >&2
exit "$status"
