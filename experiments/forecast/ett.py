"""ETTh1 and ETTh2 by the usual protocol: one run for each data set, model, horizon and seed; see README.md.

python experiments/forecast/ett.py [model=dlinear] [data=ETTh1] [horizon=96] [seed=0]
"""

import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
HISTORY = {"dlinear": 336, "nlinear": 336, "patchtst": 512}
ASKED = dict(word.split("=") for word in sys.argv[1:])

for model in HISTORY:
    for seed in (0, 1, 2):
        for data in ("ETTh1", "ETTh2"):
            for horizon in (96, 192, 336, 720):
                said = {"model": model, "data": data, "horizon": str(horizon), "seed": str(seed)}
                if any(said[name] not in value.split("+") for name, value in ASKED.items()):
                    continue
                root = pathlib.Path(os.environ["BIGBASE_DATA"]) / "ett" / f"{data}.csv"
                recipe = f"root={root},history={HISTORY[model]},horizon={horizon},model={model},quantiles=none"
                recipe += ",val=2017-06-26,test=2017-10-24,until=2018-02-21"  # 12, 4 and 4 months of 30 days
                command = [sys.executable, "launch.py", f"--config=configs/forecast.py:{recipe}"]
                command += [f"--workdir=runs/ett/{model}-{data}-{horizon}-{seed}"]
                command += [f"--config.seed={seed}", f"--config.data.seed={seed}"]
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                row = {**said, "step": found["step"], "mse": found["mse"], "mae": found["mae"]}
                print(json.dumps(row), flush=True)
                with open(HERE / "ett.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
