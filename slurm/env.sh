# Site settings, read by every script of this folder; edit the defaults, or set a variable before you submit.
# Sourced before sbatch too (`source slurm/env.sh`, or let train_8node.sh submit itself): sbatch reads SBATCH_* itself.
# An empty value leaves the site's own default.

export SBATCH_PARTITION=${SBATCH_PARTITION:-}   # where the GPU nodes are
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-}       # who pays
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-}   # of one job; a training job that reaches it is requeued and goes on
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-}  # where the site wants their kind named, e.g. h100:8; the scripts ask for a number
for name in SBATCH_PARTITION SBATCH_ACCOUNT SBATCH_TIMELIMIT SBATCH_GPUS_PER_NODE; do
    [ -n "${!name}" ] || unset "$name"  # sbatch takes an empty value for a name
done
unset name

VENV=${VENV:-.venv}            # relative to the checkout, or absolute; on a folder that every node sees
CONTAINER=${CONTAINER:-}       # put before python, e.g. "apptainer exec --nv -B /scratch image.sif"
SRUN_ARGS=${SRUN_ARGS:-}       # more for srun, e.g. pyxis: "--container-image=image.sqsh --container-mounts=/scratch"

# The network between nodes. NCCL finds InfiniBand by itself; name the interface of the first contact where it picks
# the wrong one (symptom: the pre-flight's all-reduce does not finish), e.g. ib0 or bond0.
[ -z "${NCCL_INTERFACE:=}" ] || export NCCL_SOCKET_IFNAME=$NCCL_INTERFACE GLOO_SOCKET_IFNAME=$NCCL_INTERFACE
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a lost peer ends the step, not a hang
# memory that one shape of tensors left is used for the next: less is lost between the pieces
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
