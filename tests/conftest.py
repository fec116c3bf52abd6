"""Eight simulated devices, a lasting compilation cache, and shapes of the models' signatures checked at run time.

Programs are compiled without the optimizations that come after XLA's own (``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` has
them): most tests compile much and compute little, and half of their time was spent there. Tests of what the compiler
makes of a program have them: see ``optimized``.
"""

import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "bigbase_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
_DECODED = tempfile.TemporaryDirectory(prefix="bigbase-tests-")
os.environ["BIGBASE_CACHE"] = _DECODED.name

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("bigbase_jax.models", "beartype.beartype")

from bigbase_jax.runtime import compilation  # noqa: E402

compilation.setup()  # the flags that users' programs are compiled with


def pytest_collection_finish() -> None:
    """What has been imported stays: collections, which tracing causes in plenty, leave it alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real data sets, or a skip where there is none."""
    folder = os.environ.get("BIGBASE_DATA")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("BIGBASE_DATA does not name a folder of real data sets")
    return pathlib.Path(folder)


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs compiled as users' are, here and in processes that the test starts."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
