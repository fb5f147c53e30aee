#!/usr/bin/env bash
# A sweep of three Slurm jobs, one of them cancelled in the middle, then resume=true:  experiments/launchers/slurm_sweep.sh FOLDER
# Needs a Slurm that takes jobs from here, such as that of slurm_on_one_machine.sh.
set -uo pipefail
mkdir -p "$1" && cd "$1"
sweep=(int8run -m hydra/launcher=slurm hydra.launcher.gpus=0 hydra.launcher.cpus=1 hydra.launcher.time_min=10 hydra.launcher.mem_gb=2
    hydra.sweep.dir=sweep tracker=none sampler.steps=1 'prompts.prompts=[fox]' metrics.layers=false outlier=none,convrot,quarot 'seed=0,1')

"${sweep[@]}" &
until [ -e sweep/4/status.json ]; do sleep 0.2; done # the first job of the third Slurm job has begun
squeue
scancel "$(basename --suffix=_submission.sh sweep/.slurm/*_submission.sh | sort -n | tail -1)"
wait $!
echo "exit code: $?"
grep -ho '"state": "[A-Z]*"' sweep/?/status.json
"${sweep[@]}" resume=true
echo "exit code: $?"
grep -ho '"state": "[A-Z]*"' sweep/?/status.json
