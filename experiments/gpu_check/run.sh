#!/usr/bin/env bash
# What a GPU does with this code: tests, two recipes, five models against torch.compile. Installs nothing.
# bash experiments/gpu_check/run.sh [OUT]      eight minutes on one H100 or H200
set -u
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu_check}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=.:${PYTHONPATH:-} BIGBASE_CACHE="$out/cache" XDG_CACHE_HOME="$out/xdg"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

echo "== tests on the device, matrix products in full precision"
JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest JAX_DISABLE_MOST_OPTIMIZATIONS=0 timeout 150 \
  python3 -m pytest -q -x --maxfail=20 -p no:cacheprovider tests/models/test_layers.py tests/models/test_rope.py \
  tests/models/test_attention.py tests/test_evaluate.py -k "not spread and not mesh and not ring" 2>&1 | tail -n 25

echo "== recipes in bfloat16"
for recipe in catdog lm; do
  began=$SECONDS
  timeout 150 python3 launch.py --config=configs/$recipe.py --config.task.model.dtype=bfloat16 --workdir="$out/$recipe" \
    2>"$out/$recipe.log" | tail -n 1 | cut -c1-300
  echo "$recipe: $((SECONDS - began)) s; $(grep -E '^step' "$out/$recipe.log" | tail -n 1)"
done

echo "== five models against torch.compile"
timeout "${LIMIT:-420}" python3 experiments/gpu_check/compare.py --output="$out/results.json"
