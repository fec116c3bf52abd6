"""Hourly traffic, 24 hours ahead: ours beside the last week again and scikit-learn's boosting on the same features.

python experiments/forecast/metro.py; see README.md.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from bigbase_jax.build import build  # noqa: E402
from bigbase_jax.runtime.rundir import RunDir  # noqa: E402

L, H = 168, 24
FILE = f"{os.environ['BIGBASE_DATA']}/metro_traffic/Metro_Interstate_Traffic_Volume.csv"
KNOWN = "temp+rain_1h+snow_1h+clouds_all+weather_main"
RECIPE = (
    f"root={FILE},time=date_time,columns=traffic_volume,known={KNOWN},holidays=holiday,calendar,history={L},horizon={H},"
    "val=2016-10-01,test=2017-10-01,quantiles=none"
)


def told(name, error_NH, observed_NH, std, seconds):
    error = error_NH[observed_NH] * std
    row = {"model": name, "mae": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean()), "core_seconds": seconds}
    row = {key: value if isinstance(value, str) else round(float(value), 1) for key, value in row.items()}
    print(json.dumps(row), flush=True)
    with open(HERE / "metro.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


for model in ("tide", "patchtst", "nlinear"):
    workdir = f"runs/metro/{model}"
    command = [sys.executable, "launch.py", f"--config=configs/forecast.py:{RECIPE},model={model}"]
    command += [f"--workdir={workdir}", "--config.optim.learning_rate=0.001"]
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    found = json.loads(done.stdout.splitlines()[-1])["per_channel"]["traffic_volume"]
    row = {"model": model, "mae": found["mae_in_units"], "rmse": found["rmse_in_units"], "core_seconds": spent}
    row = {key: value if isinstance(value, str) else round(value, 1) for key, value in row.items()}
    print(json.dumps(row), flush=True)
    with open(HERE / "metro.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")

data = build(RunDir(ROOT / workdir).config().data).prepare(lambda line: None)
std = data.dataset_info["std"][0]


def rows_of(split, every):
    """Features [n * H, ...] of each step ahead of every so many windows: history, its covariates, how far it is."""
    batch = data.source(split).batch(np.arange(0, data.splits[split], every))
    history_nL, ahead_nHK = batch["history"][..., 0], batch["covariates"][:, L:]
    n = len(history_nL)
    same_hour = np.stack([history_nL[:, L - 24 * k + np.arange(H)] for k in range(1, 8)], -1)
    parts = [np.repeat(history_nL[:, None, -48:], H, 1), same_hour, ahead_nHK]
    parts.append(np.broadcast_to(np.arange(H, dtype=np.float32)[None, :, None], (n, H, 1)))
    return np.concatenate(parts, -1).reshape(n * H, -1), batch["future"][..., 0], batch["observed"][..., 0], history_nL


began = time.process_time()
x, y_nH, seen_nH, _ = rows_of("train", 6)
seen = seen_nH.reshape(-1)
boosting = HistGradientBoostingRegressor(max_iter=400, learning_rate=0.08, max_leaf_nodes=63, early_stopping=False)
val_x, val_y, val_seen, _ = rows_of("val", 6)
boosting.fit(x[seen], y_nH.reshape(-1)[seen])
steps = [
    np.mean((guess - val_y.reshape(-1))[val_seen.reshape(-1)] ** 2) for guess in boosting.staged_predict(val_x)
]  # as many trees as are best on val
boosting.set_params(max_iter=int(np.argmin(steps)) + 1).fit(x[seen], y_nH.reshape(-1)[seen])
spent = time.process_time() - began
x, y_nH, seen_nH, history_nL = rows_of("test", 1)
guess_nH = boosting.predict(x).reshape(y_nH.shape)
told(f"HistGradientBoosting, {boosting.max_iter} trees", guess_nH - y_nH, seen_nH, std, spent)
for season in (24, 168):
    told(f"{season} hours ago", history_nL[:, L - season :][:, :H] - y_nH, seen_nH, std, 0.0)
