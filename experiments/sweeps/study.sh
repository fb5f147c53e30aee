#!/usr/bin/env bash
# the study of README.md: outlier method x backend x LoRA mode on the tiny model, 36 jobs, its report copied beside this file
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
cd "$work"
int8run -m lora=stack_a lora.strength=0.5 lora.mode=dynamic,bake,stochastic outlier=none,convrot,quarot,hadanorm \
    backend=cpu,onednn,torch_int_mm 'prompts.prompts=[fox,sunflower,hamburger,octopus]' tracker=none hydra.sweep.dir="$work/study"
cp "$work/study/report.html" "$here/study.html"
