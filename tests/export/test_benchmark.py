"""What ``--mode=benchmark`` measures of a run and of a decoder."""

import pytest

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.export import benchmark


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "_SECONDS", 0.01)


def test_a_run_is_measured(pictures, capsys):
    found = verbs.benchmark(pictures, batch=["1", "3"])
    assert found["batch"].keys() == {"1", "3"} and found["bytes"] > 4 * 1000
    for rows, row in found["batch"].items():
        assert 0 < row["p50"] <= row["p99"] and row["rows_per_second"] == pytest.approx(int(rows) * 1e3 / row["p50"])
    assert found["memory_gb"] > 0 and found["disk_bytes"] > found["bytes"]
    assert "rows/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="--batch=1,many is not a list of numbers"):
        verbs.benchmark(pictures, batch=["1", "many"])


def test_a_decoder_writes(decoder):
    (row,) = verbs.benchmark(decoder, batch=["2"])["batch"].values()
    assert row["tokens_per_second"] > 0 and row["rows_per_second"] > 0
