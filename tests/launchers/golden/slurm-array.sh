#!/bin/bash
#SBATCH --job-name=llama-8b-8xh100
#SBATCH --nodes=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=96
#SBATCH --mem=1000G
#SBATCH --time=1-00:00:00
#SBATCH --partition=train
#SBATCH --account=lab
#SBATCH --qos=high
#SBATCH --exclude=node-07,node-09
#SBATCH --array=0-1
#SBATCH --export=PATH,HOME,USER,SHELL,LANG,SLURM_CONF,DRUMLINE_CACHE,WANDB_API_KEY
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --reservation=spring
#SBATCH --mail-type=FAIL
#SBATCH --output=/dev/null

# llama-8b-8xh100: effective 4096 = 1 per_device × 8 gpus × 512 accumulation.
# Everything that this job needs lies in its run folder. It can be edited and given to sbatch by hand; a job
# that starts again goes on from the newest checkpoint.

runs=(
  '/r/a b'
  /r/c
)
run="${runs[$SLURM_ARRAY_TASK_ID]}"
if [ ! -f "$run/record.json" ]; then
  scontrol update "JobId=$SLURM_JOB_ID" Comment="the run folder is not visible on $SLURMD_NODENAME"
  exit 2
fi
mkdir -p "$run/logs"
exec >> "$run/logs/job-$SLURM_JOB_ID.log" 2>&1
echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}"
cd "$run" || exit 2

export PYTHONPATH=/sw/drumline"${PYTHONPATH:+:$PYTHONPATH}"
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export DRUMLINE_CACHE='/scratch/it'"'"'s mine'

# The site's own set-up.
module load cuda/12.8
source /sw/venv/bin/activate

set -u

# Before the time limit Slurm sends USR1 here, before a preemption or a cancellation TERM: all ranks finish the
# step and save.
attend=''
trap 'interrupted=1; kill -USR1 "$attend" 2> /dev/null' USR1
trap 'interrupted=1; kill -TERM "$attend" 2> /dev/null' TERM

/sw/venv/bin/python -P -m drumline.cli attend "$run" &
attend=$!
while :; do
  interrupted=''
  wait "$attend"
  code=$?
  [ -n "$interrupted" ] || break
done

# Above 128: whoever attended was killed itself; 75: saved and stopped. Then the job asks to be started again,
# unless somebody has cancelled it.
case $code in
  75) again=1 ;;
  129 | 13? | 14? | 15?) again=1 ;;
  *) again='' ;;
esac
me="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
if [ -e "$run/logs/cancelled-${me:-$SLURM_JOB_ID}" ]; then again=''; fi
if [ -n "$again" ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  echo "$(date -Is) code $code: asking Slurm to start this job again"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
