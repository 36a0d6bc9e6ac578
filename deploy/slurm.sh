#!/usr/bin/env bash
# Extraction as one Slurm job: Ray on every node of the allocation, the driver on the first.
#
#   sbatch deploy/slurm.sh --config recipes/owt_gpt2.yaml --output /scratch/owt_gpt2
#   sbatch --nodes 2 --gpus-per-node 4 deploy/slurm.sh ...          (what stands below is the default)
#
# Submit from the checkout, after `make install` there, on a file system that all nodes see; so must be --output, and HF_HOME.
# A job that is preempted or loses its first node is queued again and continues. To go on after the time limit, submit the same
# line several times: of one name, one runs at a time, and those after the last shard end at once. Nodes are taken whole, since
# symmetric-run ends with `ray stop`, which stops every Ray of this user on the node.
#
#SBATCH --job-name=gumbel
#SBATCH --dependency=singleton
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch: sbatch deploy/slurm.sh --config RECIPE --output FOLDER}"
export PATH="$PWD/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # seconds; nodes may be slow to import from a shared file system

export RAY_AUTH_MODE=token  # without it, whoever reaches the port can run code as you
ray get-auth-token --generate > /dev/null 2>&1  # a file in the home that nodes share; one that is there stays

address=$(hostname -I | cut -d' ' -f1):6379  # this script runs on the first node
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs: --gpus-per-node}

# --no-kill, --kill-on-bad-exit=0: the loss of one node is not the end of the others
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --no-kill --kill-on-bad-exit=0 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" -- \
    python -m pipeline extract "$@" --ray.address "$address" --ray.workers $((SLURM_JOB_NUM_NODES * gpus)) --ray.gpus 1
