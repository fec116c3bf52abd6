"""What the doctor makes of the facts: each ``check_*`` is a pure function, ``Machine`` -> ``Check``s.

What pip, JAX and the driver say is quoted, not said again in other words; ``KNOWN`` adds what mends it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from bigbase_jax.doctor.machine import Machine

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
AGAIN = "python launch.py --mode=doctor"
ANEW = "pip install --force-reinstall -e"
HELD = "sudo lsof -w /dev/accel* /dev/vfio/*  # then: kill PID; none there: sudo rm -f /tmp/libtpu_lockfile"
NEW_DRIVER = "sudo ubuntu-drivers install && sudo reboot  # elsewhere: https://www.nvidia.com/drivers"
DRIVERS = {12: 525, 13: 580}
"""The oldest driver of a CUDA major version: https://docs.jax.dev/en/latest/installation.html."""
KNOWN = (
    (r"Unknown flags? in XLA_FLAGS", "unset XLA_FLAGS"),
    (r"TPU is already in use by process with pid (\d+)", "kill {0}"),
    (r"Device or resource busy|already in use|libtpu_lockfile", HELD),
    (r"driver version is insufficient|INSUFFICIENT_DRIVER", f"pip install -e '.[cuda12]'  # or: {NEW_DRIVER}"),
    (r"DRIVER_MISMATCH|driver/library version mismatch", "sudo reboot  # the driver was updated"),
    (r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|[Oo]ut of memory", "nvidia-smi  # which process holds the memory"),
    (r"NO_DEVICE|no CUDA-capable device", "nvidia-smi -L  # must list it; in a container: docker run --gpus all IMAGE"),
    (r"SYSTEM_NOT_READY|system not yet initialized", "sudo systemctl restart nvidia-fabricmanager"),
    (
        r"(/dev/\w[\w/-]*).*[Pp]ermission denied",
        "ls -l {0}  # sudo usermod -aG ITS_GROUP $USER; docker run --privileged",
    ),
    (r"Unable to load (?:cu\w+|CUDA|NCCL)", f"unset LD_LIBRARY_PATH  # or: {ANEW} '.[cuda12]'"),
    (r"Unknown backend|Unable to initialize backend", "unset JAX_PLATFORMS"),
)
"""What JAX, XLA and libtpu are known to say when they do not start -> the command that mends it."""
STAGES = {
    "import": ("JAX cannot be imported", f"{ANEW} ."),
    "devices": ("JAX does not start its devices", f"JAX_PLATFORMS=cpu {AGAIN}  # whether the CPU alone works"),
    "collectives": ("psum and ppermute over all devices fail", f"NCCL_DEBUG=INFO NCCL_P2P_DISABLE=1 {AGAIN}"),
    "step": ("the gradient of a small convolution cannot be computed", f"JAX_PLATFORMS=cpu {AGAIN}"),
}
"""What a stage that fails means, and the command where nothing better is known."""


class Check(NamedTuple):
    """One finding: a status, one sentence, and where it is wrong the command that mends it."""

    name: str
    status: str
    text: str
    fix: str = ""


def complaint(what: str, said: str, fix: str) -> tuple[str, str]:
    """``what``, the line that says why, and the command that mends it where it is known."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason given"]
    for pattern, known in KNOWN:
        for line in lines:
            if found := re.search(pattern, line):
                return f"{what}: {line[:300]}", known.format(*found.groups())
    return f"{what}: {' | '.join(dict.fromkeys((lines[0][:300], lines[-1][:200])))}", fix


def check_packages(m: Machine) -> Iterator[Check]:
    """What ``pip check`` says, and CUDA plugins, which JAX leaves out unless their version is that of jaxlib."""
    status, said = m.pip
    ours = re.findall(r"^(?:bigbase[-_]jax|jax\S*|flax|optax|orbax\S*) .*", said, re.M)
    if "bigbase-jax" not in m.versions:
        yield Check("packages", PROBLEM, f"bigbase_jax is not installed in {sys.executable}", "pip install -e .")
    elif status is None or "No module named pip" in said:
        yield Check("packages", NOTE, "`pip check` did not answer whether the packages fit together", "uv pip check")
    elif status == 0:
        yield Check("packages", OK, f"bigbase_jax {m.versions['bigbase-jax']}, {said}")
    else:
        text = "; ".join(ours or said.splitlines()[:3])
        yield Check("packages", PROBLEM if ours else WARNING, text, "pip install -e ." if ours else "pip check")
    for major in plugins(m):
        pair = {name: m.versions.get(name, "no") for name in (f"jax-cuda{major}-plugin", f"jax-cuda{major}-pjrt")}
        if {*pair.values()} != {m.versions.get("jaxlib")}:
            text = ", ".join(f"{name} {version}" for name, version in pair.items())
            text += f" beside jaxlib {m.versions.get('jaxlib')}: JAX does not use a plugin of another version"
            yield Check("packages", PROBLEM if has_gpu(m) else WARNING, text, f"pip install -e '.[cuda{major}]'")


def check_jax(m: Machine) -> Iterator[Check]:
    """Whether JAX imports, starts its devices, exchanges between them and computes the gradient of a step."""
    for name, (what, fix) in STAGES.items():
        stage = m.stages.get(name, {"error": "the child process ended too early"})
        error = stage.get("error")
        if error and name == "devices" and error.startswith("no answer") and (chips(m) or has_gpu(m)):
            held = "another process holds the TPU, or other hosts of the slice have not started"
            why, fix = (held, HELD) if chips(m) else ("the NVIDIA driver hangs", "sudo reboot")
            yield Check(name, PROBLEM, f"{what}: {error}: {why}", fix)
        elif error:
            if name == "devices" and m.env.get("JAX_PLATFORMS"):  # JAX itself dies with a bare assertion
                what, fix = f"{what}, JAX_PLATFORMS being {m.env['JAX_PLATFORMS']}", "unset JAX_PLATFORMS"
            yield Check(name, PROBLEM, *complaint(what, f"{error}\n{m.log}", fix))
        if error:
            return
        if name == "devices":
            kinds = stage["kinds"]
            yield Check(name, OK, ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
            if lines := m.log.strip().splitlines():
                yield Check(name, NOTE, f"JAX said: {' | '.join(line.strip()[:200] for line in lines[-3:])}")
        elif wrong := stage.get("wrong"):
            yield Check(name, PROBLEM, f"wrong numbers on devices {wrong}", fix)
        elif name == "step" and not stage["finite"]:
            yield Check(name, PROBLEM, "the gradient of a small convolution is not finite", fix)
        elif name == "step" and not stage["kept"]:
            text = "a program compiled a second time was not in the compilation cache, so every start compiles anew"
            yield Check(name, WARNING, text, "unset JAX_ENABLE_COMPILATION_CACHE; export JAX_COMPILATION_CACHE_DIR=DIR")


def plugins(m: Machine) -> list[int]:
    """The CUDA major versions for which JAX has a plugin here."""
    return [n for n in DRIVERS if f"jax-cuda{n}-plugin" in m.versions or f"jax-cuda{n}-pjrt" in m.versions]


def driver(m: Machine) -> str:
    """The version of NVIDIA's kernel module, which a container shows too."""
    found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)", m.text("proc/driver/nvidia/version"))
    return found[1] if found else ""


def has_gpu(m: Machine) -> bool:
    """Whether an NVIDIA GPU or its driver is there, whatever JAX thinks of it."""
    return bool(driver(m) or m.cards("0x10de", "0x03"))


def chips(m: Machine) -> int:
    """TPU chips on the PCI bus: Google's accelerators; its network cards are of another class."""
    return m.cards("0x1ae0", "0x12")


def check_idle(m: Machine) -> Iterator[Check]:
    """Why a GPU or TPU that is here is not used."""
    stage = m.stages.get("devices", {})
    newest, version = max(plugins(m), default=12), int((driver(m) or "0").split(".")[0])
    lacks = {"gpu": ("", ""), "tpu": ("", "")}
    if version < DRIVERS[newest]:
        older = f"pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && {ANEW} '.[cuda12]'"
        text = f"CUDA {newest} needs driver {DRIVERS[newest]} or newer, not {driver(m) or 'none'}"
        lacks["gpu"] = text, older if version >= DRIVERS[12] else NEW_DRIVER
    elif not any(m.root.glob("dev/nvidia[0-9]*")):
        lacks["gpu"] = "there is no /dev/nvidia0", "docker run --gpus all IMAGE  # no container: sudo nvidia-modprobe"
    elif not plugins(m):
        extra = "cuda13" if version >= DRIVERS[13] else "cuda12"
        lacks["gpu"] = "JAX has no CUDA plugin", f"pip install -e '.[{extra}]'"
    if "libtpu" not in m.versions and "TPU_LIBRARY_PATH" not in m.env:
        lacks["tpu"] = "libtpu is not installed", "pip install -e '.[tpu]'"
    for name, here, cuda in (("gpu", has_gpu(m), "cuda"), ("tpu", chips(m), "tpu")):
        if not here or stage.get("backend", name) == name:
            continue
        asked, (missing, fix) = m.env.get("JAX_PLATFORMS", ""), lacks[name]
        hidden = name == "gpu" and m.env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "none", "NoDevFiles")
        if hidden or (asked and not {name, cuda} & set(asked.split(","))):
            variable = "CUDA_VISIBLE_DEVICES" if hidden else "JAX_PLATFORMS"
            text = f"{variable}={m.env[variable]} keeps JAX from using the {name.upper()} that is here"
            yield Check(name, WARNING, text, f"unset {variable}")
        elif missing:
            yield Check(name, PROBLEM, f"a {name.upper()} is here, but JAX cannot use it: {missing}", fix)
        else:
            text = f"a {name.upper()} is here, but JAX runs on the CPU"
            extra = "tpu" if name == "tpu" else f"cuda{newest}"
            yield Check(name, PROBLEM, *complaint(text, f"{m.log}\n{stage.get(cuda, '')}", f"{ANEW} '.[{extra}]'"))


def check_host(m: Machine) -> Iterator[Check]:
    """Memory, of the host or of its container; the folders of runs and caches; open files; the shared memory through
    which NCCL exchanges (https://github.com/jax-ml/jax/issues/26465)."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", m.text("proc/meminfo"), re.M))
    limit = m.text("sys/fs/cgroup/memory.max")
    free = min(int(sizes.get("MemAvailable", 1 << 40)) * 1024, int(limit) if limit.isdigit() else 1 << 60)
    if free < 2e9:
        yield Check("memory", WARNING, f"{free / 1e9:.2g} GB of memory is available", "ps aux --sort=-rss | head")
    if m.stages.get("devices", {}).get("backend") == "cpu":
        yield from huge_pages(m)
    stage = m.stages.get("host", {"error": "the child process ended too early"})
    elsewhere = "python launch.py --workdir=DIR  # on another disk"
    if "error" in stage:
        text = f"the folders of runs and caches cannot be tried: {stage['error']}"
        yield Check("disk", PROBLEM, text, f"unset BIGBASE_CACHE JAX_COMPILATION_CACHE_DIR; {elsewhere}")
        return
    for name, found in stage["folders"].items():
        folder, refused, work = found["folder"], found.get("refused"), name == "workdir"
        fix = elsewhere if work else f"export {name}=DIR"
        text = f"{folder}: {found.get('rate', 0) / 1e6:.0f} MB/s, {found.get('free', 0) / 1e9:.3g} GB free"
        if refused:
            fix = f"df -h {folder}; df -i {folder}; {fix}" if "space" in refused else fix
            yield Check("disk", PROBLEM if work else WARNING, f"{folder} cannot be written: {refused}", fix)
        elif work and found["free"] < 5e9:
            yield Check("disk", WARNING if found["free"] > 1e9 else PROBLEM, f"{text}: too little for checkpoints", fix)
        elif work and found["rate"] < 20e6:
            yield Check("disk", WARNING, f"{text}: so slow that checkpoints hold up training", fix)
        elif work:
            yield Check("disk", OK, text)
    devices = m.stages.get("devices", {})
    if devices.get("backend") == "gpu" and len(devices["kinds"]) > 1 and stage.get("shared", 1e12) < 512e6:
        text = f"/dev/shm has {stage['shared'] / 1e6:.0f} MB (Docker's default is 64), which NCCL may find too small"
        fix = "docker run --shm-size=8g IMAGE  # outside of a container: sudo mount -o remount,size=8G /dev/shm"
        yield Check("memory", WARNING, text, fix)
    if 0 <= stage["open_files"] < 1024:
        yield Check("open files", WARNING, f"only {stage['open_files']} files may be open at once", "ulimit -n 4096")


def huge_pages(m: Machine) -> Iterator[Check]:
    """Whether a step's temporary arrays come in pages of 2 MiB, as ``runtime.memory`` asks for."""
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    allowed = re.findall(r"\[(\w+)\]", m.text(path))  # such as "always [madvise] never"
    said = [name for name in sorted(m.env) if name == "LD_PRELOAD" or name.startswith(("GLIBC_TUNABLES", "MALLOC_"))]
    slow = "steps on the CPU may take 1.2x as long"
    if allowed == ["never"]:
        text = f"/{path} says never: without huge pages, {slow}"
        yield Check("huge pages", NOTE, text, f"echo madvise | sudo tee /{path}")
    elif "thp:always" in m.env.get("MALLOC_CONF", "") and "jemalloc" in m.env.get("LD_PRELOAD", ""):
        yield Check("huge pages", OK, "jemalloc is asked for pages of 2 MiB by MALLOC_CONF")
    elif allowed == ["always"] or "glibc.malloc.hugetlb=1" in m.env.get("GLIBC_TUNABLES", ""):
        yield Check("huge pages", OK, "large arrays lie in pages of 2 MiB; GLIBC_TUNABLES= (empty) turns this off")
    elif allowed and said:
        text = f"{' and '.join(said)} set how memory is handed out, not in huge pages: {slow}"
        yield Check("huge pages", NOTE, text, f"unset {' '.join(said)}")


def judge(machine: Machine) -> list[Check]:
    """All checks in the order of the table; one that fails itself becomes a warning, never a traceback."""
    found: list[Check] = []
    for check in (check_packages, check_jax, check_idle, check_host):
        try:
            found += check(machine)
        except Exception as error:
            text = f"this check itself failed ({type(error).__name__}: {error})"
            found.append(Check(check.__name__.removeprefix("check_"), WARNING, text, "pip install -U -e ."))
    return found
