"""Series: grids of what is irregular, gaps, repeated times, zones, splits by time, covariates, what a user gives."""

import json
import pathlib

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.splits import by_time
from bigbase_jax.data.sources.synthetic.series import SyntheticSeries
from bigbase_jax.data.sources.table.series import Grid, SeriesFiles, grid_of, last_known

HOURS = np.datetime64("2024-01-01T00", "s") + np.arange(100) * np.timedelta64(3600, "s")
SMALL = {"history": 6, "horizon": 3}


def table(tmp_path, lines, header="time,a,b"):
    path = tmp_path / "series.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def hourly(count=100, start=0):
    return [f"{HOURS[i]},{i},{2 * i}" for i in range(start, count)]


def prepared(root, tmp_path, **words):
    told = []
    data = SeriesFiles(root=root, **{**SMALL, **words}).prepare(tmp_path / "cache", 1e9, told.append)
    return data, told, json.loads(data.dataset_info["series"])


def codec(data):
    return SeriesFiles.codec({"limits": None}, data.dataset_info)


# ---------------------------------------------------------------------------------------------------------- splits


def test_splits_by_time_leave_rows_of_one_time_together_and_the_future_out_of_training():
    time_N = np.array([5, 1, 3, 3, 3, 2, 4, 9, 8, 7])
    parts = by_time(time_N, {"val": 0.2, "test": 0.3})
    assert sorted(np.concatenate([*parts.values()])) == list(range(10))
    times = {split: set(time_N[rows]) for split, rows in parts.items()}
    assert max(times["train"]) < min(times["val"]) <= max(times["val"]) < min(times["test"])
    assert not times["train"] & times["val"] and times["test"] == {7, 8, 9}
    at = by_time(HOURS, {"val": 0.1, "test": 0.1}, {"val": HOURS[50], "test": HOURS[80]})
    assert [len(rows) for rows in at.values()] == [50, 30, 20]
    with pytest.raises(UserError, match="nothing to train on"):
        by_time(time_N, {"val": 0.5, "test": 0.5})
    with pytest.raises(UserError, match="after the one behind"):
        by_time(HOURS, {"val": 0.1, "test": 0.1}, {"val": HOURS[80], "test": HOURS[50]})


# ----------------------------------------------------------------------------------------------------------- grids


def test_a_grid_takes_the_most_frequent_step_and_the_most_frequent_phase():
    odd = np.sort(np.concatenate([HOURS[:50] + np.timedelta64(180, "s"), HOURS[10:11] + np.timedelta64(1200, "s")]))
    grid = grid_of(odd)
    assert (grid.step, grid.unit, grid.start, str(grid), grid.season) == (3600, "s", "2024-01-01T00:03:00", "1 h", 24)
    assert grid.rows(odd).max() == 49
    months = grid_of(np.array(["2020-01-31", "2020-02-29", "2020-03-31", "2020-12-31"], "M8[s]"))
    assert (months.step, months.unit, months.season) == (1, "M", 12)
    assert months.rows(np.array(["2021-01-15"], "M8[s]")).tolist() == [12]
    assert grid_of(HOURS, "2h").step == 7200
    for step in ("0h", "h5", "1y"):
        with pytest.raises(UserError, match="step is"):
            grid_of(HOURS, step)
    with pytest.raises(UserError, match="nearly all of them missing"):
        grid_of(np.array([0, 1, 10**9], "M8[s]"))


def test_gaps_repeats_disorder_and_odd_times_are_handled_and_told(tmp_path):
    lines = [line for i, line in enumerate(hourly()) if i not in (20, 21, 22, 40)]
    lines.insert(5, f"{HOURS[30]},50,60")  # repeated and out of order
    lines[10] = lines[10].replace(":00:00", ":10:00")
    data, _, about = prepared(table(tmp_path, lines), tmp_path)
    for words in (
        "1 repeated times",
        "out of order",
        "1 times between the steps",
        "4 steps in 2 gaps missing, the longest of 3",
    ):
        assert words in data.description
    mean, std = np.array(about["mean"]), np.array(about["std"])
    source = data.splits["train"]
    at = [source.name(i) for i in range(len(source))].index(str(HOURS[21]))
    window = source[at]
    assert window["observed"].any(1).tolist() == [False, False, True] and window["history"].shape == (6, 2)
    np.testing.assert_allclose(window["history"][-1] * std + mean, [19, 38], rtol=1e-5)  # the last value before the gap
    averaged = source[at + 7]
    assert averaged["observed"].all()
    np.testing.assert_allclose(averaged["future"][2] * std + mean, [(30 + 50) / 2, (60 + 60) / 2], rtol=1e-5)


def test_mixed_zones_are_one_time(tmp_path):
    lines = hourly(50)
    lines[10] = "2024-01-01T12:00:00+02:00,10,20"
    lines[11] = "2024-01-01T11:00:00Z,11,22"
    data, _, _ = prepared(table(tmp_path, lines), tmp_path)
    assert "50 steps of 1 h" in data.description and "missing" not in data.description


def test_windows_stay_in_their_split_and_standardise_by_training(tmp_path):
    data, _, about = prepared(table(tmp_path, hourly()), tmp_path, val_fraction=0.2, test_fraction=0.2)
    train, test = data.splits["train"], data.splits["test"]
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [60 - 6 - 3 + 1, 20 - 3 + 1, 20 - 3 + 1]
    np.testing.assert_allclose(about["mean"], [np.arange(60).mean(), 2 * np.arange(60).mean()])
    assert (train.name(len(train) - 1), test.name(0)) == (str(HOURS[57]), str(HOURS[80]))
    batch = test.batch(np.array([0, 5]))
    for name, x in test[5].items():
        np.testing.assert_array_equal(batch[name][1], x)
    value = batch["history"][0, :, 0] * about["std"][0] + about["mean"][0]
    np.testing.assert_allclose(value, np.arange(74, 80), rtol=1e-5)
    assert data.fingerprint() != prepared(table(tmp_path, hourly(99)), tmp_path)[0].fingerprint()


def test_rows_of_several_series_become_channels(tmp_path):
    lines = [f"{HOURS[i]},{name},{i * (1 + k)}" for i in range(60) for k, name in enumerate("xy") if i != 8 or k]
    data, _, about = prepared(table(tmp_path, lines, "time,shop,sold"), tmp_path, series="shop")
    assert data.dataset_info["channels"] == ["x", "y"] and "repeated" not in data.description
    assert not data.splits["train"].batch(np.arange(6))["observed"].all()
    rows = [{"time": str(t), "shop": name, "sold": i} for i, t in enumerate(HOURS[:7]) for name in "xy"]
    (example,) = codec(data).decode({"rows": rows})
    assert example["history"].shape == (6, 2)
    np.testing.assert_allclose(example["history"][-1] * about["std"] + about["mean"], [6, 6], rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- covariates


def test_covariates_are_the_calendar_holidays_and_known_columns(tmp_path):
    kinds = ["sun", "rain", "sun"]
    lines = [f"{HOURS[i]},{i % 7},{i % 5 + 1},{kinds[i % 3]},{'May Day' if i == 30 else ''}" for i in range(100)]
    words = {"columns": ("a",), "known": ("price", "weather"), "holidays": "feast", "use_calendar": True}
    data, _, _ = prepared(table(tmp_path, lines, "time,a,price,weather,feast"), tmp_path, **words)
    names = data.dataset_info["covariate_names"]
    assert {"price", "weather=sun", "weather=rain", "holiday", "day_sine1", "week_cosine3", "year_sine1"} <= set(names)
    window = dict(zip(names, data.splits["train"][20 - 6]["covariates"].T, strict=True))  # rows 14 to 22
    assert window["weather=rain"].tolist() == [float(i % 3 == 1) for i in range(14, 23)]
    hour = 2 * np.pi * np.arange(14, 23) / 24
    np.testing.assert_allclose(window["day_sine2"], np.sin(2 * hour), atol=1e-5)
    later = dict(
        zip(names, data.splits["train"][40 - 6]["covariates"].T, strict=True)
    )  # rows 34 to 42: the day after is 48
    assert later["holiday"].all() and not window["holiday"][:9].any()

    history = [line.split(",") for line in lines[80:93]]
    for row in history[10:]:
        row[1] = ""
    path = table(tmp_path, [",".join(row) for row in history], "time,a,price,weather,feast")
    (example,) = codec(data).decode(path)
    test = data.splits["test"]
    at = [test.name(i) for i in range(len(test))].index(str(HOURS[90]))
    for name in ("history", "covariates"):  # what predicts is what was trained
        np.testing.assert_allclose(example[name], test[at][name], atol=1e-5)
    assert example["times"].tolist() == [str(t) for t in HOURS[90:93]]
    short = table(tmp_path, [",".join(row) for row in history[:12]], "time,a,price,weather,feast")
    with pytest.raises(UserError, match="1 of these have no row"):
        codec(data).decode(short)


# ------------------------------------------------------------------------------------------------- what users give


def test_a_history_comes_as_a_file_as_bytes_and_as_json_in_rows_or_columns(tmp_path):
    data, _, _ = prepared(table(tmp_path, hourly()), tmp_path)
    path = table(tmp_path, hourly(20))
    columns = {"time": [str(t) for t in HOURS[:20]], "a": list(range(20)), "b": [2 * i for i in range(20)]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "h.json").write_text(json.dumps(rows))
    given = [
        path,
        pathlib.Path(path).read_bytes(),
        str(tmp_path / "h.json"),
        json.dumps({"rows": rows}).encode(),
        {"rows": rows},
        columns,
    ]
    found = [codec(data).decode(one)[0] for one in given]
    assert found[0]["times"][0] == str(HOURS[20])
    for one in found[1:]:
        np.testing.assert_array_equal(one["history"], found[0]["history"])
        assert one["times"].tolist() == found[0]["times"].tolist()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": ["2024-01-01"], "a": [1]}, "no column 'b'"),
        ({"time": [str(t) for t in HOURS[:4]], "a": [1] * 4, "b": [1] * 4}, "4 steps of 1 h; this model reads 6"),
        ({"time": [str(t) for t in HOURS[:8]], "a": [1] * 8, "b": [None] * 8}, "'b' has no value"),
        ({"time": ["yesterday"] * 8, "a": [1] * 8, "b": [1] * 8}, "no date"),
        ({"time": [str(t) for t in HOURS[:8]], "a": ["x"] * 8, "b": [1] * 8}, "no number"),
        ({"a": [1], "b": [1, 2]}, "columns of one length"),
        ({"rows": []}, "no column"),
        (b"", "empty|no column|no history"),
    ],
)
def test_a_history_that_cannot_be_read_is_one_sentence(tmp_path, given, said):
    data, _, _ = prepared(table(tmp_path, hourly()), tmp_path)
    with pytest.raises(UserError, match=said):
        codec(data).decode(given)


@pytest.mark.parametrize(
    "change", [{"history": 10**12}, {"grid": ["2024", 0, "s"]}, {"mean": []}, {"days": None}, None]
)
def test_what_a_folder_says_of_its_series_is_checked(tmp_path, change):
    _, _, about = prepared(table(tmp_path, hourly()), tmp_path)
    if change is not None:
        about |= change
    kept = None if change is None else {name: x for name, x in about.items() if not (name in change and x is None)}
    with pytest.raises(UserError, match="kept of its series"):
        SeriesFiles.codec({"limits": None}, {"series": json.dumps(kept)})


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        (hourly(10), {}, "do not fit"),
        (hourly(), {"columns": ("c",)}, "no column 'c'"),
        (hourly(), {"time": "a"}, "no date"),
        (hourly(), {"holidays": "nowhere"}, "no column and no file"),
        (hourly(), {"val_from": "soon"}, "no date"),
        ([f"{t},," for t in HOURS], {}, "no column of numbers|no number"),
        ([f"{i},{i},{i}" for i in range(100)], {}, "no column of dates"),
    ],
)
def test_tables_that_cannot_be_forecast_are_one_sentence(tmp_path, lines, words, said):
    with pytest.raises(UserError, match=said):
        prepared(table(tmp_path, lines), tmp_path, **words)


def test_constant_empty_and_infinite_values(tmp_path):
    lines = [f"{t},{'inf' if i == 3 else i},5,{'' if i < 90 else 1}" for i, t in enumerate(HOURS)]
    data, told, about = prepared(table(tmp_path, lines, "time,a,b,late"), tmp_path)
    assert data.dataset_info["channels"] == ["a", "b"] and about["std"][1] == 1.0
    assert any("b is constant" in line for line in told) and any("late has no number" in line for line in told)
    assert not data.splits["train"][0]["observed"].all() or np.isfinite(data.splits["train"][0]["history"]).all()
    assert np.isfinite(data.splits["train"].batch(np.arange(10))["history"]).all()


def test_the_last_value_is_carried_on():
    x = np.array([[np.nan, 1], [2, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(last_known(x), [[0, 1], [2, 1], [2, 1]])


def test_the_made_up_series_are_the_same_for_a_seed():
    def made(seed):
        return SyntheticSeries(steps=400, seed=seed, **SMALL).prepare(None, 0, print)

    assert made(0).fingerprint() == made(0).fingerprint() != made(1).fingerprint()
    assert Grid(*json.loads(made(0).dataset_info["series"])["grid"]).step == 3600
