"""The registry: what it says, what it refuses, and that neither a kill, a full disk nor others at once spoil it."""

import errno
import json
import os
import pathlib
import shutil
import sqlite3

import pytest
import sqlalchemy as sa
from forks import shared

from bigbase_jax.core import UserError
from bigbase_jax.ops import card
from bigbase_jax.ops import registry as module
from bigbase_jax.ops.registry import Registry

EARLIER = pathlib.Path(__file__).parents[1] / "earlier" / "pictures"


def make_run(folder, accuracy=0.9):
    shutil.copytree(EARLIER, folder)
    (folder / "eval-test.json").write_text(json.dumps({"step": 3, "split": "test", "accuracy": accuracy, "loss": 0.3}))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def registry(tmp_path):
    return Registry.open(tmp_path / "registry", create=True)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def artefacts(registry):
    home = registry.folder / module.ARTEFACTS
    return sorted(str(p.relative_to(home)) for p in home.glob("*/*"))


# ------------------------------------------------------------------------------------------------------ what it does


def test_a_version_is_the_whole_run_and_an_alias_goes_forth_and_back(registry, run, tmp_path):
    for accuracy in (0.8, 0.9, 0.95):
        registry.push("catdog", make_run(tmp_path / str(accuracy), accuracy), f"it has {accuracy}")
    found = registry.resolve("catdog:2")
    assert files(found.folder) == files(tmp_path / "0.9") and found.card["metrics"]["test"]["accuracy"] == 0.9
    assert found.card["data"]["fingerprint"] == "9b1cde12f974ebe2" and found.card["lineage"]["git_commit"]
    assert registry.find("catdog").version == 3
    for version in (1, 2, 3):
        seen = registry.changes()
        registry.promote(f"catdog:{version}", "production", why="better")
        assert registry.changes() == seen + 1
    assert registry.find("catdog@production").version == 3
    assert [registry.rollback("catdog@production", "worse").version for _ in range(2)] == [2, 1]
    with pytest.raises(UserError, match="has meant nothing before catdog:1"):
        registry.rollback("catdog@production", "worse")
    registry.promote("catdog:3", "production", why="mended")
    assert registry.rollback("catdog@production", "no").version == 1
    assert registry.models() == {"catdog": {"production": 1}}
    lines = registry.history("catdog")
    assert [line["id"] for line in lines] == list(range(1, 11))
    assert all(line["who"] == module.who() and line["at"] and line["why"] for line in lines)


def test_a_promotion_needs_its_conditions_and_its_proofs(registry, run):
    registry.push("catdog", run)
    about = registry.find("catdog").card
    for condition, holds in {
        "accuracy>=0.9": True,
        "accuracy>0.9": False,
        "test.loss<0.31": True,
        "loss <= 0.3": True,
        "loss<3e-1": False,
    }.items():
        assert card.holds(condition, about) == holds, condition
    for condition, said in {
        "acuracy>=1": "it has test.accuracy, test.loss",
        "accuracy": "no condition such as",
    }.items():
        with pytest.raises(UserError, match=said):
            card.holds(condition, about)
    with pytest.raises(UserError, match="catdog:1 is not promoted to production: too bad"):
        registry.promote("catdog", "production", {"too bad": False, "fine": True})
    proof = {"allow_drop": 0.5, "same_answers": 0.99, "outputs": {"logits": {"largest": 0.1, "mean": 0.0}}}
    (run / "proof.json").write_text(json.dumps(proof))
    registry.push("catdog", run)
    with pytest.raises(UserError, match=r"the proof finds 1 % worse, and 0\.5 % was allowed"):
        registry.promote("catdog", "production")
    assert registry.aliases("catdog") == {} and len(registry.history()) == 2


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        ({"missing": "there is no data."}, "compares nothing"),
        ({"outputs": {"logits": {"largest": None, "mean": 0.0}}}, "not finite"),
        ({"allow_drop": 1.0, "drop": 1.5}, r"1\.5 % worse"),
        ({"allow_drop": None, "same_answers": 0.5}, None),  # it was asked for, such as pruning
        ({"allow_drop": 0.5, "same_answers": 0.999, "drop": 0.1}, None),
    ],
)
def test_a_proof_holds_or_says_why_not(proof, said):
    why = card.fails(proof)
    assert why is None if said is None else __import__("re").search(said, why)


def test_records_may_be_in_any_database_and_no_password_is_kept(run, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    made = Registry.open(tmp_path / "registry", url, create=True)
    made.push("catdog", run)
    monkeypatch.setenv(module.STORAGE, url)
    assert Registry.open(tmp_path / "registry").resolve("catdog").version == 1
    assert not (tmp_path / "registry" / module.DATABASE).exists()
    assert not any(b"other.db" in content for content in files(tmp_path / "registry").values())
    for bad in ("nosuchdialect://u:secret@host/x", "no url"):
        with pytest.raises(UserError, match="names no database") as raised:
            Registry.open(tmp_path / "registry", bad)
        assert "secret" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------- what it refuses


def test_what_was_changed_after_the_push_is_not_served(registry, run):
    folder = registry.push("catdog", run).folder
    victim = folder / "data.json"
    before = victim.read_bytes()
    for spoil, said in (
        (lambda: victim.write_bytes(before[:-1]), "is not what was pushed"),
        (lambda: victim.write_bytes(before.replace(b"1", b"2", 1)), "is not what was pushed"),
        (victim.unlink, "is damaged"),
        (lambda: victim.symlink_to("/etc/hostname"), "outside of its folder"),
        (lambda: [victim.unlink(), os.mkfifo(victim)], "named pipe"),
        (lambda: [victim.unlink(), victim.write_bytes(before), (folder / "more").touch()], "was not there"),
    ):
        spoil()
        with pytest.raises(UserError, match=said):
            registry.resolve("catdog:1")
    (folder / "more").unlink()
    assert registry.resolve("catdog:1").version == 1
    shutil.move(folder, folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    shutil.copytree(folder.with_name("elsewhere"), registry.folder.parent / "outside")
    folder.unlink()
    folder.symlink_to(registry.folder.parent / "outside")
    with pytest.raises(UserError, match="outside of its folder"):
        registry.resolve("catdog:1")


def test_what_is_no_model_is_not_pushed(registry, run, tmp_path):
    (tmp_path / "empty").mkdir()
    unevaluated = shutil.copytree(EARLIER, tmp_path / "unevaluated")
    untrained = make_run(tmp_path / "untrained")
    shutil.rmtree(untrained / "checkpoints")
    leads_out = make_run(tmp_path / "leads_out")
    (leads_out / "hosts").symlink_to("/etc/hosts")
    folder_out = make_run(tmp_path / "folder_out")
    (folder_out / "etc").symlink_to("/etc")
    for folder, said in (
        (tmp_path / "nothing", "not a run folder"),
        (tmp_path / "empty", "not a run folder"),
        (unevaluated, "was not evaluated"),
        (untrained, "has no checkpoint"),
        (leads_out, "outside of its folder"),
        (folder_out, "link to a folder"),
    ):
        with pytest.raises(UserError, match=said):
            registry.push("catdog", folder)
    for name in ("../up", "", ".hidden", "a/b", "x" * 65, "a b"):
        with pytest.raises(UserError, match="is no name of a model"):
            registry.push(name, run)
    assert artefacts(registry) == [] and registry.changes() == 0


def test_the_nearest_name_is_told(registry, run):
    registry.push("catdog", run)
    registry.promote("catdog", "production")
    for spec, said in {
        "catdgo": "no model 'catdgo'. Did you mean 'catdog'?",
        "catdog@prodution": "no alias 'prodution'. Did you mean 'production'?",
        "catdog:7": "has no version 7; it has 1.",
        "catdog@": "is none of",
        "catdog:x": "is none of",
    }.items():
        with pytest.raises(UserError) as raised:
            registry.resolve(spec)
        assert said in str(raised.value)


def test_a_damaged_or_foreign_folder_is_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match="holds no registry"):
        Registry.open(tmp_path)
    with pytest.raises(UserError, match="is not empty and holds no registry"):
        Registry.open(run, create=True)
    for name, make in {
        "text": lambda path: path.write_text("this is no database" * 100),
        "other": lambda path: sqlite3.connect(path).execute("CREATE TABLE versions (x)").connection.commit(),
        "empty": lambda path: path.touch(),
    }.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / module.DATABASE)
        with pytest.raises(UserError, match="cannot open the registry|is no registry's"):
            Registry.open(tmp_path / name)
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push("catdog", run)
    for column, value in (("card", "{"), ("card", "{}"), ("files", "[]"), ("model", "../../catdog")):
        with sqlite3.connect(registry.folder / module.DATABASE) as db:
            (before,) = db.execute(f"SELECT {column} FROM versions").fetchone()
            db.execute(f"UPDATE versions SET {column} = ?", (value,))
        with pytest.raises(UserError, match="is damaged|has no model"):
            registry.find("catdog")
        with sqlite3.connect(registry.folder / module.DATABASE) as db:
            db.execute(f"UPDATE versions SET {column} = ?", (before,))
    assert registry.resolve("catdog")


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_disk_that_is_full_leaves_nothing(registry, run, monkeypatch):
    copied, left = module._copied, 5

    def full(*args):
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copied(*args)

    monkeypatch.setattr(module, "_copied", full)
    with pytest.raises(UserError, match="No space left on device; nothing was pushed"):
        registry.push("catdog", run)
    monkeypatch.undo()
    assert artefacts(registry) == [] and registry.changes() == 0

    @sa.event.listens_for(registry._engine, "commit")
    def refuse(_):
        raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))

    with pytest.raises(UserError, match="database or disk is full"):
        registry.push("catdog", run)
    sa.event.remove(registry._engine, "commit", refuse)
    assert artefacts(registry) == [] and registry.changes() == 0
    assert registry.push("catdog", run).version == 1


KILLED = """
import os, pathlib, random, signal, sys, time, traceback
from bigbase_jax.ops import registry as module
from bigbase_jax.runtime import whole

folder, run, lines = pathlib.Path(sys.argv[1]), sys.argv[2], {module.__file__, whole.__file__}

def push_until(line):
    left = line
    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in lines:
            return None
        left -= event == "line"
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace if line else None)
    while True:
        module.Registry.open(folder, create=True).push("catdog", run)
        if line:
            os._exit(0)

def sound():
    if not (folder / module.DATABASE).exists():
        return 0
    registry = module.Registry.open(folder, create=True)
    history = [change["version"] for change in registry.history()]
    assert history == list(range(1, len(history) + 1)), history
    for number in history[-2:]:
        registry.resolve(f"catdog:{number}")
    names = {path.name for path in (folder / module.ARTEFACTS).glob("catdog/*")}
    assert {str(number) for number in history} <= names
    assert len(names) <= len(history) + 2, names  # what one kill leaves is gone after the next push
    return len(history)

def started(line):
    process = os.fork()
    if not process:
        try:
            push_until(line)
        finally:
            traceback.print_exc()
            os._exit(1)
    return process

line, kills, step = 1, 0, int(sys.argv[3])
while True:
    status = os.waitpid(started(line), 0)[1]
    sound()
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    line, kills = line + step, kills + 1
seed = random.Random(0)
for _ in range(int(sys.argv[4])):
    process = started(0)
    time.sleep(seed.uniform(0, 0.08))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    sound()
    kills += 1
registry = module.Registry.open(folder, create=True)
last = registry.push("catdog", run)
names = {path.name for path in (folder / module.ARTEFACTS).glob("catdog/*")}
assert names == {str(number) for number in range(1, last.version + 1)}, names
print(kills, last.version)
"""


def test_a_kill_at_any_line_and_at_any_moment_spoils_nothing(run, tmp_path):
    done = shared().run(str(tmp_path / "registry"), str(run), "13", "8", code=KILLED)
    assert done.status == 0, done.err
    assert int(done.out.split()[0]) > 30


PUSHERS = """
import os, sys
from bigbase_jax.ops.registry import Registry
Registry.open(sys.argv[1], create=True)
children = []
for number in range(4):
    children.append(os.fork())
    if not children[-1]:
        try:
            registry = Registry.open(sys.argv[1])
            for _ in range(4):
                version = registry.push("catdog", sys.argv[2], str(number))
                registry.promote(str(version), "production", why=str(number))
            os._exit(0)
        finally:
            os._exit(1)
assert not any([os.waitpid(child, 0)[1] for child in children])
"""


def test_pushers_at_once_get_a_number_each(run, tmp_path):
    done = shared().run(str(tmp_path / "registry"), str(run), code=PUSHERS)
    assert done.status == 0, done.err
    registry = Registry.open(tmp_path / "registry")
    assert registry.versions("catdog") == list(range(1, 17))
    lines = registry.history()
    assert [line["id"] for line in lines] == list(range(1, 33))
    assert registry.aliases("catdog")["production"] == [x["version"] for x in lines if x["action"] == "promote"][-1]
    assert all(registry.resolve(f"catdog:{number}") for number in range(1, 17))
    assert artefacts(registry) == sorted(f"catdog/{number}" for number in range(1, 17))


def test_the_command(run, tmp_path):
    def launch(*words, status=0):
        done = shared().run("--mode=registry", f"--registry={tmp_path / 'registry'}", *words)
        assert done.status == status, done.err
        return json.loads(done.out.splitlines()[-1]) if not status else done.err

    assert launch("--do=push", "--model=catdog", f"--workdir={run}")["pushed"] == "catdog:1"
    assert "needs --why" in launch("--do=promote", "--model=catdog", "--alias=production", status=2)
    promote = ("--do=promote", "--model=catdog", "--alias=production", "--why=the first")
    assert "does not have accuracy>=0.98" in launch(*promote, "--require=accuracy>=0.98", status=2)
    assert launch(*promote, "--require=accuracy>=0.9", "--require=loss<1")["aliases"] == {"production": 1}
    shown = launch("--do=show", "--model=catdog@production")
    assert shown["version"] == "catdog:1" and shown["history"][-1]["why"] == "the first"
    assert launch("--do=compare", "--model=catdog:1", "--model=catdog@production")["same_data"]
