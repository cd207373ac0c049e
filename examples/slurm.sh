#!/usr/bin/env bash
#SBATCH --job-name=llavar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
# The paper's recipe on two nodes of eight GPUs:  sbatch examples/slurm.sh llavar-13b
#
# Slurm starts the ranks itself, without a launcher, so that its SIGTERM reaches them five minutes before the time limit.
# They save a checkpoint after the current step and exit with status 4; the job is then requeued and resumes.
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE (a name or a file)}
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The settings of examples/accelerate/fsdp2_2x8.yaml, as accelerate passes them to its processes.
export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=FULL_STATE_DICT
export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_TRANSFORMER_CLS_TO_WRAP=LlamaDecoderLayer
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-8}

status=0
srun --kill-on-bad-exit=1 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec llavar-peft train "$@"' rank "$recipe" "${@:2}" || status=$?
if [ "$status" -eq 4 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
