#!/bin/bash
# Training on several machines of a SLURM cluster, one process for each GPU:
#
#     sbatch experiments/launch/slurm.sh --config=configs/ade20k.py --config.data.root=/data/ADEChallengeData2016
#
# * Processes find each other through srun's variables (`--distributed=auto`).
# * Ninety seconds before the time limit, and where SLURM preempts the job, every process is sent SIGTERM: the step at
#   hand is saved and the job is put into the queue again; so it is, three times at most, where a process was killed,
#   lost another one, or was ended by its watchdog. Not run on SLURM: none was at hand.
# * $VENV: the environment of `pip install -e '.[cuda]'`, on a file system that all machines see, as the run's folder.
#
#SBATCH --job-name=pspnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

. "${VENV:-.venv}/bin/activate"
srun --kill-on-bad-exit=1 python -m pspnet_jax.main "$@"
code=$?
case $code in
  75 | 134 | 137 | 143)
    restarts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')
    if [ "$code" -eq 143 ] || [ "${restarts:-0}" -lt 3 ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
