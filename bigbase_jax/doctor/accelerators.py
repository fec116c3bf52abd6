"""The doctor on accelerators: whether GPU, driver, CUDA, cuDNN, TPU, libtpu and the environment fit together.

Each ``check_*`` is pure: ``Machine`` -> ``Check``s.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bigbase_jax.doctor.machine import (
    NOTE,
    OK,
    PROBLEM,
    WARNING,
    Check,
    Machine,
    Stage,
    normal,
    numbers,
    plural,
    requirements,
    violation,
)


class Cuda(NamedTuple):
    """What a CUDA major version asks for: https://docs.jax.dev/en/latest/installation.html, the same as in
    https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""

    driver: int
    capability: tuple[int, int]
    cudnn: str


CUDA = {12: Cuda(525, (5, 2), ">=9.8,<10"), 13: Cuda(580, (7, 5), ">=9.8,<10")}
TPU_PCI = {
    "0x0027": "v2/v3",
    "0x0056": "TPU",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
}
"""PCI device ids under Google's vendor id; its network card has that vendor too (jax/_src/hardware_utils.py)."""


# ---------------------------------------------------------------------------------------------------- known complaints

_KNOWN: tuple[tuple[str, str, str], ...] = (
    (r"Unknown flags? in XLA_FLAGS:?\s*(\S*)", "XLA does not know the flag {0}", "unset XLA_FLAGS"),
    (r"TPU is already in use by process with pid (\d+)", "the process {0} holds the TPU", "kill {0}"),
    (
        r"/dev/(?:vfio|accel)\S*\s*Device or resource busy|libtpu\S* already in use|libtpu_lockfile",
        "another process holds the TPU",
        "sudo lsof -w /dev/accel* /dev/vfio/*  # then: kill PID; if there is none: sudo rm -f /tmp/libtpu_lockfile",
    ),
    (
        r"Outdated (\w+) installation found.*?[Mm]inimum supported: (\d+).*?Installed version: (\d+)",
        "{0} {2} is older than the {1} that JAX asks for",
        "pip install -e '.[cuda{major}]'",
    ),
    (
        r"CUDA driver version is insufficient|INSUFFICIENT_DRIVER|SYSTEM_DRIVER_MISMATCH",
        "the NVIDIA driver is too old for the CUDA libraries that are loaded",
        "pip install -e '.[cuda12]'  # or a newer driver: https://www.nvidia.com/drivers",
    ),
    (
        r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|CUDA_ERROR_OUT_OF_MEMORY|[Oo]ut of memory",
        "the device has no memory left; other processes may hold it",
        "export XLA_PYTHON_CLIENT_PREALLOCATE=false  # nvidia-smi lists who holds the memory",
    ),
    (
        r"CUDA_ERROR_NO_DEVICE|no CUDA-capable device|no supported devices found for platform CUDA",
        "CUDA starts but finds no device",
        "nvidia-smi -L  # must list the GPU; unset CUDA_VISIBLE_DEVICES; in a container: docker run --gpus all",
    ),
    (
        r"SYSTEM_NOT_READY|system not yet initialized",
        "the fabric manager of the NVSwitch is not running",
        "sudo systemctl restart nvidia-fabricmanager",
    ),
    (
        r"(/dev/(?:vfio|accel|nvidia)[\w/-]*)[^\n]*[Pp]ermission denied",
        "this user may not open {0}",
        "ls -l {0}  # sudo usermod -aG ITS_GROUP $USER, and log in anew; in a container: docker run --privileged",
    ),
    (r"Unable to load (cu\w+|CUDA|NCCL)", "JAX cannot load {0}", "pip install --force-reinstall -e '.[cuda{major}]'"),
    (
        r"Unknown backend:? '?(\w+)'?|Unable to initialize backend '(\w+)'",
        "JAX_PLATFORMS asks for a backend that does not start here",
        "unset JAX_PLATFORMS",
    ),
    (r"built using (\w+) instructions", "this processor lacks the {0} instructions that jaxlib needs", ""),
    (r"GLIBC(?:XX)?_[\d.]+'? not found", "this system's C library is older than jaxlib needs", ""),
    (
        r"compiled using NumPy 1|_ARRAY_API not found|numpy\.core\.multiarray failed",
        "a package was built for another NumPy",
        "pip install -e . 'numpy>=2,<3'",
    ),
    (r"No module named '([\w.]+)'", "the package {0} is missing", "pip install --force-reinstall -e ."),
    (
        r"jaxlib[^\n]*(?:requires version|newer than and)|requires jaxlib",
        "jax and jaxlib do not belong together",
        "pip install -e .",
    ),
)
"""Pattern, sentence and command for what JAX, XLA and libtpu are known to say when they do not start."""


def explain(machine: Machine, said: str) -> tuple[str, str] | None:
    """Sentence and command for a known complaint, the first of the table that matches."""
    major = max(cuda_plugins(machine), default=12)
    for pattern, sentence, fix in _KNOWN:
        found = re.search(pattern, said, re.DOTALL)
        if found:
            if pattern.startswith("Unable to load") and shadowing(machine):
                fix = "unset LD_LIBRARY_PATH"
            groups = [group or "" for group in found.groups()]
            return sentence.format(*groups), fix.format(*groups, major=major)
    return None


def complaint(machine: Machine, stage: Stage) -> tuple[str, str]:
    """What a stage that went wrong says, in one sentence, and the command that mends it where it is known."""
    last = [line.strip() for line in stage.error.splitlines() if line.strip()][:1]
    said = last[0][:300] if last else stage.state
    known = explain(machine, f"{stage.error}\n{stage.log}") if stage.state != "stuck" else None
    if known:
        return f"{known[0]} ({said})", known[1]
    if stage.state == "died":
        tail = [line.strip() for line in stage.log.splitlines() if line.strip()][-1:]
        return f"{said}{f', last words: {tail[0][:200]}' if tail else ''}", ""
    return said, ""


def check_plugins(m: Machine) -> Iterator[Check]:
    """JAX leaves out a CUDA plugin of another version than jaxlib (jaxlib/plugin_support.py), and prefers CUDA 13."""
    majors, jaxlib = cuda_plugins(m), m.version("jaxlib")
    status = PROBLEM if has_gpu(m) else WARNING
    for major in majors:
        plugin, pjrt, fix = f"jax-cuda{major}-plugin", f"jax-cuda{major}-pjrt", f"pip install -e '.[cuda{major}]'"
        for name, other in ((plugin, pjrt), (pjrt, plugin)):
            if not m.version(name):
                yield Check("plugins", status, f"{name} is missing beside {other} {m.version(other)}", fix)
        if m.version(plugin) and jaxlib and numbers(m.version(plugin)) != numbers(jaxlib):
            text = f"{plugin} {m.version(plugin)} does not fit jaxlib {jaxlib}, so JAX does not use it"
            yield Check("plugins", status, text, fix)
        for requirement in requirements(m.packages[plugin].requires if m.version(plugin) else ()):
            wrong = violation(m, requirement) if m.version(normal(requirement.name)) else ""
            if wrong:
                yield Check("plugins", status, f"{plugin} {m.version(plugin)}: {wrong}", fix)
    if len(majors) > 1:
        old = bool(m.driver) and numbers(m.driver)[0] < CUDA[13].driver
        keep, drop = (12, 13) if old else (13, 12)
        text = "the plugins of CUDA 12 and 13 are both installed: JAX takes CUDA 13, and their libraries share folders"
        remove = (
            f"pip uninstall -y jax-cuda{drop}-plugin jax-cuda{drop}-pjrt nvidia-cudnn-cu{drop} nvidia-nccl-cu{drop}"
        )
        yield Check("plugins", WARNING, text, f"{remove} && pip install --force-reinstall -e '.[cuda{keep}]'")


# ------------------------------------------------------------------------------------------------------ NVIDIA and TPU


def check_nvidia(m: Machine) -> Iterator[Check]:
    """Whether GPU, driver, CUDA plugin, cuDNN and the environment fit together."""
    majors = cuda_plugins(m)
    works = m.works_on("gpu")
    if not has_gpu(m) and not works:
        if majors:
            name = f"jax-cuda{majors[-1]}"
            text = "JAX's CUDA plugin is installed, but no NVIDIA GPU is visible"
            container = "docker run --gpus all IMAGE  # the NVIDIA Container Toolkit must be installed"
            fix = container if m.in_container else f"pip uninstall -y {name}-plugin {name}-pjrt"
            yield Check("nvidia", WARNING, text, fix)
        else:
            yield Check("nvidia", OK, "no NVIDIA GPU found")
        return
    if not works and not m.driver and not m.smi.found:
        text = "an NVIDIA card is on the PCI bus, but no NVIDIA driver is loaded"
        yield Check("nvidia", WARNING, text, _new_driver(m))
        return
    yield from _check_smi(m)
    if m.hides("cuda", "gpu"):
        text = f"JAX_PLATFORMS={m.env['JAX_PLATFORMS']} keeps JAX from using the GPU"
        yield Check("nvidia", WARNING, text, "unset JAX_PLATFORMS")
        return
    if m.env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "none", "NoDevFiles"):
        text = f"CUDA_VISIBLE_DEVICES={m.env['CUDA_VISIBLE_DEVICES']!r} hides the GPU"
        yield Check("nvidia", WARNING, text, "unset CUDA_VISIBLE_DEVICES")
        return
    driver = (numbers(m.driver) or (0,))[0]
    capability = min((gpu.capability for gpu in m.smi.gpus if gpu.capability), default=())
    if not majors and not works:
        yield _no_plugin(m, driver, capability)
        return
    fit = _check_fit(m, max(majors, default=12), driver, capability)
    wrong = [*_check_files(m), *fit, *_check_libraries(m, majors)]
    yield from wrong
    stage = m.jax.get("devices")
    explained = any(check.status == PROBLEM for check in [*wrong, *check_plugins(m)])
    if works or explained or stage is None or stage.state != "done":
        return
    said = f"{stage.facts.get('errors', {}).get('cuda', '')}\n{stage.log}"
    text, fix = explain(m, said) or ("", f"pip install --force-reinstall -e '.[cuda{max(majors)}]'")
    reason = text or (said.strip().splitlines() or ["no reason given"])[0][:300]
    yield Check("nvidia", PROBLEM, f"an NVIDIA GPU is here, but JAX runs on the CPU: {reason}", fix)


def _check_smi(m: Machine) -> Iterator[Check]:
    error = m.smi.error
    if error:
        fix = "sudo reboot"
        if "communicate with the NVIDIA driver" in error:
            error = "the NVIDIA driver is not loaded (nvidia-smi cannot reach it)"
            fix = "sudo modprobe nvidia  # if that fails, reinstall the driver: https://www.nvidia.com/drivers"
        elif "mismatch" in error:
            error = "the driver was updated while its old kernel module is still loaded (driver/library mismatch)"
        elif "did not answer" in error:
            error += ": the driver hangs"
        yield Check("nvidia", WARNING if m.works_on("gpu") else PROBLEM, error, fix)
        return
    kinds = list(dict.fromkeys(gpu.name for gpu in m.smi.gpus))
    text = ", ".join(f"{sum(gpu.name == kind for gpu in m.smi.gpus)} x {kind}" for kind in kinds) or "a GPU"
    details = [f"driver {m.driver or 'unknown'}"]
    details += [f"CUDA up to {m.smi.cuda}"] if m.smi.cuda else []
    capabilities = sorted({".".join(map(str, gpu.capability)) for gpu in m.smi.gpus if gpu.capability})
    details += [f"compute capability {' and '.join(capabilities)}"] if capabilities else []
    stage = m.jax.get("devices")
    libraries = stage.facts.get("libraries", {}) if stage else {}
    details += [f"loaded {name} {version}" for name, version in libraries.items()]
    details += [] if m.smi.found else ["no nvidia-smi"]
    yield Check("nvidia", OK, f"{text}: {', '.join(details)}")


def _check_files(m: Machine) -> Iterator[Check]:
    """/proc tells of the driver in a container too, the device files are there only if they were handed in."""
    if m.driver and not m.smi.gpus and not m.works_on("gpu") and not m.glob("/dev/nvidia[0-9]*"):
        where = "this container was started without the GPU" if m.in_container else "there is no /dev/nvidia0"
        fix = "docker run --gpus all IMAGE" if m.in_container else "sudo nvidia-modprobe -c 0 -u"
        yield Check("nvidia", PROBLEM, f"the driver {m.driver} is loaded, but {where}", fix)


def _no_plugin(m: Machine, driver: int, capability: tuple[int, ...]) -> Check:
    if driver and driver < CUDA[12].driver:
        text = f"an NVIDIA GPU is here, but CUDA 12 needs driver {CUDA[12].driver} or newer, not {m.driver}"
        return Check("nvidia", PROBLEM, text, f"{_new_driver(m)}  # then: pip install -e '.[cuda12]'")
    newer = driver >= CUDA[13].driver and (not capability or capability >= CUDA[13].capability)
    choice = "; the driver would also do for '.[cuda13]'" if newer else ""
    text = f"an NVIDIA GPU is here, but JAX has no CUDA plugin and runs on the CPU{choice}"
    return Check("nvidia", PROBLEM, text, "pip install -e '.[cuda12]'")


def _check_fit(m: Machine, major: int, driver: int, capability: tuple[int, ...]) -> Iterator[Check]:
    """Driver and GPU against what the plugin's CUDA asks for."""
    needed, works = CUDA[major], m.works_on("gpu")
    other = f"pip uninstall -y jax-cuda{major}-plugin jax-cuda{major}-pjrt && pip install -e '.[cuda12]'"
    if driver and driver < needed.driver:
        text = f"the driver {m.driver} is older than the {needed.driver} that CUDA {major} needs"
        if works:
            yield Check("nvidia", NOTE, f"{text}; it works all the same (forward compatibility packages)")
        elif major > 12 and driver >= CUDA[12].driver:
            yield Check("nvidia", PROBLEM, f"{text}; CUDA 12 would do", other)
        else:
            yield Check("nvidia", PROBLEM, text, _new_driver(m))
    if capability and capability < needed.capability:
        wants = ".".join(map(str, needed.capability))
        has = ".".join(map(str, capability))
        text = f"a GPU of compute capability {has} is too old for CUDA {major}, which wants {wants}"
        if major > 12 and capability >= CUDA[12].capability:
            yield Check("nvidia", PROBLEM, f"{text}; CUDA 12 would do", other)
        else:
            yield Check("nvidia", PROBLEM, f"{text}; JAX cannot use it", "export JAX_PLATFORMS=cpu")
    compiler = m.version("nvidia-cuda-nvcc-cu12") if major == 12 else m.version("nvidia-cuda-nvcc")
    if m.smi.cuda and compiler and numbers(m.smi.cuda)[:2] < numbers(compiler)[:2] and driver >= needed.driver:
        text = f"the driver's CUDA {m.smi.cuda} is older than the compiler's {compiler}, so XLA compiles more slowly"
        yield Check("nvidia", NOTE, text)


def _check_libraries(m: Machine, majors: Sequence[int]) -> Iterator[Check]:
    """The CUDA libraries that pip installed, LD_LIBRARY_PATH, and the combinations that jax_plugins/cuda/__init__.py
    knows to compute wrong numbers."""
    major = max(majors, default=0)
    plugin = m.packages.get(f"jax-cuda{major}-plugin")
    wanted = list(requirements(plugin.requires, "with-cuda")) if plugin else []
    there = [r for r in wanted if m.version(normal(r.name))]
    if wanted and not there:
        text = f"none of CUDA {major}'s pip packages is installed, so JAX takes the system's CUDA and cuDNN"
        yield Check("nvidia", NOTE, f"{text} {CUDA[major].cudnn}; '.[cuda{major}]' brings them")
    else:
        broken = [text for text in (violation(m, r) for r in wanted) if text]
        if broken:
            yield Check("nvidia", PROBLEM, "; ".join(broken), f"pip install -e '.[cuda{major}]'")
    cudnn, cublas = (numbers(m.version(name)) for name in cuda_names(major)) if major else ((), ())
    package = cuda_names(major)[0] if major else ""
    if cudnn[:3] == (9, 10, 0):
        text = "cuDNN 9.10.0 broke compatibility (block-scaled types); JAX refuses it"
        yield Check("nvidia", PROBLEM, text, f"pip install -U '{package}>=9.10.1,<10'")
    elif cudnn and cudnn < (9, 10, 1) and cublas >= (12, 9) and len(m.smi.gpus) > 1:
        text = f"cuDNN {m.version(package)} with cuBLAS 12.9 or newer gives wrong products on several GPUs"
        yield Check("nvidia", PROBLEM, text, f"pip install -U '{package}>=9.10.1,<10'")
    hot = [gpu for gpu in m.smi.gpus if (10,) <= gpu.capability < (12,)]
    if hot and (12, 8) <= cublas < (13, 2):
        text = f"cuBLAS {m.version(cuda_names(major)[1])} may corrupt data on a {hot[0].name} (JAX says: before 13.2)"
        yield Check("nvidia", WARNING, text, "pip install -e '.[cuda13]' 'nvidia-cublas>=13.2'")
    both = [name for name in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13") if m.version(name)]
    if len(both) > 1 and len(majors) == 1:
        keep, drop = (f"nvidia-cudnn-cu{major}", f"nvidia-cudnn-cu{25 - major}")
        text = f"{both[0]} and {both[1]} share one folder, and whichever came last wins"
        fix = f"pip uninstall -y {drop} && pip install --force-reinstall --no-deps {keep}=={m.version(keep)}"
        yield Check("nvidia", WARNING, text, fix)
    shadows = shadowing(m) if there else {}
    if shadows:
        folder, names = next(iter(shadows.items()))
        text = f"LD_LIBRARY_PATH puts {', '.join(names[:3])} of {folder} before the CUDA libraries that pip installed"
        yield Check("nvidia", WARNING if m.works_on("gpu") else PROBLEM, text, "unset LD_LIBRARY_PATH")


def _new_driver(m: Machine) -> str:
    ubuntu = "sudo ubuntu-drivers install && sudo reboot"
    return ubuntu if re.search(r"^ID=.?ubuntu", m.text("/etc/os-release"), re.M) else "https://www.nvidia.com/drivers"


def check_tpu(m: Machine) -> Iterator[Check]:
    """Whether TPU chips and libtpu are both there and fit."""
    kinds = tpu_chips(m)
    library = m.version("libtpu") or m.version("libtpu-nightly")
    if not kinds and not m.works_on("tpu"):
        if library:
            text = f"libtpu {library} is installed on a machine without a TPU"
            yield Check("tpu", WARNING, text, "pip uninstall -y libtpu libtpu-nightly")
        else:
            yield Check("tpu", OK, "no TPU found")
        return
    chips = f"{plural(len(kinds), 'TPU chip')} ({', '.join(sorted(set(kinds)))})" if kinds else "a TPU"
    if not library and not m.env.get("TPU_LIBRARY_PATH") and not m.works_on("tpu"):
        yield Check("tpu", PROBLEM, f"{chips} without libtpu, so JAX runs on the CPU", "pip install -e '.[tpu]'")
        return
    jax = m.packages.get("jax")
    wrong = [violation(m, r) for r in requirements(jax.requires if jax else (), "tpu") if normal(r.name) == "libtpu"]
    for text in filter(None, wrong):
        yield Check("tpu", PROBLEM, text, "pip install -e '.[tpu]'")
    if m.works_on("tpu"):
        yield Check("tpu", OK, f"{chips}, libtpu {library or 'of TPU_LIBRARY_PATH'}")
    elif m.hides("tpu"):
        text = f"JAX_PLATFORMS={m.env['JAX_PLATFORMS']} keeps JAX from using {chips}"
        yield Check("tpu", WARNING, text, "unset JAX_PLATFORMS")
    elif (stage := m.jax.get("devices")) and stage.state == "done":
        said = f"{stage.facts.get('errors', {}).get('tpu', '')}\n{stage.log}"
        text, fix = explain(m, said) or ((said.strip().splitlines() or ["no reason given"])[0][:300], "")
        yield Check("tpu", PROBLEM, f"{chips}, but JAX runs on the CPU: {text}", fix or "pip install -e '.[tpu]'")
    pages = m.text("/sys/kernel/mm/transparent_hugepage/enabled")
    if {"v5e", "v6e", "7x"} & set(kinds) and pages and "[always]" not in pages:
        text = "transparent huge pages are off, so the TPU starts and stops slowly"
        yield Check("tpu", NOTE, text, 'sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"')


# ------------------------------------------------------------------------------------------------------------- helpers


def has_gpu(m: Machine) -> bool:
    """Whether an NVIDIA GPU or its driver is there, whatever JAX thinks of it."""
    return bool(m.smi.gpus or m.driver or m.nvidia_cards or m.glob("/dev/nvidia0") or "mismatch" in m.smi.error)


def cuda_plugins(m: Machine) -> list[int]:
    """The CUDA majors of the installed JAX plugins, ascending."""
    return [n for n in sorted(CUDA) if m.version(f"jax-cuda{n}-plugin") or m.version(f"jax-cuda{n}-pjrt")]


def cuda_names(major: int) -> tuple[str, str]:
    """The pip packages of cuDNN and cuBLAS."""
    return f"nvidia-cudnn-cu{major}", "nvidia-cublas-cu12" if major == 12 else "nvidia-cublas"


def shadowing(m: Machine) -> dict[str, list[str]]:
    """Folders of LD_LIBRARY_PATH outside of pip's packages that hold CUDA libraries; the driver's own do not count."""
    pattern = re.compile(r"^lib(cudart|cudnn\w*|cublas\w*|cusparse|cusolver|cufft|cupti|nccl|nvJitLink|nvrtc)\.so")
    found = {}
    for folder in m.env.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and "site-packages" not in folder:
            names = sorted(
                {name.partition(".so")[0] for name in _names(m.root / folder.lstrip("/")) if pattern.match(name)}
            )
            if names:
                found[folder] = names
    return found


def tpu_chips(m: Machine) -> list[str]:
    """The kind of each TPU chip: on the PCI bus, or, where a container hides that, by its device files."""
    chips = []
    for vendor in m.glob("/sys/bus/pci/devices/*/vendor"):
        if m.text(vendor) == "0x1ae0":
            chips.append(TPU_PCI.get(m.text(vendor.removesuffix("vendor") + "device"), ""))
    chips = [kind for kind in chips if kind]
    on_tpu_vm = any(name in m.env for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_CHIPS_PER_HOST_BOUNDS"))
    files = m.glob("/dev/accel[0-9]*") or (m.glob("/dev/vfio/[0-9]*") if on_tpu_vm else [])  # vfio serves others too
    return chips or ["TPU" for _ in files]


def _names(folder: pathlib.Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
