#!/bin/sh
# All plans of the study, half an hour on two cores: sh all.sh > results.jsonl
for chips in 1 4 16 64 256 1024 4096; do
  for what in "B weak data" "B strong data" "g weak data" "g weak fsdp" "g strong fsdp"; do
    set -- $what
    python scaling.py --model=$1 --scaling=$2 --mesh=$3 --chips=$chips
  done
done
