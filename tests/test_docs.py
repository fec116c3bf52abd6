"""Every command and every block of Python in the READMEs and the guides runs, shrunk to seconds; every name exists; all
recipes train, evaluate and report.

A command runs as it is printed, in one folder for all pages, but for what ``tiny`` adds to a training. What it needs of
other commands (``runs/lm``) is made first, by the command of some page that makes it.
"""

import functools
import importlib.util
import io
import json
import pathlib
import re
import runpy
import shlex
import shutil
import tomllib

import numpy as np
import pytest
from forks import Done, shared
from ml_collections import ConfigDict

from bigbase_jax import cli, verbs
from bigbase_jax.core import UserError

ROOT = pathlib.Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
GUIDES = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
NOT_RUN = {  # what a command begins with -> why it is not run here
    "python -m venv": "makes an environment; .ci/run does",
    "source": "enters the environment",
    "pip install": "the network; .ci/run installs what CI needs",
    "python -m pytest": "runs these tests",
    "mkdocs": "needs the docs extra; .ci/run builds the pages",
    "curl": "asks a server; tests/serve",
    "bash experiments/gpu_check/run.sh": "needs a GPU",
}
NOT_HERE = {  # what stands in a command of launch.py -> why it is checked and not run
    "--spawn=": "starts processes that each import everything; tests/test_distributed.py",
    "--coordinator=": "needs two hosts; tests/test_distributed.py",
    "--mode=serve": "runs until a signal ends it; tests/serve/test_serve_command.py",
    "--topology=v5e": "needs the TPU compiler; tests/test_plan.py",
    "--engine=ray": "needs Ray; experiments/clean",
    "data=tfds": "needs a download; tests/data",
}
SHRUNK = ("--config.train.steps=2", "--config.train.log_every=1", "--config.train.eval_every=2")
TRAINING = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "clean")
MEASURED = {  # by task: what an evaluation reports, and what it keeps of each example
    "Classification": (
        {"step", "accuracy", "precision", "recall", "f1", "auc", "loss", "per_class"},
        {"probabilities", "label", "index"},
    ),
    "Captioning": ({"step", "loss", "bleu", "chrf"}, {"written", "tokens", "index"}),
    "Contrastive": ({"step", "loss", "retrieval"}, {"vector", "captions", "tokens", "index"}),
    "DenseDetection": (
        {"step", "loss", "map", "map50", "map75", "recall", "per_class"},
        {"boxes", "scores", "classes", "true_boxes", "true_classes", "true_crowd", "size", "index"},
    ),
    "SpeakerVerification": ({"step", "accuracy", "loss"}, {"vector", "label", "index"}),
    "FaceVerification": ({"step", "verification", "identification"}, {"vector", "label", "index"}),
    "CausalLanguageModel": (
        {"step", "loss", "perplexity", "bits_per_byte", "tokens"},
        {"log_probability", "target", "bytes", "index"},
    ),
    "MaskedLanguageModel": (
        {"step", "loss", "perplexity", "masked_accuracy", "hidden_tokens"},
        {"log_probability", "target", "at", "guess", "tokens", "index"},
    ),
    "TextClassification": (
        {"step", "accuracy", "precision", "recall", "f1", "auc", "loss", "per_class"},
        {"probabilities", "label", "tokens", "index"},
    ),
    "TabularClassification": (
        {"step", "accuracy", "precision", "recall", "f1", "auc", "loss", "per_class"},
        {"probabilities", "label", "index"},
    ),
    "AudioClassification": (
        {"step", "accuracy", "precision", "recall", "f1", "auc", "loss", "per_class"},
        {"probabilities", "label", "index"},
    ),
    "Vocoding": ({"step", "loss", "convergence"}, {"mel_distance", "convergence", "index"}),
    "Tagging": (
        {"step", "loss", "accuracy", "overall_precision", "overall_recall", "overall_f1", "per_class"},
        {"tag", "tags", "tokens", "index"},
    ),
    "Forecasting": (
        {"step", "loss", "mse", "mae", "mase", "crps", "coverage", "interval_width", "per_channel"},
        {"squared_error_step", "absolute_error_channel", "observed_step", "index"},
    ),
    "NextItem": (
        {"step", "loss", "hr@10", "ndcg@10", "mrr@10", "ranking"},
        {"items", "scores", "target", "index"},
    ),
    "Recognition": (
        {"step", "loss", "wer", "cer", "insertions", "deletions", "substitutions"},
        {"path", "seconds", "reference", "index"},
    ),
    "Transcription": (
        {"step", "loss", "wer", "cer", "insertions", "deletions", "substitutions"},
        {"tokens", "count", "log_p", "no_speech", "language", "reference", "index"},
    ),
    "Synthesis": (
        {"step", "loss", "alignment", "duration_error", "pitch_error"},
        {"durations", "predicted", "phonemes", "index"},
    ),
    "Translation": (
        {"step", "loss", "accuracy", "perplexity", "bleu", "chrf"},
        {"log_probability", "correct", "target", "tokens", "reference", "index"},
    ),
}


NEW = {  # by recipe: rows that a run of it answers one by one
    "bert": ({"text": "the [MASK] statement"}, {"text": "an object is an [MASK] here"}),
    "instruct": ({"prompt": "What is 1 + 1?", "completion": "2"}, {"prompt": "What is 1 + 1?", "completion": "11"}),
    "lm": ({"text": "Names refer to objects."}, {"text": "The global statement"}),
    "clicks": (
        {"user": "user 3", "item": "item 5", "site": "site 2", "device": "device 1", "price": 1.2, "hour": 8},
        {"user": "nobody", "item": "item 9", "site": "site 4", "device": None, "price": None, "hour": 20},
    ),
    "recommend": ({"history": ["thing 1 of group 1", "thing 2 of group 2"]}, {"item": "thing 3 of group 3", "top": 3}),
    "text_classify": ({"text": "Read a file."}, {"text": "Return the square root of x, a number."}),
    "translate": ({"source": "17"}, {"source": "942"}),
    "voice": ({"text": "bad cafe"}, {"text": "egg", "speaker": "low", "rate": 1.5}),
}


# ----------------------------------------------------------------------------------------------------- what pages say


def fences(page):
    """(language, text) of each block; one without a known language could hide a command."""
    for language, _, text in re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        assert language in ("bash", "python", "text"), f"{page} has a block in {language or 'no language'}:\n{text}"
        yield language, text


def joined(text):
    return re.sub(r"\\\n\s*", "", text).splitlines()


def prose(page):
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)


def inline(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


@functools.cache
def commands(page):
    """Each command as words, in order: the lines of bash blocks, and what is a command within a sentence or a table."""
    lines = [line for language, text in fences(page) if language == "bash" for line in joined(text)]
    lines += [code for code in inline(page) if re.match(r"(python|pip|mkdocs) ", code)]
    parts = [part for line in lines for part in line.split(" && ")]
    return [words for part in parts if (words := tuple(shlex.split(part, comments=True)))]


def blocks(page):
    """Python blocks; those that show a file of the repository are run by their commands."""
    found = [text for language, text in fences(page) if language == "python"]
    for path in re.findall(r'^--8<-- "(.*)"$', "\n".join(found), re.M):
        assert (ROOT / path).is_file()
    return [text for text in found if not text.startswith("--8<--")]


# ------------------------------------------------------------------------------------------------ what commands mean


def value(words, flag, default=None):
    return next((word.partition("=")[2] for word in words if word.startswith(f"{flag}=")), default)


def launches(words):
    return words[:2] == ("python", "launch.py")


def trains(words):
    return launches(words) and value(words, "--mode") is None and "--help" not in words


def writes(words):
    """The path that a command makes for others to use, or nothing."""
    if not launches(words):
        return None
    if trains(words):
        return value(words, "--workdir") or f"runs/{cli.recipe_name(value(words, '--config'))}"
    if value(words, "--mode") == "export":
        return value(words, "--output") or f"{value(words, '--workdir')}/export/{value(words, '--to')}"
    if value(words, "--mode") == "clean":
        return re.search(r"\bout=([^,]*)", value(words, "--config")).group(1)
    return value(words, "--output")


def reads(words):
    """The paths below ``runs/`` that a command needs."""
    if not launches(words):
        return re.findall(r"runs/[\w./-]+", " ".join(words))
    named = [value(words, flag) for flag in ("--config.init_from", "--config.teacher", "--input", "--adapter")]
    named += re.findall(r"\broot=(runs/[^,]*)", value(words, "--config", ""))
    if not trains(words):
        named += [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
    return [path for path in named if path and path.startswith("runs/")]


def tiny(words):
    """A command of ``launch.py`` with a recipe shrunk to seconds."""
    shrunk = []
    for word in words:
        flag, _, given = word.partition("=")
        if flag == "--config":
            path, _, arg = given.partition(":")
            word = f"--config={path}:{','.join(['tiny', *(a for a in arg.split(',') if a not in ('', 'tiny'))])}"
        if flag not in ("--config.train.epochs", "--workdir") or not trains(words):
            shrunk.append(word)
    if trains(words):
        shrunk += [*SHRUNK, f"--workdir={writes(words)}"]
    return tuple(shrunk)


@functools.cache
def recipe(path, arg):
    return runpy.run_path(str(ROOT / path))["get_config"](arg or None)


@functools.cache
def flags():
    sources = (ROOT / "launch.py").read_text() + (ROOT / "bigbase_jax" / "cli.py").read_text()
    return {"help", *re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", sources)}


def modes():
    return set(
        re.findall(r'"(\w+)"', re.search(r"ON_A_RUN = .*\n.*\nMODES = .*", (ROOT / "launch.py").read_text()).group())
    )


def has(config, key):
    for name in key.split("."):
        if not isinstance(config, ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


def check(words):
    """That the flags, the mode, the recipe, its arguments and the keys of a command of ``launch.py`` exist."""
    said = " ".join(words)
    config = None
    if given := value(words, "--config"):
        path, _, arg = given.partition(":")
        assert (ROOT / path).is_file(), f"{said}: there is no {path}"
        config = recipe(path, arg)
    for word in words[2:]:
        flag = word.removeprefix("--").partition("=")[0]
        if flag.startswith("config."):
            assert config is not None and has(config, flag.removeprefix("config.")), f"{said}: there is no {flag}"
        else:
            assert word.startswith("--") and flag in flags(), f"{said}: there is no {word}"
    assert value(words, "--mode", "train") in modes()


class Terminal:
    """A folder in which the commands of all pages are typed, each once."""

    def __init__(self, folder):
        for name in ("launch.py", "configs", "experiments", "README.md"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
        sweep = folder / "docs" / "examples" / "sweep.py"
        assert "trials=20" in sweep.read_text()
        sweep.write_text(sweep.read_text().replace("trials=20", "trials=2"))
        self.folder, self.done = folder, {}
        self.start = functools.partial(shared().run, cwd=folder, BIGBASE_CACHE=str(folder / "cache"))

    def type(self, words) -> Done | None:
        """How it ended, now or before; nothing of what is not run here. No command is run twice."""
        said = " ".join(words)
        env = dict(word.split("=", 1) for word in words[:1] if re.match(r"[A-Z_]+=", word))
        words = words[len(env) :]
        if any(said.startswith(begin) for begin in NOT_RUN):
            return None
        if launches(words):
            check(words)
        if any(part in said for part in NOT_HERE):
            return None
        argv = tiny(words) if launches(words) else words
        if argv in self.done:
            return self.done[argv]
        self.done[argv] = None  # while it runs
        for path in reads(words):
            self.make(path)
        if launches(words):
            done = self.start(*argv[2:], script="launch.py", **env)
        elif words[:2] == ("python", "-c"):
            done = self.start(code=words[2])
        elif words[:2] == ("python", "-m"):
            done = self.start(code=f"import runpy; runpy.run_module({words[2]!r}, run_name='__main__')")
        else:
            pytest.fail(f"this test neither runs nor lists {said!r}")
        assert done.status == 0, f"{said}\nended with {done.status}:\n{done.err[-2000:]}"
        if launches(words) and "--help" not in words:
            assert json.loads(done.out.splitlines()[-1]), said
        self.done[argv] = done
        return done

    def run(self, code):
        for path in re.findall(r"\"(runs/[\w./-]+)\"", code):
            if any((writes(words) or "") == path for page in GUIDES for words in commands(page)):
                self.make(path)
        done = self.start(code=code)
        assert done.status == 0, f"{code}\n{done.err[-2000:]}"

    def make(self, path):
        """What other commands are needed for a path."""
        if (self.folder / path).exists():
            return
        made = {writes(words): words for page in reversed((READMES[0], *GUIDES)) for words in reversed(commands(page))}
        fitting = [name for name in made if name and f"{path}/".startswith(f"{name}/")]
        assert fitting, f"no page has a command that makes {path}"
        self.type(made[max(fitting, key=len)])
        assert (self.folder / path).exists(), f"{made[max(fitting, key=len)]} does not make {path}"


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    return Terminal(tmp_path_factory.mktemp("docs"))


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("page", (*READMES, *GUIDES))
def test_every_command_and_every_block_of_python_runs(page, terminal):
    for words in commands(page):
        terminal.type(words)
    for code in blocks(page):
        terminal.run(code)


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_each_recipe_trains_evaluates_and_reports(path, terminal, tmp_path):
    """By the README's own command where that names the recipe alone: it is trained once."""
    alone = ("python", "launch.py", f"--config=configs/{path.name}")
    plain = [
        words for words in commands("README.md") if words[:3] == alone and trains(words) and not value(words, "--sweep")
    ]
    words = plain[0] if plain else (*alone[:2], f"{alone[2]}:tiny", f"--workdir=runs/plain/{path.stem}")
    done, run = terminal.type(words), terminal.folder / writes(words)
    result = json.loads(done.out.splitlines()[-1])
    config = json.loads((run / "config.json").read_text())
    task, own = config["task"], config.get("evaluators", {})
    measured, kept = MEASURED[task.get("task", task)["target"].partition(":")[2]]
    split = result["split"]
    assert split == ("val" if path.stem == "instruct" else "test")  # chats seldom have more
    assert measured <= set(result) and result.get("loss", 1) > 0
    assert kept <= set(np.load(run / f"predictions-{split}.npz").files)
    assert len(done.out.splitlines()) == 1
    assert 0 <= result.get("accuracy", 0) <= 1
    of_split = {name: x for name, x in result.items() if name not in own}
    assert of_split == json.loads((run / f"eval-{split}.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "eval"} <= {row["kind"] for row in rows} or "val" not in done.err
    assert [row["step"] for row in rows if row["kind"] == "train"][-1] >= result["step"]
    for name in ("config.json", "lineage.json", "report.html", f"predictions-{split}.npz"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    if path.stem in NEW:
        new, found = tmp_path / "new.jsonl", io.StringIO()
        new.write_text("".join(json.dumps(row) + "\n" for row in (*NEW[path.stem], {"nothing": 1})))
        assert verbs.predict(str(run), str(new), out=found) == 1
        one, two, bad = map(json.loads, found.getvalue().splitlines())
        assert (one.pop("row"), two.pop("row"), set(bad)) == (1, 2, {"input", "row", "error"})
        assert one != two and one.keys() == two.keys() and "error" not in one


def test_a_detector_begins_from_the_backbone_of_a_run(terminal):
    terminal.make("runs/catdog")
    arg = "--config=configs/detect.py:tiny,backbone=runs/catdog"
    done = terminal.start(arg, *SHRUNK, "--workdir=runs/begun_detector", script="launch.py")
    assert done.status == 0, done.err[-2000:]
    assert "init_parts.backbone runs/catdog: " in done.err


def test_each_capability_has_a_command_in_the_readme():
    typed = {value(words, "--mode", "train") for words in commands("README.md") if launches(words)}
    assert typed == modes()
    recipes = {value(words, "--config", "").partition(":")[0] for words in commands("README.md")}
    classic = {f"configs/{name}.py" for name in ("catdog_cnn", "fashion_mnist")}  # others of the first
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} - classic <= recipes


def test_commands_of_recipes_and_studies_name_what_exists():
    """They need data or hours, so that they are checked and not run."""
    found = 0
    for path in [*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").glob("*/README.md")]:
        for line in re.findall(r"launch\.py (--config=configs/\S+\.py.*)", path.read_text()):
            if "$" in line.partition(" ")[0]:
                continue
            words = [word for word in re.findall(r"--[^\s`'\"]+", line) if not re.search(r"\$|\.\.\.|=$|\[|\(", word)]
            try:
                check(("python", "launch.py", *words))
            except (UserError, AssertionError) as error:
                pytest.fail(f"{path.relative_to(ROOT)}: {line}\n{error}")
            found += 1
    assert found > 40


RECIPES = (
    ("catdog", None),
    ("catdog", "data=folder,root=DIR"),
    ("lm", None),
    ("translate", None),
    ("text_classify", "adapt=lora,root=DIR"),
    ("clean", None),
    ("distil", None),
    ("clicks", "model=dcn"),
    ("recommend", "root=DIR"),
    ("recommend", "root=DIR,items=FILE,model=two_tower"),
    ("voice", "tiny"),
    ("speech", "tiny"),
    ("speakers", "tiny"),
    ("faces", "tiny"),
    ("vocoder", "tiny"),
    ("transcribe", "tiny"),
    ("detect", "tiny"),
    ("detect", "model=rt_detr,tiny"),
    ("clip", "tiny"),
    ("private", "tiny"),
    ("caption", "tiny"),
)


@pytest.mark.parametrize("page", (*READMES, *GUIDES))
def test_every_flag_key_and_path_that_a_page_names_exists(page):
    configs = [recipe(f"configs/{name}.py", arg) for name, arg in RECIPES]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / page).read_text()
    for key in re.findall(r"--config\.([a-z_.]+[a-z_])", text):
        assert any(has(config, key) for config in configs), f"{page}: no recipe has {key}"
    for code in inline(page):
        for flag in re.findall(r"^--([a-z_]+)", code):
            assert flag == "config" or flag in flags(), f"{page}: there is no --{flag}"
        for path in re.findall(r"\b(?:bigbase_jax|configs|experiments|tests|docs)/[\w./-]*\w", code):
            assert (ROOT / path).exists(), f"{page}: there is no {path}"
        for name in re.findall(r"\bbigbase_jax(?:\.\w+)+", code):
            assert importlib.util.find_spec(name), f"{page}: there is no {name}"
        if match := re.match(r"(configs/\w+\.py)(?::(\S+))?$", code):
            try:
                recipe(*match.groups())
            except UserError as error:
                assert "needs root" in str(error), f"{page}: {code}: {error}"
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert extra in extras, f"{page}: there is no extra {extra}"
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose(page)):
        target = (ROOT / page).parent / link
        assert target.exists(), f"{page} links to {link}, which is not there"


def test_the_readmes_are_short_and_say_the_same():
    for name in READMES:
        assert len((ROOT / name).read_text().splitlines()) <= 150
    assert commands(READMES[0]) == commands(READMES[1])
    links = [re.findall(r"\]\((.*?)\)", (ROOT / name).read_text()) for name in READMES]
    assert sorted(set(links[0]) - {READMES[1]}) == sorted(set(links[1]) - {READMES[0]})
    numbers = [re.findall(r"\d+\.\d+", (ROOT / name).read_text().rpartition("## ")[2]) for name in READMES]
    assert sorted(numbers[0]) == sorted(numbers[1])
