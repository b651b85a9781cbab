#!/bin/bash
# Train on several nodes, in as many jobs as the time limit requires:
#
#     sbatch examples/slurm.sh --data /imagenet --model resnet50 --self-kd uskd
#
# Start it in the repository, on a disk that all nodes share, with torchrun in PATH. The run is in runs/slurm-JOB.
#SBATCH --job-name=kdlite
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# B: only the batch shell gets the signal, and sends it to the ranks of its node; these stop the others. Without B: the
# tasks of the job step get it, which under proctrack/cgroup are torchrun and not the ranks that it started.
set -uo pipefail

output=runs/slurm-$SLURM_JOB_ID # a requeued job keeps its number
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launcher=$(mktemp)
signalled=
# shellcheck disable=SC2064  # expand it now
trap "rm -f '$launcher'" EXIT
trap 'trap "" USR1; signalled=1; pkill -USR1 -P "$(cat "$launcher")"' USR1

# The signal would end torchrun, so it is ignored, also after exec; train.py still catches it.
# shellcheck disable=SC2016  # the tasks expand it
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    trap "" USR1
    [ "$SLURM_NODEID" != 0 ] || echo $$ >"$0"
    exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --rdzv-backend c10d "$@"' \
    "$launcher" --rdzv-endpoint "$first:$((29000 + SLURM_JOB_ID % 1000))" --rdzv-id "$SLURM_JOB_ID" \
    train.py "$@" --output "$output" --resume &
wait $!
status=$?
if [ -n "$signalled" ]; then # the signal ended the first wait
    wait $!
    status=$?
fi

last=$(grep -E '^(last top-1|stopped by) ' "$output/log.txt" | tail -n 1)
echo "status $status: ${last:-neither stopped nor finished}"
if [[ $status == 0 && -n $signalled && $last == "stopped by"* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
