"""Encoders of columns: against references, fitted to training rows alone, the same of a row as of a column."""

import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import StandardScaler

from bigbase_jax.core import UserError
from bigbase_jax.data.columns import Column, Columns, columns_of
from bigbase_jax.data.encoders import Encoders, calendar, fit_encoders

N = 400


def table(seed=0, **more):
    rng = np.random.default_rng(seed)
    gain = np.where(rng.random(N) < 0.7, 0, rng.integers(1, 50, N)).astype(float)
    x = rng.normal(3, 2, N)
    x[::7] = np.nan
    values = {"x": x, "gain": gain, "color": rng.choice(["red", "red", "blue", "green"], N)}
    days = np.datetime64("2020-01-01T06:00:00", "s") + rng.integers(0, 700, N) * np.timedelta64(86400, "s")
    columns = [*columns_of({**values, **more}).values(), Column("day", "date", days)]
    columns.append(Column("says", "text", [f"word{i % 3} and more" for i in range(N)]))
    return Columns(columns, N)


def test_numbers_against_references():
    columns = table()
    x_N, gain_N = columns["x"].values, columns["gain"].values
    by_rank = fit_encoders(columns, quantiles=2 * N).encode(columns)["numbers"]
    rank_N = (scipy.stats.rankdata(gain_N) - 0.5) / N
    np.testing.assert_allclose(by_rank[:, 2], scipy.special.ndtri(rank_N), atol=1e-5)
    real_N = ~np.isnan(x_N)
    rank_n = (scipy.stats.rankdata(x_N[real_N]) - 0.5) / real_N.sum()
    np.testing.assert_allclose(by_rank[real_N, 0], scipy.special.ndtri(rank_n), atol=1e-5)
    np.testing.assert_array_equal(by_rank[:, 1], ~real_N)  # "x is missing"
    assert not by_rank[~real_N, 0].any()
    standard = fit_encoders(columns, numbers="standard").encode(columns)["numbers"]
    wanted = StandardScaler().fit_transform(gain_N[:, None])[:, 0]
    np.testing.assert_allclose(standard[:, 2], wanted, atol=1e-5)


def test_few_knots_are_near_the_ranks_and_keep_order():
    rng = np.random.default_rng(0)
    x_N = np.where(rng.random(20_000) < 0.6, 0.0, rng.lognormal(size=20_000))
    columns = columns_of({"x": x_N})
    found = fit_encoders(columns, quantiles=64)
    z_N = found.encode(columns)["numbers"][:, 0]
    assert len(found.columns[0].knots) <= 66
    order = np.argsort(x_N, kind="stable")
    assert (np.diff(z_N[order]) >= 0).all()
    rank_N = (scipy.stats.rankdata(x_N) - 0.5) / len(x_N)
    assert np.abs(scipy.special.ndtr(z_N) - rank_N).max() < 0.02 and len(set(z_N[x_N == 0])) == 1


def test_categories_by_frequency_and_what_is_new_or_missing_is_0():
    columns = table()
    encoders = fit_encoders(columns)
    (names,) = (e.names for e in encoders.columns if e.name == "color")
    assert names[0] == "red" and set(names[1:]) == {"blue", "green"} and encoders.cardinalities == (4,)
    code = {color: encoders.encode_row(row_of(columns, 0, color=color))["categories"][0] for color in (*names, "pink")}
    assert code == {**{name: i for i, name in enumerate(names, 1)}, "pink": 0}
    assert encoders.encode_row(row_of(columns, 0, color=None))["categories"] == [0]
    rare = fit_encoders(columns_of({"c": ["a"] * 5 + ["b"] * 4 + ["z"], "x": range(10)}), min_count=2)
    assert rare.columns[0].names == ("a", "b")


def test_many_names_are_hashed_alike_everywhere():
    names = [f"user{i}" for i in range(N)]
    one, two = columns_of({"u": names}), columns_of({"u": names[::-1]})
    encoders = fit_encoders(one, max_categories=50, buckets=64)
    assert encoders.cardinalities == (65,)
    code_N = encoders.encode(one)["categories"][:, 0]
    assert code_N.min() >= 1 and len(np.unique(code_N)) > 55
    np.testing.assert_array_equal(encoders.encode(two)["categories"][::-1, 0], code_N)
    assert encoders.encode_row({"u": "user7"})["categories"][0] == code_N[7]


def test_dates_and_words():
    moments = np.array(["2021-01-01T00:00:00", "2021-07-02T15:00:00", "2021-01-04T06:00:00"], "M8[s]")
    parts = calendar(moments)
    np.testing.assert_allclose(parts[0, :2], [0, 1], atol=1e-6)  # the first of the year
    np.testing.assert_allclose(parts[1, 1], -1, atol=1e-3)  # the middle of it
    np.testing.assert_allclose(parts[2, 2:], [np.sin(2 * np.pi / 28), np.cos(2 * np.pi / 28), 1, 0], atol=1e-6)
    columns = table()
    encoders = fit_encoders(columns, words=16)
    assert "day: sine of the week" in encoders.features and "day: sine of the day" not in encoders.features
    places = [i for i, name in enumerate(encoders.number_names) if name == "says"]
    wanted = HashingVectorizer(n_features=16).transform(columns["says"].values).toarray()
    np.testing.assert_allclose(encoders.encode(columns)["numbers"][:, places], wanted, atol=1e-6)


def row_of(columns, i, **more):
    row = {"x": columns["x"].values[i], "gain": int(columns["gain"].values[i]), "day": str(columns["day"].values[i])}
    code = columns["color"].values[i]
    return {**row, "color": columns["color"].names[code], "says": columns["says"].values[i], "more": 1, **more}


def test_a_row_is_encoded_as_its_column_was_and_the_state_is_json():
    columns = table()
    for how in ({}, {"numbers": "standard", "max_categories": 1}):
        encoders = fit_encoders(columns, **how)
        whole = encoders.encode(columns)
        again = Encoders.from_state(json.loads(json.dumps(encoders.state())))
        assert again.features == encoders.features and again.cardinalities == encoders.cardinalities
        for i in range(10):
            row = row_of(columns, i)
            for given in (row, {name: "" if value != value else str(value) for name, value in row.items()}):
                for name, array in again.encode_row(given).items():
                    np.testing.assert_array_equal(array, whole[name][i])


def test_training_rows_alone_are_seen():
    train = np.arange(0, N, 2)
    one, other = table(), table()
    for name in ("x", "gain"):
        other[name].values[1::2] = 1e9
    other["color"].values[1::2] = -1
    other["day"].values[1::2] = np.datetime64("NaT")
    assert fit_encoders(one, train).state() == fit_encoders(other, train).state()
    assert fit_encoders(one).state() != fit_encoders(other).state()


def test_what_tells_nothing_is_left_out():
    columns = table(none=[None] * N, same=[5] * N, gaps=[1.0, np.nan] * (N // 2), kind=["a"] * N)
    encoders = fit_encoders(columns)
    assert encoders.left_out == {"none": "all missing", "same": "the same in all rows", "kind": "the same in all rows"}
    place = encoders.features.index("gaps is missing")
    np.testing.assert_array_equal(encoders.encode(columns)["numbers"][:, place], [0, 1] * (N // 2))
    with pytest.raises(UserError, match="no column tells"):
        fit_encoders(columns_of({"same": [5] * N}))


def test_infinite_numbers_are_as_the_greatest():
    x_N = np.arange(N, dtype=float)
    x_N[:2] = -np.inf, np.inf
    for how in ("quantile", "standard"):
        columns = columns_of({"x": x_N})
        z_N = fit_encoders(columns, numbers=how).encode(columns)["numbers"][:, 0]
        assert np.isfinite(z_N).all() and z_N[0] == z_N[2] == z_N.min() and z_N[1] == z_N[-1] == z_N.max()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"x": 1}, "the row has no 'gain'"),
        ({"gain": "much"}, "gain is 'much', which is no number"),
        ({"day": "someday"}, "day is 'someday', which is no date"),
    ],
)
def test_rows_that_cannot_be_read(row, said):
    columns = table()
    given = row if "x" in row else row_of(columns, 0, **row)
    with pytest.raises(UserError, match=said):
        fit_encoders(columns).encode_row(given)


@pytest.mark.parametrize(
    "entry",
    [
        {"encoder": "os", "name": "x"},
        {"encoder": "quantile", "name": "x", "knots": [2.0, 1.0], "ranks": [0.1, 0.9]},
        {"encoder": "quantile", "name": "x", "knots": [1.0, 2.0], "ranks": [0.0, 0.9]},
        {"encoder": "standard", "name": "x", "std": 0},
        {"encoder": "hashed", "name": "x", "buckets": 10**12},
        {"encoder": "names", "name": "x", "names": [1]},
        {"encoder": "names", "nam": "x"},
    ],
)
def test_a_state_from_elsewhere_is_checked(entry):
    with pytest.raises(UserError, match="cannot be read"):
        Encoders.from_state(json.dumps({"columns": [entry], "left_out": {}}))
