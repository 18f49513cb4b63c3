#!/bin/bash
#SBATCH --job-name=a
#SBATCH --comment="drumline /shared/runs/a"
#SBATCH --output="/shared/runs/a/logs/slurm-%j.out"
#SBATCH --nodes=8
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=96
#SBATCH --mem=1000G
#SBATCH --time=1-00:00:00
#SBATCH --partition=train
#SBATCH --account=lab
#SBATCH --qos=high
#SBATCH --exclude=node-07,node-09
#SBATCH --mail-user=me@example.org
#SBATCH --mail-type=END,FAIL
#SBATCH --export=PATH,HOME,USER,SHELL,LANG,SLURM_CONF,DRUMLINE_CACHE,WANDB_API_KEY
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --reservation=spring
#SBATCH --comment="two words"

# llama-8b-8xh100: effective 4096 = 1 per_device × 64 gpus × 64 accumulation.
# Everything that this job needs lies in its run folder. It can be edited and given to sbatch by hand; a job
# that starts again goes on from the newest checkpoint.

run=/shared/runs/a
if [ ! -f "$run/record.json" ]; then
  scontrol update "JobId=$SLURM_JOB_ID" Comment="the run folder is not visible on $SLURMD_NODENAME"
  exit 2
fi
me="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
me="${me:-$SLURM_JOB_ID}"
mkdir -p "$run/logs"
log="$run/logs/job-$me.log"
exec >> "$log" 2>&1
# What `drumline status` shows beside Slurm's own state.
note() { printf '%s\n' "$*" > "$run/logs/job-$me.state"; }
echo "$(date -Is) job $me on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}"
note "started on $SLURM_JOB_NODELIST"
cd "$run" || exit 2

export PYTHONPATH=/sw/drumline"${PYTHONPATH:+:$PYTHONPATH}"
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export DRUMLINE_CACHE='/scratch/it'"'"'s mine'

# The site's own set-up. A line that fails ends the job; one that may fail ends in `|| true`.
# shellcheck disable=SC2317  # the trap calls it
setup_failed() {
  echo "set-up failed with exit code $2: $1"
  note "set-up failed with exit code $2: $1"
  exit 1
}
trap 'setup_failed "$BASH_COMMAND" "$?"' ERR
module load cuda/12.8
source /sw/venv/bin/activate
trap - ERR

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
note "exit code $code: $(tail -n 1 "$log")"

# Cancelled by a person: Slurm calls the job so, too, and starts nothing that waits for it to end well.
if [ -e "$run/logs/cancelled-$me" ] && [ "$code" -ne 0 ]; then
  note "cancelled; saved with exit code $code"
  scancel "$SLURM_JOB_ID" && sleep 60
  exit 0
fi

# Above 128: whoever attended was killed itself; 75: saved and stopped. Then the job asks to be started again.
case $code in
  75) again=1 ;;
  129 | 13? | 14? | 15?) again=1 ;;
  *) again='' ;;
esac
if [ -n "$again" ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  echo "$(date -Is) code $code: asking Slurm to start this job again"
  note "exit code $code: asked Slurm to start this job again"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
