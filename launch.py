r"""The command line: flags -> config -> one verb of the package.

python launch.py --config=configs/catdog.py                       train, evaluate, report
python launch.py --config=RECIPE --sweep=experiments/STUDY/sweep.py --workers=2    many runs, the best of them
python launch.py --mode=eval --workdir=runs/catdog                restore, evaluate
python launch.py --mode=predict --workdir=runs/catdog --input=a.jpg    or --input=new.csv --output=answers.csv
python launch.py --mode=embed --workdir=runs/bert --input=texts.csv --output=vectors.npy    or a published folder
python launch.py --mode=gallery --workdir=runs/faces --gallery=FILE --do=enrol --input=PEOPLE    who inputs may show
python launch.py --mode=generate --workdir=runs/lm --prompt="Once" --sample=temperature=0.8,top_k=50 --adapter=DIR
python launch.py --mode=report --workdir=runs/catdog
python launch.py --mode=compare --workdir=runs/a --workdir=runs/b    or a sweep's folder: what differs
python launch.py --mode=compress --workdir=runs/bert --prune=heads=0.25,mlp=0.5    a smaller run beside it
python launch.py --mode=export --workdir=runs/catdog --to=stablehlo    or --to=safetensors, which transformers loads
python launch.py --mode=benchmark --workdir=runs/catdog --batch=1,32    latency, rows a second, memory, size
python launch.py --mode=serve --workdir=runs/catdog --workdir=runs/lm --port=8000    answer requests over HTTP
python launch.py --mode=registry --registry=DIR --do=push --model=catdog --workdir=runs/catdog    versions, aliases
python launch.py --mode=monitor --workdir=runs/catdog --input=SAMPLES    drift and live accuracy; status 1 on alarm
python launch.py --mode=plan --config=configs/catdog.py --topology=v5e:4x4    or --workdir: does it fit, at what cost
python launch.py --mode=clean --config=configs/clean.py:root=DIR,out=DIR2    data before training, on Daft or Ray
python launch.py --mode=doctor                                    what is wrong with this machine

Results go to stdout, its last line being one JSON object; everything else goes to stderr. A mistake in what you asked
for is one sentence and exit status 2; an unexpected error keeps its traceback; a run stopped by a signal ends with
128 + the signal's number, one that lost another of its processes with 75, and the same command goes on with it.
"""

import json
import os
import sys

from bigbase_jax.runtime import memory, signals

if __name__ == "__main__":
    memory.start_anew()
signals.leave_on_interrupt()  # the imports take seconds
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's notes to its own developers; what fails is raised
if "--mode=doctor" in sys.argv:  # before the other imports: it also has to run where these fail
    from bigbase_jax import doctor

    sys.exit(doctor.main(sys.argv))

from absl import flags
from ml_collections import config_flags

from bigbase_jax import cli
from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.runtime import distributed

ON_A_RUN = ("eval", "predict", "embed", "generate", "report", "compress", "export", "benchmark")
ON_SEVERAL = ("compare", "serve", "registry", "monitor")
MODES = ("train", *ON_A_RUN, *ON_SEVERAL, "gallery", "plan", "clean", "doctor")
_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: configs/NAME.py[:argument,...].")
_MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
_WORKDIR = flags.DEFINE_multi_string("workdir", None, "The run folder; default: runs/ and the recipe's name.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where a cluster does not say it.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run this command; 1 is this one alone.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_LOST_AFTER = flags.DEFINE_float("lost_after", 30.0, "Seconds of silence after which a process is given up.", 3)
_SPAWN = flags.DEFINE_integer("spawn", None, "train, eval: run as so many processes on this machine's CPU, to try it.")


def main(_: list[str]) -> int:
    """Runs one verb; returns the exit status."""
    mode = _MODE.value
    if mode not in MODES:
        raise UserError(f"there is no --mode={mode}.{suggest(mode, MODES, 'mode')}")
    workdir = cli.only("workdir", _WORKDIR.value, mode) if mode not in ON_SEVERAL else ""
    if _CONFIG.value is None and (mode in ("train", "clean") or (mode == "plan" and not workdir)):
        raise UserError(f"--config is missing; try --config=configs/{'clean' if mode == 'clean' else 'catdog'}.py.")
    if mode in ON_A_RUN and not workdir:
        raise UserError(f"--mode={mode} needs --workdir: the folder of the run.")
    if mode == "train" and (sweep := cli.sweeping()):
        from bigbase_jax.sweep import command

        return command.run(_CONFIG.value, workdir=workdir, lost_after=_LOST_AFTER.value, **sweep)
    several = mode in ("train", "eval")  # the others are one process's work, on a cluster too
    if _SPAWN.value is not None and not several:
        raise UserError(f"--mode={mode} is the work of one process; leave out --spawn.")
    if _SPAWN.value is not None and (status := distributed.spawn(_SPAWN.value, _LOST_AFTER.value)) is not None:
        return status
    place = distributed.find_place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value) if several else None
    with distributed.joined(place, _LOST_AFTER.value):
        return _verb(mode, workdir)


def _verb(mode: str, workdir: str) -> int:
    from bigbase_jax import verbs  # after the flags: orbax and scikit-learn take seconds to import

    words = cli.words(mode)
    if mode == "train":
        name = cli.recipe_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        result = verbs.train(_CONFIG.value, workdir or os.path.join("runs", name), name)
    elif mode == "clean":
        result = verbs.clean(_CONFIG.value, **words)
    elif mode == "plan":
        from bigbase_jax.plan import plan

        result = plan.run(_CONFIG.value, workdir=workdir, **words)
    else:
        verb = getattr(verbs, "evaluate" if mode == "eval" else mode)
        result = verb(_WORKDIR.value or () if mode in ON_SEVERAL else workdir, **words)
    if isinstance(result, int):
        return result
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return 128 + result["signal"] if "signal" in result else int(result.get("alarm", False))


run = cli.ending(main)
if __name__ == "__main__":
    run()
