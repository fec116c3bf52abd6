"""The doctor on everything that is not an accelerator: packages, what JAX does, memory, disk, data, limits.

Each ``check_*`` is pure: ``Machine`` -> ``Check``s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from bigbase_jax.doctor.accelerators import check_nvidia, check_plugins, check_tpu, complaint, has_gpu, tpu_chips
from bigbase_jax.doctor.machine import (
    NOTE,
    OK,
    PROBLEM,
    US,
    WARNING,
    Check,
    Machine,
    Stage,
    allows,
    amount,
    closure,
    compilation_cache,
    normal,
    plural,
    requirements,
    settings,
    violation,
)

INSTALL = "pip install -e ."
MEMORY_FS = {"tmpfs", "ramfs"}
NETWORK_FS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "glusterfs", "beegfs", "wekafs", "afs"}
NETWORK_FS |= {"9p", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.juicefs", "fuse.weka"}
BUCKET_FS = {"fuse.gcsfuse", "gcsfuse", "fuse.s3fs", "s3fs", "fuse.rclone", "fuse.goofys", "fuse.mountpoint-s3"}


# --------------------------------------------------------------------------------------------------- what is installed


def check_python(m: Machine) -> Iterator[Check]:
    """Python's version against the range of our metadata."""
    text = f"Python {m.python} on {m.system}, {plural(m.cores, 'core')}"
    us = m.packages.get(normal(US))
    if us and us.python and not allows(us.python, m.python):
        yield Check("python", PROBLEM, f"{text}; {US} needs Python {us.python}", "python3.12 -m venv .venv")
    else:
        yield Check("python", OK, text)


def check_packages(m: Machine) -> Iterator[Check]:
    """Our requirements as they were installed, and theirs."""
    us = m.packages.get(normal(US))
    if us is None:
        yield Check("packages", PROBLEM, f"{US} is not installed in this Python", INSTALL)
        return
    ours = [violation(m, requirement) for requirement in requirements(us.requires)]
    broken = [text for text in ours if text]
    if broken:
        yield Check("packages", PROBLEM, "; ".join(broken), INSTALL)
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = ", ".join(f"{name} {m.version(name)}" for name in names if m.version(name))
    if not broken:
        yield Check("packages", OK, f"{US} {us.version}: {versions}")
    for name in closure(m, us.requires):
        for requirement in requirements(m.packages[name].requires):
            wrong = violation(m, requirement)
            if wrong and not any(text.startswith(f"{normal(requirement.name)} ") for text in broken):
                together = name == "jax" and normal(requirement.name) == "jaxlib"
                fix = f"pip install '{requirement.name}{requirement.specifier}'"
                yield Check("packages", PROBLEM if together else WARNING, f"{name} {m.version(name)}: {wrong}", fix)


def check_frameworks(m: Machine) -> Iterator[Check]:
    """TensorFlow and torch may be there, but nothing of ours loads them."""
    stage = m.jax.get("import")
    loaded = stage.facts.get("loaded", []) if stage else []
    if loaded:
        text = f"{' and '.join(loaded)} came in with JAX (a start-up hook or plugin loads it) and may take the GPU"
        fix = 'python -X importtime -c "import jax" 2>&1 | grep -E "tensorflow|torch"  # shows who loads it'
        yield Check("frameworks", WARNING, text, fix)
    elif m.importable:
        there = ", ".join(f"{name} {m.version(name)}".strip() for name in m.importable)
        yield Check("frameworks", OK, f"installed and not imported: {there}")
    else:
        yield Check("frameworks", OK, "neither TensorFlow nor torch is installed, and neither is needed")


# ------------------------------------------------------------------------------------------------- what JAX does here


def check_jax(m: Machine) -> Iterator[Check]:
    """Whether JAX imports and starts its devices."""
    stage = m.jax.get("import", Stage("died", error="the child process did not start"))
    if stage.state != "done":
        text, fix = complaint(m, stage)
        yield Check("jax", PROBLEM, f"JAX cannot be imported: {text}", fix or "pip install --force-reinstall -e .")
        return
    stage = m.jax.get("devices", Stage("died", error="the child process ended"))
    if stage.state == "stuck":
        if tpu_chips(m):
            why = "another process holds the TPU, or the other hosts of the slice have not started"
            fix = "sudo lsof -w /dev/accel* /dev/vfio/*  # then: kill PID; on a slice: start on all hosts"
        elif has_gpu(m):
            why, fix = "the NVIDIA driver hangs", "sudo reboot"
        else:
            why, fix = "a plugin hangs", "JAX_PLATFORMS=cpu python launch.py --mode=doctor"
        yield Check("devices", PROBLEM, f"JAX did not start its devices ({stage.error}): {why}", fix)
    elif stage.state != "done":
        text, fix = complaint(m, stage)
        if not fix and m.env.get("JAX_PLATFORMS"):  # JAX itself dies of a bare assertion here
            text, fix = f"nothing that JAX_PLATFORMS={m.env['JAX_PLATFORMS']} names is here", "unset JAX_PLATFORMS"
        fix = fix or "JAX_PLATFORMS=cpu python launch.py --mode=doctor  # whether the CPU alone works"
        yield Check("devices", PROBLEM, f"JAX does not start its devices: {text}", fix)
    else:
        kinds = list(dict.fromkeys((d["platform"], d["kind"]) for d in m.devices))
        names = [f"{sum((d['platform'], d['kind']) == kind for d in m.devices)} x {kind[1]}" for kind in kinds]
        many = f", {stage.facts['processes']} processes" if stage.facts.get("processes", 1) > 1 else ""
        took = f"started in {stage.facts.get('seconds', 0):.1f} s"
        yield Check("devices", OK, f"{', '.join(names)}, backend {stage.facts['backend']}{many}, {took}")


def check_memory(m: Machine) -> Iterator[Check]:
    """Memory of the host (or of its container) and of the devices, and how JAX takes it."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", m.text("/proc/meminfo"), re.M))
    total, free = (int(lines.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limits = [m.text(f"/sys/fs/cgroup/{name}") for name in ("memory.max", "memory/memory.limit_in_bytes")]
    limit = min([int(text) for text in limits if text.isdigit()] or [total])
    if total:
        text = f"host {amount(total)}, {amount(free)} available"
        text += f", this container may use {amount(limit)}" if 0 < limit < total else ""
        low = min(free, limit or free) < 2e9
        yield Check("memory", WARNING if low else OK, text, "ps aux --sort=-rss | head" if low else "")
    sizes = sorted({device["memory"] for device in m.devices if device.get("memory")})
    if sizes:
        yield Check("memory", OK, f"devices {' and '.join(map(amount, sizes))} each for JAX")
    if not m.smi.gpus or m.hides("cuda", "gpu"):
        return
    fraction = _fraction(m.env)
    text = f"JAX takes {fraction:.0%} of a GPU at its start" if fraction else "JAX takes GPU memory as it needs it"
    if m.env.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):
        text += " (XLA_PYTHON_CLIENT_MEM_FRACTION is now called XLA_CLIENT_MEM_FRACTION)"
    full = [i for i, gpu in enumerate(m.smi.gpus) if gpu.memory and gpu.used / gpu.memory > 1 - (fraction or 0.5)]
    if full:
        gpu = m.smi.gpus[full[0]]
        text += f", but GPU {full[0]} has {gpu.used:,} of {gpu.memory:,} MiB in use by others"
        fix = "export XLA_PYTHON_CLIENT_PREALLOCATE=false  # nvidia-smi lists who holds the memory"
        yield Check("memory", WARNING, text, fix)
    else:
        yield Check("memory", OK, text)


def check_collectives(m: Machine) -> Iterator[Check]:
    """psum and ppermute over all local devices."""
    stage = m.jax.get("collectives")
    if stage is None:
        if m.devices:
            yield Check("collectives", PROBLEM, "the devices started, but the child process ended too early")
        return
    if stage.state != "done":
        text, fix = complaint(m, stage)
        gpus = len(m.smi.gpus) > 1
        verb = "hang" if stage.state == "stuck" else "fail"
        yield Check(
            "collectives",
            PROBLEM,
            f"psum and ppermute over {plural(len(m.devices), 'device')} {verb}: {text}",
            fix or ("NCCL_DEBUG=INFO NCCL_P2P_DISABLE=1 python launch.py --mode=doctor" if gpus else ""),
        )
        return
    count = stage.facts["count"]
    wrong = {kind: stage.facts[kind]["wrong"] for kind in ("psum", "ppermute") if stage.facts[kind]["wrong"]}
    if wrong:
        text = "; ".join(
            f"{kind} gives wrong numbers on {plural(len(on), 'device')} {on}" for kind, on in wrong.items()
        )
        fix = "NCCL_P2P_DISABLE=1 python launch.py --mode=doctor" if m.works_on("gpu") else "unset XLA_FLAGS"
        yield Check("collectives", PROBLEM, text, fix)
    elif count == 1:
        yield Check("collectives", OK, "psum and ppermute are right; one device has nothing to exchange")
    else:
        rates = [
            f"{kind} {amount(stage.facts['bytes'])} in {1e3 * stage.facts[kind]['seconds']:.2g} ms"
            f" ({amount(stage.facts[kind]['bytes_per_second'])}/s per device)"
            for kind in ("psum", "ppermute")
        ]
        yield Check("collectives", OK, f"right on {count} devices: {', '.join(rates)}")


def check_cache(m: Machine) -> Iterator[Check]:
    """Whether compiled programs are kept, and found again."""
    size = m.disk.get("cache")
    facts = size.facts if size else {}
    folder = facts.get("folder") or compilation_cache(m.env)
    stage = m.jax.get("cache")
    if size and size.state == "stuck":
        text = f"the folder of compiled programs {folder} does not answer ({size.error})"
        yield Check("compile cache", PROBLEM, text, "export JAX_COMPILATION_CACHE_DIR=DIR  # on another disk")
    elif facts and not facts["writable"]:
        text = f"the folder of compiled programs {folder} is not writable, so every start compiles anew"
        yield Check("compile cache", WARNING, text, "export JAX_COMPILATION_CACHE_DIR=DIR  # a folder that is writable")
    elif stage is None:
        return
    elif stage.state != "done":
        text, fix = complaint(m, stage)
        yield Check("compile cache", PROBLEM, f"compiling a small program did not work: {text}", fix)
    elif not stage.facts["enabled"]:
        text = "compiled programs are not kept (JAX_ENABLE_COMPILATION_CACHE is off)"
        yield Check("compile cache", WARNING, text, "unset JAX_ENABLE_COMPILATION_CACHE")
    elif not stage.facts["hits"][1]:
        text = f"a program compiled a second time was not found in {folder}"
        yield Check("compile cache", WARNING, text, "export JAX_COMPILATION_CACHE_DIR=DIR  # another folder")
    else:
        first, second = stage.facts["compile_seconds"]
        where = f"{folder}, {amount(facts.get('size', 0))} in {plural(facts.get('files', 0), 'file')}"
        yield Check("compile cache", OK, f"{where}; the second compilation hit it ({first:.2f} s, then {second:.2f} s)")


# -------------------------------------------------------------------------------------------------------- disk, limits


def check_workdir(m: Machine) -> Iterator[Check]:
    """Whether a run can be written: room, speed, and what kind of file system it is."""
    stage = m.disk.get("workdir")
    elsewhere = "python launch.py --workdir=DIR  # on another disk"
    if stage is None or stage.state != "done":
        text = complaint(m, stage)[0] if stage else "the child process did not start"
        yield Check("work folder", PROBLEM, f"trying to write did not end well: {text}", elsewhere)
        return
    facts = stage.facts
    folder = facts["folder"]
    if "refused" in facts:
        if "space" in facts["refused"] or "quota" in facts["refused"].lower():
            fix = f"df -h {facts['nearest']}  # free some room, or: {elsewhere}"
        else:
            fix = elsewhere
        yield Check("work folder", PROBLEM, f"{folder} cannot be written: {facts['refused']}", fix)
        return
    kind = filesystem(m, facts["nearest"])
    rate, free = facts["bytes_per_second"], facts["free"]
    text = f"{folder}: {amount(rate)}/s written and synced, {amount(free)} free{f', {kind}' if kind else ''}"
    if free < 1e9 or facts.get("files_free") == 0:
        what = "no inode is left" if free >= 1e9 else "too little for checkpoints"
        fix = f"df -h {facts['nearest']}; df -i {facts['nearest']}  # free some room, or: {elsewhere}"
        yield Check("work folder", PROBLEM, f"{text}: {what}", fix)
    elif kind in MEMORY_FS:
        yield Check("work folder", WARNING, f"{text}: a memory file system, gone after a restart", elsewhere)
    elif kind in BUCKET_FS:
        yield Check("work folder", WARNING, f"{text}: a bucket mount, where renaming is not atomic", elsewhere)
    elif free < 5e9:
        yield Check("work folder", WARNING, f"{text}: little room", f"df -h {facts['nearest']}")
    elif rate < 20e6:
        yield Check("work folder", WARNING, f"{text}: so slow that checkpoints hold up training", elsewhere)
    elif kind in NETWORK_FS:
        yield Check("work folder", NOTE, f"{text}: a network file system")
    elif kind == "overlay":
        yield Check("work folder", NOTE, f"{text}: this container's own layer, lost with the container")
    else:
        yield Check("work folder", OK, text)
    then = {name: v for name, v in facts["versions"].items() if v and m.version(normal(name)) not in ("", v)}
    if then:
        changes = ", ".join(f"{name} {version} -> {m.version(normal(name))}" for name, version in then.items())
        yield Check("work folder", NOTE, f"the run in {folder} began with other versions: {changes}")


def check_data(m: Machine) -> Iterator[Check]:
    """The folders in which data is looked for."""
    stage = m.disk.get("data")
    if stage is None or stage.state != "done":
        if stage is not None:
            text = f"the data folders do not answer: {complaint(m, stage)[0]}"
            yield Check("data", PROBLEM, text, "unset BIGBASE_DATA BIGBASE_CACHE TFDS_DATA_DIR")
        return
    parts = []
    for name, facts in stage.facts.items():
        if not isinstance(facts, Mapping):
            continue
        if not facts["exists"]:
            if m.env.get(name) and name != "BIGBASE_CACHE":  # the cache is made when it is needed
                yield Check(
                    "data", WARNING, f"{name} names {facts['folder']}, which is not a folder", f"export {name}=DIR"
                )
        elif name == "TFDS_DATA_DIR":
            there = facts["prepared"]
            shown = f": {', '.join(there[:8])}{' ...' if len(there) > 8 else ''}" if there else ""
            parts.append(f"{plural(len(there), 'prepared TFDS data set')} in {facts['folder']}{shown}")
        elif name == "BIGBASE_CACHE":
            parts.append(f"caches in {facts['folder']}: {amount(facts['size'])}")
            if not facts["writable"]:
                text = f"decoded data cannot be kept in {facts['folder']}, which is not writable"
                yield Check("data", WARNING, text, "export BIGBASE_CACHE=DIR  # a folder that is writable")
        else:
            parts.append(f"{name} {facts['folder']}: {plural(facts['entries'], 'entry', 'entries')}")
    if "BIGBASE_DATA" not in stage.facts:
        parts.append("BIGBASE_DATA is not set")
    yield Check("data", OK, "; ".join(parts))


def check_limits(m: Machine) -> Iterator[Check]:
    """Open files, and the shared memory through which NCCL exchanges
    (https://github.com/jax-ml/jax/issues/26465)."""
    if m.open_files is not None:
        low = 0 <= m.open_files < 1024
        text = f"{m.open_files if m.open_files >= 0 else 'any number of'} files may be open at once"
        yield Check("open files", WARNING if low else OK, text, "ulimit -n 4096" if low else "")
    if m.shm is not None:
        if m.shm < 512e6:
            text = f"/dev/shm has {amount(m.shm)} (Docker's default is 64 MB); NCCL on several GPUs may need more"
            fix = "docker run --shm-size=8g IMAGE" if m.in_container else "sudo mount -o remount,size=8G /dev/shm"
            yield Check("shared memory", WARNING if len(m.smi.gpus) > 1 else NOTE, text, fix)
        else:
            yield Check("shared memory", OK, f"/dev/shm has {amount(m.shm)}")


def check_settings(m: Machine) -> Iterator[Check]:
    """Environment variables that change what JAX does."""
    found = settings(m.env)
    text = " ".join(f"{name}={value}" for name, value in found.items())
    yield Check("settings", NOTE if found else OK, text or "no environment variable changes what JAX does")


CHECKS: tuple[Callable[[Machine], Iterable[Check]], ...] = (
    check_python,
    check_packages,
    check_plugins,
    check_jax,
    check_nvidia,
    check_tpu,
    check_memory,
    check_collectives,
    check_cache,
    check_workdir,
    check_data,
    check_frameworks,
    check_limits,
    check_settings,
)


def judge(machine: Machine) -> list[Check]:
    """All checks in the order of the table; one that fails itself becomes a warning, never a traceback."""
    found: list[Check] = []
    for check in CHECKS:
        try:
            found += check(machine)
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            found.append(Check(name, WARNING, f"this check itself failed ({type(error).__name__}: {error})"))
    return found


def filesystem(m: Machine, path: str) -> str:
    """The type of the file system that holds a real path."""
    best, kind = "", ""
    for line in m.text("/proc/mounts").splitlines():
        where, kind_here = line.split(" ")[1:3]
        where = re.sub(r"\\(\d{3})", lambda found: chr(int(found.group(1), 8)), where)
        if (path == where or path.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
            best, kind = where, kind_here
    return kind


def _fraction(env: Mapping[str, str]) -> float | None:
    """The part of a GPU that JAX takes at its start; None: it takes none in advance."""
    if env.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0"):
        return None
    if env.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return None
    asked = env.get("XLA_CLIENT_MEM_FRACTION") or env.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    try:
        return float(asked)
    except ValueError:
        return 0.75
