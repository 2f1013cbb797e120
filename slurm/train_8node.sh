#!/usr/bin/env bash
# Train on 8 nodes x 8 GPUs, through preemptions, time limits and dying nodes:
#   slurm/train_8node.sh                            submits itself, with the settings of slurm/env.sh
#   sbatch slurm/train_8node.sh                     the same where the site's own defaults do
#   NODES=2 GPUS_PER_NODE=4 RUN_DIR=runs/x OVERRIDES="train.max_steps=100 flow.shift=4" slurm/train_8node.sh --time=02:00:00
#   GPUS_PER_NODE=2 CONFIGS=configs/dlc.yaml slurm/train_8node.sh --gpus-per-node=0     nodes without GPUs
# By environment: NODES (8), GPUS_PER_NODE (8; on CPUs: processes per node), CONFIGS and OVERRIDES (of one4d_pl.fit, by
# spaces, quotes allowed), RUN_DIR, VENV; MASTER_ADDR and MASTER_PORT where the automatic ones do not serve;
# PREFLIGHT_TIMEOUT (120 seconds). The run folder gets code/ (what runs, also after a requeue, with its resolved
# config.yaml), logs/<start>/ (a file per rank) and what fit writes. Submitting again continues the run.
#SBATCH --job-name=one4d
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-one4d-%j.out
# Exit codes: 0 trained to the end; 2 a mistake that a restart cannot mend, said in one line; 1 too many restarts;
# 143 cancelled. Preemption, the time limit, dying ranks and nodes put the job back in the queue instead.
set -uo pipefail

readonly PREFLIGHT_DEATHS=5  # in a row, then something is broken that a requeue does not mend (fit: train.max_restarts)
readonly SIGNAL_EVERY=15     # seconds; ranks that are just starting ignore USR1

say() { echo "train_8node: $*"; }
die() { echo "train_8node: $1" >&2; exit "${2:-2}"; }

if [ -z "${SLURM_JOB_ID:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    # shellcheck source=env.sh
    source slurm/env.sh
    # per node, never per task: each rank sees its node's GPUs and takes that of its number; a site's own wins
    gpus=(--gpus-per-node="${GPUS_PER_NODE:-8}")
    [ -z "${SBATCH_GPUS_PER_NODE:-}" ] || gpus=()
    exec sbatch --nodes="${NODES:-8}" "${gpus[@]}" "$@" slurm/train_8node.sh
fi

NODES=${NODES:-$SLURM_JOB_NUM_NODES}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CONFIGS=${CONFIGS:-configs/dlc.yaml configs/scale/wan_14b.yaml configs/data/one4d_mix.yaml configs/scale/nodes_8x8.yaml}
RUN_DIR=${RUN_DIR:-runs/nodes_8x8}
[ "$NODES" = "$SLURM_JOB_NUM_NODES" ] ||
    die "NODES: $NODES, but the job holds $SLURM_JOB_NUM_NODES nodes; run NODES=$NODES slurm/train_8node.sh (it submits itself) or sbatch --nodes=$NODES"
held=${SLURM_GPUS_PER_NODE:-0} held=${held##*:}  # h100:8, or 8
[ "$held" -eq 0 ] || [ "$held" -ge "$GPUS_PER_NODE" ] ||
    die "GPUS_PER_NODE: $GPUS_PER_NODE, but the job holds $held GPUs per node; add --gpus-per-node=$GPUS_PER_NODE to sbatch"
cd "$SLURM_SUBMIT_DIR" || die "$SLURM_SUBMIT_DIR: the folder of the submission is not on $(hostname); submit from a shared one"
[ -f slurm/env.sh ] || die "$SLURM_SUBMIT_DIR: no slurm/env.sh here; submit from the checkout"
mkdir -p "$RUN_DIR/logs" && RUN_DIR=$(realpath "$RUN_DIR") || die "RUN_DIR: cannot write to $RUN_DIR"

# --- one job per run folder
owner=$(cat "$RUN_DIR/job" 2>/dev/null)
if [ -n "$owner" ] && [ "$owner" != "$SLURM_JOB_ID" ] &&
    [ "$(squeue -h -j "$owner" -u "$(id -un)" -t RUNNING -o %A 2>/dev/null)" = "$owner" ]; then
    die "RUN_DIR: job $owner is training in $RUN_DIR; cancel it or set another RUN_DIR"
fi
echo "$SLURM_JOB_ID" >"$RUN_DIR/job" || die "RUN_DIR: cannot write to $RUN_DIR ($(df -Ph "$RUN_DIR" | awk 'END {print $4}') free)"

# --- the code and the resolved config beside the run: a requeue runs what was started, whatever the checkout is now
code=$RUN_DIR/code
run_python() { $CONTAINER "$python" "$@"; }

copy_code() {
    local part=$RUN_DIR/.code.$SLURM_JOB_ID overrides=() arguments=() config
    rm -rf "$part" && mkdir "$part" && cp -r one4d_pl data_prep configs slurm "$part/" ||
        die "RUN_DIR: cannot copy the code to $part ($(df -Ph "$RUN_DIR" | awk 'END {print $4}') free)"
    { git rev-parse HEAD && git status --short; } >"$part/REVISION" 2>/dev/null || true
    for config in $CONFIGS; do arguments+=(--config "$config"); done
    mapfile -t overrides < <(xargs -n 1 printf '%s\n' <<<"${OVERRIDES:-}")
    [ -n "${overrides[0]:-}" ] || overrides=()
    PYTHONPATH=$part run_python -m one4d_pl.fit "${arguments[@]}" --print-config "run_dir=$RUN_DIR" \
        "train.num_nodes=$NODES" "train.devices=$GPUS_PER_NODE" "${overrides[@]}" >"$part/config.yaml" || exit 2  # fit has said why
    rm -rf "$code" && mv "$part" "$code"
}

first_start=1
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || [ ! -d "$code" ] || first_start=0
if [ "$first_start" -eq 1 ]; then source slurm/env.sh; else source "$code/slurm/env.sh"; fi
python=$VENV/bin/python
[ "${VENV:0:1}" = / ] || python=$PWD/$python
[ -n "$CONTAINER" ] || [ -x "$python" ] || die "VENV: no Python at $python; run make setup, or set VENV"
export PYTHONSAFEPATH=1  # without it `python -m` prefers the checkout
if [ "$first_start" -eq 1 ]; then
    rm -f "$RUN_DIR/preflight_deaths"
    copy_code || die "RUN_DIR: cannot put the code at $code"
fi
export PYTHONPATH=$code

# --- where the ranks meet
in_use() { (: <"/dev/tcp/$MASTER_ADDR/$1") 2>/dev/null; }
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$first  # or, where names are not resolved, the address by which SLURM itself reaches the node
    getent hosts "$first" >/dev/null || MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
if [ -n "${MASTER_PORT:-}" ]; then
    ! in_use "$MASTER_PORT" || die "MASTER_PORT: $MASTER_PORT is in use on $first; unset it and a free one is taken"
else
    for try in {0..49}; do
        MASTER_PORT=$((20000 + (SLURM_JOB_ID + 97 * try) % 10000))  # below the ports of outgoing connections
        in_use "$MASTER_PORT" || break
    done
fi
export MASTER_ADDR MASTER_PORT

logs=$RUN_DIR/logs/$(date +%Y%m%dT%H%M%S)-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir "$logs" || die "RUN_DIR: cannot write to $RUN_DIR/logs"
value() { sed -n "s/^  $1: //p" "$code/config.yaml"; }
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $NODES nodes ($SLURM_JOB_NODELIST), meeting at $MASTER_ADDR:$MASTER_PORT, logs in $logs"
say "$((NODES * GPUS_PER_NODE)) processes, global batch $(value global_batch_size), $(value max_steps) steps, $(value strategy);" \
    "the paper's: 8, 32, 5500. Anything else is a deviation"

# --- signals: to the batch script alone (B:), which tells the ranks until they have heard
ends=$(squeue -h -j "$SLURM_JOB_ID" -o %e)
limit=$(($(date -d "$ends" +%s 2>/dev/null || date -d "30 days" +%s) - $(date +%s)))  # seconds from now
ask_at=$((limit - (limit / 4 < 540 ? limit / 4 : 540)))  # should SLURM's own warning not come
warned=0 cancelled=0
warn() {
    if [ "$limit" -lt 1200 ] && [ "$SECONDS" -lt "$ask_at" ] && [ "$1" = USR1 ] && [ "$SECONDS" -lt 60 ]; then
        say "the time limit is shorter than SLURM's warning before it; this one is ignored"
        return
    fi
    [ "$warned" -eq 1 ] || say "$1: asking the ranks to save"
    warned=1
    scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null
}
trap 'warn USR1' USR1
trap 'cancelled=1' TERM  # scancel, the time limit's end, preemption: SLURM has told the ranks, and requeues itself if it means to

# launch <name> <time limit> <module> [arguments]: one process per GPU on every node; status in $status
launch() {
    local name=$1 limit=$2 cpus=$((SLURM_CPUS_ON_NODE / GPUS_PER_NODE)) pid told=$SECONDS
    shift 2
    rm -f "$RUN_DIR/PREEMPTED" "$logs/refused"
    # Each rank ignores USR1 until fit listens (an import lasts longer than a signal), and notes an exit with code 2:
    # srun's own exit code is 143 as soon as one rank was faster than the others.
    # shellcheck disable=SC2016,SC2086
    SLURM_NTASKS_PER_NODE=$GPUS_PER_NODE timeout --kill-after=30 "$limit" \
        srun --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        ${SLURM_GPUS_PER_NODE:+--gpus-per-node="$SLURM_GPUS_PER_NODE"} \
        --kill-on-bad-exit=1 --wait=60 --output="$logs/$name-%4t.log" $SRUN_ARGS \
        bash -c 'refused=$1; shift; trap "" USR1; trap : TERM; "$@"; code=$?
                 [ $code -ne 2 ] || echo "$SLURM_PROCID" >>"$refused"; exit $code' \
        rank "$logs/refused" $CONTAINER "$python" -m "$@" &
    pid=$!
    tail --pid="$pid" -q -n +1 -F "$logs/$name-0000.log" 2>/dev/null &
    while kill -0 "$pid" 2>/dev/null; do
        if [ $((SECONDS - told)) -ge $SIGNAL_EVERY ] && [ ! -e "$RUN_DIR/PREEMPTED" ]; then
            told=$SECONDS
            if [ "$warned" -eq 1 ] || [ "$SECONDS" -ge "$ask_at" ]; then warn "the time limit is near"; fi
        fi
        sleep 1 &
        wait $!
    done
    wait "$pid"
    status=$?
    wait
}

# what other ranks say is wrong and rank 0, whose log is shown as it grows, has not said
errors() {
    grep -hs '^error: ' "$logs/$1"-*.log | sort -u | grep -vxFf <(grep -s '^error: ' "$logs/$1-0000.log") | head -n 8
}

# requeue <why>: the same job, the same code, from the newest checkpoint
requeue() {
    say "$1; back to the queue"
    trap '' TERM  # SLURM ends this script while it takes the request
    scontrol requeue "$SLURM_JOB_ID" || die "SLURM does not requeue this job; submit it again and it continues" 1
    exit 0
}

# finish <name>: what the end of a launch means
finish() {
    local name=$1
    [ "$cancelled" -eq 0 ] || { say "ended by SLURM (scancel, preemption, a node's death, the time limit)"; exit 143; }
    if [ -e "$RUN_DIR/PREEMPTED" ]; then requeue "preempted: $(tr -d '\n' <"$RUN_DIR/PREEMPTED")"; fi
    [ "$status" -ne 0 ] || return 0
    errors "$name" >&2
    [ ! -e "$logs/refused" ] || die "$name refused (rank $(sort -n "$logs/refused" | head -n 1)); logs in $logs"
    [ "$status" -ne 124 ] || say "$name: srun did not come back in time"
    if [ "$name" = preflight ]; then
        echo "$logs" >>"$RUN_DIR/preflight_deaths"
        [ "$(wc -l <"$RUN_DIR/preflight_deaths")" -lt "$PREFLIGHT_DEATHS" ] ||
            die "stopped: the pre-flight died $PREFLIGHT_DEATHS times in a row; see the logs in $RUN_DIR/logs" 1
    fi
    requeue "$name ended with status $status"
}

patience=${PREFLIGHT_TIMEOUT:-120}  # a cold environment on a network filesystem takes a minute to import
launch preflight "$((3 * patience + 60))" one4d_pl preflight --config "$code/config.yaml" --timeout "$patience"
finish preflight
rm -f "$RUN_DIR/preflight_deaths"
[ "$warned" -eq 0 ] || requeue "asked to stop before the first step"

# srun alone would wait for ever on a node that is gone
launch train "$((limit + 60))" one4d_pl.fit --config "$code/config.yaml"
finish train
say "done: $RUN_DIR"
