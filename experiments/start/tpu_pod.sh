#!/bin/bash
# TPU=name ZONE=us-central2-b experiments/start/tpu_pod.sh --config=configs/catdog.py --workdir=/shared/runs/catdog
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd bigbase_jax && python3 launch.py $(printf '%q ' "$@")"
