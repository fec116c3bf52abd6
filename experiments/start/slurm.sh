#!/bin/bash
# sbatch experiments/start/slurm.sh --config=configs/catdog.py --workdir=/shared/runs/catdog
#SBATCH --job-name=bigbase
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
srun --kill-on-bad-exit=0 python launch.py "$@"
status=$?
# 143: stopped by SIGTERM, five minutes before the end of the time; 137: a process was killed; 75: another was lost.
case $status in 75 | 137 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $status
