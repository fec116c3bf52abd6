#!/usr/bin/env bash
# What a GPU does with this code: tests, two recipes, five models against torch.compile. Installs nothing.
# bash experiments/gpu_check/run.sh [OUT]      at most eight minutes on one H100 or H200; a part that fails ends only itself
set -u
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu_check}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=.:${PYTHONPATH:-} BIGBASE_CACHE="$out/cache" XDG_CACHE_HOME="$out/xdg"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c 'import jax; print("jax", jax.__version__, jax.devices())'

echo "== tests on the device, matrix products in full precision (80 s)"
JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest JAX_DISABLE_MOST_OPTIMIZATIONS=0 timeout 80 \
  python3 -m pytest -q -p no:cacheprovider tests/models/test_attention.py tests/models/test_rope.py tests/test_evaluate.py \
  -k "test_attention and (this_device or on_a_gpu or codes) or test_rope or test_evaluate and not mesh" 2>&1 | tail -n 25

echo "== recipes in bfloat16 (60 s each)"
for recipe in catdog lm; do
  rm -rf "${out:?}/$recipe"
  began=$SECONDS
  timeout 60 python3 launch.py --config=configs/$recipe.py --config.task.model.dtype=bfloat16 --workdir="$out/$recipe" \
    >"$out/$recipe.log" 2>&1 || echo "$recipe: failed, or took too long; see $out/$recipe.log"
  echo "$recipe: $((SECONDS - began)) s; $(grep -E '^step' "$out/$recipe.log" | tail -n 1)"
done

echo "== five models against torch.compile (260 s)"
timeout 265 python3 experiments/gpu_check/compare.py --limit=260 --output="$out/results.json"
