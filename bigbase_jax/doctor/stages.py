"""What the doctor tries in a child process, stage by stage: ``python -P stages.py jax|disk FOLDERS``.

Each stage prints one line of JSON. The parent gives up on a stage that takes too long, and a driver that crashes takes
only this process with it. Nothing of ours is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any


def child(kind: str, folders: Mapping[str, Any]) -> None:
    """Goes through the stages and prints a line for each; the first two of JAX's must succeed for the others."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not part of the answer
    cache = folders["cache"]
    stages: dict[str, Callable[[], dict[str, Any]]]
    if kind == "jax":
        stages = {
            "import": lambda: import_jax(cache),
            "devices": start_devices,
            "collectives": exchange,
            "cache": lambda: compile_twice(cache),
        }
    else:
        stages = {
            "workdir": lambda: try_folder(folders["workdir"]),
            "cache": lambda: folder_size(cache),
            "data": lambda: {name: find_data(name, folder) for name, folder in folders["data"].items()},
        }
    for name, stage in stages.items():
        state, facts, error = "done", {}, ""
        began = time.monotonic()
        try:
            facts = {**stage(), "seconds": round(time.monotonic() - began, 3)}
        except BaseException as raised:
            state, error = "failed", f"{type(raised).__name__}: {raised}"
        print(json.dumps({"state": state, "facts": facts, "error": error}), file=out, flush=True)
        if state == "failed" and name in ("import", "devices"):
            break
    out.flush()
    os._exit(0)  # a driver that hangs when it is shut down must not undo the answers


def import_jax(cache: str) -> dict[str, Any]:
    """Imports JAX; the persistent cache must be set before the first compilation."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    loaded = [name for name in ("tensorflow", "torch") if name in sys.modules]
    return {"jax": jax.__version__, "loaded": loaded}


def start_devices() -> dict[str, Any]:
    """Starts all backends; says why CUDA or TPU did not start where JAX fell back to the CPU."""
    import jax

    devices = jax.devices()
    errors = {}
    for name in ("cuda", "tpu"):
        try:
            jax.devices(name)
        except Exception as error:
            errors[name] = str(error)
    return {
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "devices": [
            {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory": (_quietly(device.memory_stats) or {}).get("bytes_limit"),
            }
            for device in devices
        ],
        "errors": errors,
        "libraries": _cuda_libraries() if jax.default_backend() == "gpu" else {},
    }


def _cuda_libraries() -> dict[str, str]:
    """The CUDA libraries that are really loaded; the plugin's own module tells, which JAX does not publish."""
    found: dict[str, str] = {}
    for major in (13, 12):
        with contextlib.suppress(Exception):
            versions = importlib.import_module(f"jax_cuda{major}_plugin._versions")
            for name in ("cuda_runtime", "cudnn", "cublas", "cufft", "cusparse"):
                value = _quietly(getattr(versions, f"{name}_get_version"))
                if value is not None:
                    found[name] = str(value)
            break
    return found


def _quietly(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:
        return None


def exchange(elements: int | None = None, repeats: int = 5) -> dict[str, Any]:
    """psum and ppermute over all local devices, with numbers whose right answers are exact.

    D devices, N numbers on each: ``x[d, n] = d + 1 + n % 7``. Bandwidths are in bytes per second and device: what a
    ring moves, 2 (D - 1) / D of the array for psum, the whole array for ppermute.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()
    D, N = len(devices), elements or (1 << 20 if devices[0].platform == "cpu" else 1 << 24)
    mesh = Mesh(np.array(devices), ("device",))
    spec = PartitionSpec("device")
    sharding = NamedSharding(mesh, spec)
    ring = [(d, (d + 1) % D) for d in range(D)]

    def filled(row_D: Any, scale: float) -> Any:
        return row_D[:, None] + scale * (jnp.arange(N) % 7)[None].astype(jnp.float32)

    def right(kind: str) -> Any:
        rows = {"psum": np.full(D, D * (D + 1) / 2), "ppermute": np.roll(np.arange(D) + 1, 1)}[kind]
        return filled(jnp.asarray(rows, jnp.float32), D if kind == "psum" else 1)

    operations = {
        "psum": lambda x: jax.lax.psum(x, "device"),
        "ppermute": lambda x: jax.lax.ppermute(x, "device", ring),
    }
    x_DN = jax.jit(lambda: filled(jnp.arange(D, dtype=jnp.float32) + 1, 1), out_shardings=sharding)()
    facts: dict[str, Any] = {"count": D, "bytes": 4 * N}
    for kind, operation in operations.items():
        step = jax.jit(jax.shard_map(operation, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        expected_DN = jax.jit(lambda kind=kind: right(kind), out_shardings=sharding)()
        y_DN = jax.block_until_ready(step(x_DN))
        worst_D = np.asarray(jax.jit(lambda y, e: jnp.abs(y - e).max(1), out_shardings=sharding)(y_DN, expected_DN))
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(step(x_DN))
            times.append(time.perf_counter() - began)
        moved = 4 * N * (2 * (D - 1) / D if kind == "psum" else 1)
        wrong = [d for d in range(D) if worst_D[d] != 0]  # NaN too
        facts[kind] = {"wrong": wrong, "seconds": min(times), "bytes_per_second": moved / min(times) if D > 1 else None}
    return facts


def compile_twice(cache: str) -> dict[str, Any]:
    """Compiles one program, forgets it, compiles it again: the second must come from the cache's folder."""
    import jax
    import jax.numpy as jnp

    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def doctor_program(x: Any) -> Any:
        return jnp.sin(x @ x).sum()

    seconds, hits = [], []
    for _ in range(2):
        jax.clear_caches()
        events.clear()
        began = time.perf_counter()
        jax.jit(doctor_program).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
        seconds.append(time.perf_counter() - began)
        hits.append("/jax/compilation_cache/cache_hits" in events)
    return {
        "folder": cache,
        "enabled": bool(getattr(jax.config, "jax_enable_compilation_cache", True)),
        "hits": hits,
        "compile_seconds": seconds,
    }


def try_folder(folder: str, megabytes: int = 64) -> dict[str, Any]:
    """Writes and syncs a nameless file, which vanishes even if this process is killed, in ever larger pieces, for two
    seconds at most; a folder that is not there yet is judged by the nearest one that is."""
    path = pathlib.Path(folder).expanduser().absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    facts: dict[str, Any] = {"folder": folder, "nearest": os.path.realpath(nearest), "exists": path.exists()}
    facts["versions"] = _lineage(path)
    if not nearest.is_dir():
        return {**facts, "refused": "Not a directory"}
    facts["free"] = shutil.disk_usage(nearest).free
    if hasattr(os, "statvfs") and os.statvfs(nearest).f_files:  # 0: a file system that does not count its files
        facts["files_free"] = os.statvfs(nearest).f_favail
    block, written, size = os.urandom(1 << 20), 0, 1
    began = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=nearest, prefix=".bigbase-doctor-") as file:
            while written < megabytes and time.perf_counter() - began < 2:
                for _ in range(min(size, megabytes - written)):
                    file.write(block)
                    written += 1
                file.flush()
                os.fsync(file.fileno())
                size *= 2
    except OSError as error:
        return {**facts, "refused": os.strerror(error.errno) if error.errno else str(error)}
    return {**facts, "bytes_per_second": written * (1 << 20) / (time.perf_counter() - began)}


def _lineage(path: pathlib.Path) -> dict[str, str]:
    """The versions that the run in this folder began with."""
    try:
        return dict(json.loads((path / "lineage.json").read_text())["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def folder_size(folder: str, most: float = 5.0) -> dict[str, Any]:
    """Bytes and files below a folder, counted for some seconds; whether it, or what it goes into, is writable."""
    path = pathlib.Path(folder).expanduser().absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    size, files, began = 0, 0, time.monotonic()
    for where, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(where, name)).st_size
                files += 1
        if time.monotonic() - began > most:
            break
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {"folder": folder, "exists": path.is_dir(), "writable": writable, "size": size, "files": files}


def find_data(name: str, folder: str) -> dict[str, Any]:
    """What is in a data folder; the names only of TFDS data sets that are prepared, since others may be private."""
    path = pathlib.Path(folder)
    facts: dict[str, Any] = {"folder": folder, "exists": path.is_dir()}
    if path.is_dir():
        facts["entries"] = sum(not child.name.startswith(".") for child in path.iterdir())
        if name == "TFDS_DATA_DIR":
            found = [p.parent for deep in ("*/*", "*/*/*") for p in path.glob(f"{deep}/dataset_info.json")]
            facts["prepared"] = sorted(str(p.relative_to(path)) for p in found)
        if name == "BIGBASE_CACHE":
            facts |= {key: value for key, value in folder_size(folder).items() if key in ("size", "writable")}
    return facts


if __name__ == "__main__":
    child(sys.argv[1], json.loads(sys.argv[2]))
