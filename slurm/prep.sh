#!/usr/bin/env bash
# One data_prep command as an array job; its tasks share the work, the last to finish writes the manifest:
#   sbatch --array=0-15 slurm/prep.sh write_shards --source tartanair --root raw/tartanair --out shards/tartanair
#   sbatch --array=0-7 --gpus-per-node=1 slurm/prep.sh encode_latents --config configs/dlc.yaml --config ...
#   sbatch slurm/prep.sh stats shards/tartanair/train shards/bedlam/train
# A task that was killed or ran out of time goes on where it was when the same line is submitted again.
#SBATCH --job-name=one4d-prep
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-prep-%A_%a.out
# By environment: VENV, and the site settings of slurm/env.sh (`source slurm/env.sh` first for partition and account);
# PREP_LIMIT: longest run of a task (default: 23h).
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch [--array=0-N] slurm/prep.sh write_shards|check_shards|encode_latents|stats [arguments]" >&2
    exit 2
fi
command=$1
shift

# sbatch runs a copy of this file: the checkout is where the job was submitted
cd "${SLURM_SUBMIT_DIR:-.}"
[ ! -f slurm/env.sh ] || source slurm/env.sh
python=${VENV:-.venv}/bin/python
[ -n "${CONTAINER:-}" ] || [ -x "$python" ] || { echo "prep: no Python at $python; run make setup, or set VENV" >&2; exit 2; }

rank=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))
world=${SLURM_ARRAY_TASK_COUNT:-1}
case $command in
    write_shards | check_shards) share=(--rank "$rank" --world "$world" --jobs "${SLURM_CPUS_PER_TASK:-1}") ;;
    encode_latents) share=(--rank "$rank" --world "$world") ;;
    stats)
        share=()
        [ "$rank" -eq 0 ] || { echo "prep: stats is one task's work; this one has none"; exit 0; }
        ;;
    *) echo "prep: no data_prep command $command" >&2; exit 2 ;;
esac

# every process of the writer works on one core; the encoders have the GPU, or all cores of the task
[ "$command" = encode_latents ] && threads=${SLURM_CPUS_PER_TASK:-1} || threads=1
export OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=PASSIVE

# a filesystem that hangs must not hold the node for ever; what was begun is resumed
limit=${PREP_LIMIT:-23h}
status=0
timeout --kill-after=60 "$limit" ${CONTAINER:-} "$python" -m "data_prep.$command" "${share[@]}" "$@" || status=$?
[ "$status" -ne 124 ] || echo "prep: stopped after $limit; submit the same line again to go on" >&2
exit "$status"
