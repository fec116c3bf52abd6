"""What the doctor tries in a child process: ``python -P stages.py FOLDERS STAGE...``.

Each stage prints one line of JSON. The parent gives up on a child that takes too long, and a driver that crashes takes
only this process with it. Nothing of ours is imported.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any


def import_jax(folders: Mapping[str, str]) -> dict[str, Any]:
    """Imports JAX; the persistent cache must be set before the first compilation."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folders["JAX_COMPILATION_CACHE_DIR"])
    return {"jax": jax.__version__}


def start_devices(_: Mapping[str, str]) -> dict[str, Any]:
    """Starts all backends; says why CUDA or TPU did not start where JAX fell back to the CPU."""
    import jax

    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    ours = not os.environ.get(name)
    if ours:
        os.environ[name] = "false"  # others may need the GPU's memory meanwhile
    found: dict[str, Any] = {
        "kinds": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }
    for platform in ("cuda", "tpu"):
        try:
            jax.devices(platform)
        except Exception as error:
            found[platform] = str(error)
    if ours:
        del os.environ[name]  # it is no setting of this machine
    return found


def exchange(_: Mapping[str, str]) -> dict[str, Any]:
    """psum and ppermute over all local devices, with numbers whose right answers are exact.

    D devices, N numbers on each: ``x[d, n] = d + 1 + n % 7``.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    D, N = jax.local_device_count(), 1 << 18
    mesh, spec = Mesh(np.array(jax.local_devices()), ("device",)), PartitionSpec("device")
    x_DN = (np.arange(D)[:, None] + 1 + np.arange(N)[None] % 7).astype(np.float32)
    right = {"psum": np.broadcast_to(x_DN.sum(0), x_DN.shape), "ppermute": np.roll(x_DN, 1, axis=0)}

    def both(x: Any) -> Any:
        ring = [(d, (d + 1) % D) for d in range(D)]
        return {"psum": jax.lax.psum(x, "device"), "ppermute": jax.lax.ppermute(x, "device", ring)}

    step = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    found = jax.device_get(step(jax.device_put(x_DN, NamedSharding(mesh, spec))))
    wrong = {kind: np.flatnonzero((y_DN != right[kind]).any(1)).tolist() for kind, y_DN in found.items()}
    return {"wrong": {kind: on for kind, on in wrong.items() if on}}


def step_twice(_: Mapping[str, str]) -> dict[str, Any]:
    """The gradient of a small convolution, which needs the libraries that training needs; compiled, forgotten and
    compiled again: the second program must come from the cache's folder."""
    import jax
    import jax.numpy as jnp

    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def doctor_program(kernel: Any, x: Any) -> Any:
        return jnp.mean(jax.nn.relu(jax.lax.conv(x, kernel, (1, 1), "SAME")) ** 2)

    for _again in range(2):
        jax.clear_caches()
        events.clear()
        grads = jax.jit(jax.grad(doctor_program))(jnp.full((8, 4, 3, 3), 0.1), jnp.ones((2, 4, 8, 8)))
    return {"finite": bool(jnp.isfinite(grads).all()), "kept": "/jax/compilation_cache/cache_hits" in events}


def environment(_: Mapping[str, str]) -> dict[str, Any]:
    """What JAX wants to see in a bug report: versions, devices, settings, ``nvidia-smi``."""
    import jax

    return {"text": jax.print_environment_info(return_string=True)}


def use_host(folders: Mapping[str, str], megabytes: int = 16) -> dict[str, Any]:
    """Bytes free in each folder, or why nothing can be written there; bytes per second into ``workdir``; limits.

    The file that is written has no name, so that it vanishes even if this process is killed. A folder that is not there
    yet is judged by the nearest one that is."""
    found: dict[str, Any] = {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "folders": {}}
    if os.path.isdir("/dev/shm"):
        found["shared"] = shutil.disk_usage("/dev/shm").total
    for name, folder in folders.items():
        path = pathlib.Path(folder).expanduser().absolute()
        path = next(p for p in (path, *path.parents) if p.exists())
        size, began = (megabytes << 20 if name == "workdir" else 1), time.perf_counter()
        try:
            with tempfile.TemporaryFile(dir=path, prefix=".bigbase-doctor-") as file:
                file.write(os.urandom(size))
                file.flush()
                os.fsync(file.fileno())
            facts: dict[str, Any] = {"free": shutil.disk_usage(path).free, "rate": size / (time.perf_counter() - began)}
        except OSError as error:
            facts = {"refused": error.strerror or str(error)}
        found["folders"][name] = {"folder": folder, **facts}
    return found


STAGES = {"import": import_jax, "devices": start_devices, "collectives": exchange, "step": step_twice}
STAGES |= {"environment": environment, "host": use_host}

if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not part of the answer
    for stage in sys.argv[2:]:
        try:
            facts = STAGES[stage](json.loads(sys.argv[1]))
        except BaseException as raised:
            facts = {"error": f"{type(raised).__name__}: {raised}"}
        print(json.dumps({stage: facts}), file=out, flush=True)
        if "error" in facts and stage in ("import", "devices"):
            break
    os._exit(0)  # a driver that hangs when it is shut down must not undo the answers
