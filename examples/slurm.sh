#!/bin/bash
# Train on several nodes. Before its time limit the job saves the run and requeues itself, then resumes the run:
#
#     sbatch examples/slurm.sh --data /imagenet --model resnet50 --self-kd uskd
#
# Start the script in the repository, on a disk that all nodes share, with torchrun in PATH. The run is in
# runs/slurm-JOB.
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
# With "B:" only the batch shell gets the signal. It sends the signal to the ranks of its node, which stop the other
# ranks. Without "B:" torchrun may get the signal, and not the ranks that it started (under proctrack/cgroup).
set -uo pipefail

output=runs/slurm-$SLURM_JOB_ID # a requeued job keeps its number
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launcher=$(mktemp)
signalled=
# shellcheck disable=SC2064  # expand $launcher now
trap "rm -f '$launcher'" EXIT
trap 'trap "" USR1; signalled=1; pkill -USR1 -P "$(cat "$launcher")"' USR1

# The signal would end torchrun, so the shell ignores it, and torchrun inherits this after exec. train.py catches it.
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
