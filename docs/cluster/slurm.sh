#!/bin/bash
# A run of fedlora over several nodes of Slurm: sbatch docs/cluster/slurm.sh data=trec strategy=flexlora rounds=20
# Every node starts one Ray process, the first one also runs the command. At the end `ray symmetric-run` stops every
# Ray of this user on its nodes, hence --exclusive.
#SBATCH --job-name=fedlora
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
# With GPUs: add #SBATCH --gpus-per-node=4 here, --num-gpus=4 to the options of Ray below, and model.device=cuda.
set -euo pipefail

. "${FEDLORA_VENV:-$HOME/fedlora/.venv}/bin/activate" # the same versions on every node
export OMP_NUM_THREADS=1
out=${FEDLORA_OUT:-runs/slurm-$SLURM_JOB_ID} # a folder that the first node can write to
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=6379

# A job that was requeued goes on with what is in its folder.
if [ -e "$out/config.yaml" ]; then
    run=(fedlora run "resume=$out")
else
    run=(fedlora run engine=ray engine.address=auto "out=$out" "$@")
fi
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "${nodes[0]}:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" -- "${run[@]}"
