#!/bin/bash
# A run under SLURM that resumes itself:
#
#     sbatch docs/examples/slurm.sh configs/llama7b_wikitext2.yaml runs/llama7b [options of `maiht fit`]
#
# A job that runs out of time or is preempted is queued again, and resumes where it was.
#SBATCH --job-name=maiht
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the end SIGTERM goes to the step, as it does before a preemption. With `B:` it would go to this script,
# and srun, which kills what it has started when it is sent SIGTERM, could not hand it on.
#SBATCH --signal=TERM@300

# Without checkpoints, time spent in training would be lost with a node that dies. Of several tasks, one that has stopped
# must not have the others killed while they write.
srun --kill-on-bad-exit=0 maiht fit --config "$1" --output_dir "$2" --trainer.enable_checkpointing true "${@:3}"
status=$?
# 143: stopped by SIGTERM, with nothing lost.
if [ "$status" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
