"""The registry: numbered versions of models, names for them such as ``production``, and who changed what, when and why.

A folder: ``artefacts/MODEL/VERSION/`` is what was pushed, whole and never changed; the records are in ``registry.db``
(SQLite), or in any database that SQLAlchemy opens. Three rules let it survive a kill at any moment, and many writers:

- a transaction begins with inserting the next number into ``changes``: only one can have it, so that all changes are
  one after the other in any database, and the last number tells whoever polls whether anything is new;
- within the transaction of a push its copy, which is whole by then, gets its final name; a folder without a record was
  left by a kill, and the push that gets its number removes it;
- what an alias means follows from the lines of ``changes``, so that no second truth can disagree with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.export import manifest
from bigbase_jax.ops.card import describe
from bigbase_jax.runtime import redact, whole
from bigbase_jax.runtime.rundir import now, refuse_filled
from bigbase_jax.runtime.untrusted import open_regular

DATABASE = "registry.db"
ARTEFACTS = "artefacts"
STORAGE = "BIGBASE_REGISTRY_STORAGE"
"""Environment variable: the database's URL, which may hold a password; never kept in the folder."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SPEC = re.compile(r"([^:@]+)(?::(\d{1,9})|@([^:@]+))?")
_LEFT_OUT = re.compile(r"\.lock|\..+\.\d+\.(tmp|old)")  # of a folder that is pushed
_TRIES = 100  # to get the next number, beside others who want it
_pushing = threading.Lock()  # a process has one name for what it has not finished

_TABLES = sa.MetaData()
_VERSIONS = sa.Table(
    "versions",
    _TABLES,
    sa.Column("model", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("files", sa.Text, nullable=False),  # JSON: path -> [bytes, sha256]
    sa.Column("card", sa.Text, nullable=False),
)
_CHANGES = sa.Table(
    "changes",
    _TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("who", sa.String(200), nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("action", sa.String(16), nullable=False),  # push, promote or rollback
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("alias", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
)


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of a model.

    Attributes:
      model, version: its name and number.
      folder: the artefact.
      card: what is known of it; see ``card.describe``.
      files: path below ``folder`` -> (bytes, sha256).
    """

    model: str
    version: int
    folder: pathlib.Path
    card: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    def __str__(self) -> str:
        return f"{self.model}:{self.version}"


class Registry:
    """See the module; ``open`` makes one."""

    def __init__(self, folder: pathlib.Path, engine: sa.Engine):
        self.folder, self._engine = folder, engine

    @classmethod
    def open(cls, folder: str | os.PathLike, storage: str | None = None, create: bool = False) -> Registry:
        """
        Args:
          folder: of the artefacts; and of the records, where ``storage`` names no database.
          storage: a database's URL; None: what the environment variable ``STORAGE`` says.
          create: make it where there is none.

        Raises:
          UserError: there is no registry, or what is there is none.
        """
        path = pathlib.Path(folder).expanduser()
        storage = storage or os.environ.get(STORAGE)
        database = path / DATABASE
        there = database.is_file() if storage is None else (path / ARTEFACTS).is_dir()
        if not there and not create:
            more = "" if storage else f"; if its records are in a database, give --registry_storage or {STORAGE}"
            raise UserError(f"{path} holds no registry{more}. --mode=registry --do=push makes one.")
        try:
            if create and path.exists() and not any((path / name).exists() for name in (ARTEFACTS, DATABASE)):
                refuse_filled(path, "registry")
            (path / ARTEFACTS).mkdir(parents=True, exist_ok=True) if create else None
            url = sa.engine.make_url(storage) if storage else sa.URL.create("sqlite", database=str(database.absolute()))
            engine = sa.create_engine(url, pool_pre_ping=storage is not None)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            raise UserError(f"--registry_storage names no database that can be opened: {error}.") from error
        if url.get_backend_name() == "sqlite":
            sa.event.listen(engine, "connect", _set_up)
        found = cls(path, engine)
        with found._asked("open") as db:
            for table in _TABLES.sorted_tables if create else ():
                db.execute(sa.schema.CreateTable(table, if_not_exists=True))
            db.commit()
            missing = set(_TABLES.tables) - set(sa.inspect(engine).get_table_names())
        if missing:
            raise UserError(f"{(storage and 'the database') or database} is no registry's: it has no {min(missing)}.")
        return found

    # ------------------------------------------------------------------------------------------------- questions

    def changes(self) -> int:
        """How many changes there were: what to poll. One indexed look-up."""
        with self._asked("read") as db:
            return db.scalar(sa.select(sa.func.max(_CHANGES.c.id))) or 0

    def history(self, model: str | None = None) -> list[dict[str, Any]]:
        """Each change, first to last, of one model or of all: ``at, who, why, action, model, alias, version``."""
        query = sa.select(_CHANGES).order_by(_CHANGES.c.id)
        with self._asked("read") as db:
            return [dict(row._mapping) for row in db.execute(query if model is None else _of(query, _CHANGES, model))]

    def models(self) -> dict[str, dict[str, int]]:
        """Every model, with its aliases and the version that each means."""
        found: dict[str, dict[str, int]] = {}
        for line in self.history():
            found.setdefault(line["model"], {})
        return {model: self.aliases(model) for model in sorted(found)}

    def aliases(self, model: str) -> dict[str, int]:
        """The version that each alias of a model means."""
        lines = self.history(model)
        stacks = {name: _stack(lines, name) for name in dict.fromkeys(line["alias"] for line in lines if line["alias"])}
        return {name: stack[-1] for name, stack in stacks.items() if stack}

    def versions(self, model: str) -> list[int]:
        """The numbers of a model's versions, in order.

        Raises:
          UserError: there is no such model.
        """
        query = _of(sa.select(_VERSIONS.c.version), _VERSIONS, named(model, "model")).order_by(_VERSIONS.c.version)
        with self._asked("read") as db:
            found = list(db.scalars(query))
        if not found:
            raise UserError(f"the registry has no model {model!r}.{suggest(model, self.models(), 'model')}")
        return found

    def find(self, spec: str) -> Version:
        """The version that ``NAME:VERSION``, ``NAME@ALIAS`` or ``NAME`` (its newest) means; its files are not read.

        Raises:
          UserError: there is no such model, version or alias, or ``spec`` is none of these.
        """
        if not (parts := _SPEC.fullmatch(spec)):
            raise UserError(f"--model={spec} is none of NAME, NAME:VERSION and NAME@ALIAS.")
        model, given, alias = parts.groups()
        numbers = self.versions(model)
        if alias is not None:
            known = self.aliases(model)
            if alias not in known:
                raise UserError(f"{model} has no alias {alias!r}.{suggest(alias, known, 'alias')}")
            given = known[alias]
        number = numbers[-1] if given is None else int(given)
        with self._asked("read") as db:
            row = db.execute(_of(sa.select(_VERSIONS), _VERSIONS, model).where(_VERSIONS.c.version == number)).first()
        if row is None:
            raise UserError(f"{model} has no version {number}; it has {', '.join(map(str, numbers[-5:]))}.")
        return self._version(row)

    def resolve(self, spec: str) -> Version:
        """``find``, of which every file is there as it was pushed: sizes and sha256 are checked.

        Raises:
          UserError: see ``find``; or a file is missing, changed or too many.
        """
        version = self.find(spec)
        try:
            there = dict(_files(version.folder))
            for name in sorted({*version.files, *there}):
                if name not in version.files:
                    raise UserError(f"{there[name]} was not there when {version} was pushed; move it away.")
                with open_regular(version.folder / name, self.folder) as file:
                    if not manifest.same(file, *version.files[name]):
                        raise UserError(f"{version.folder / name} is not what was pushed as {version}; push it again.")
        except OSError as error:
            raise UserError(f"{version} is damaged: {error.filename}: {error.strerror}; push it again.") from error
        return version

    # --------------------------------------------------------------------------------------------------- changes

    def push(self, model: str, folder: str | os.PathLike, why: str = "") -> Version:
        """Copies a run or an export, whole, as the next version of a model.

        Raises:
          UserError: it is neither, a run that was not evaluated, a link leads out of it, or the disk refuses; nothing
            is left then.
        """
        source, home = pathlib.Path(folder).expanduser(), self.folder / ARTEFACTS / named(model, "model")
        describe(source)  # before much is copied
        with _pushing:
            partial = whole.partial(home / f"push-{re.sub(r'[^A-Za-z0-9]', '-', socket.gethostname())}")
            moved: pathlib.Path | None = None
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                files = {name: _copied(path, partial / name, source) for name, path in _files(source)}
                card = describe(partial) | {"source": str(source)}
                words = {"files": json.dumps(files), "card": json.dumps(card)}

                def finish(db: sa.Connection) -> int:
                    nonlocal moved
                    number = (db.scalar(_of(sa.select(sa.func.max(_VERSIONS.c.version)), _VERSIONS, model)) or 0) + 1
                    db.execute(sa.insert(_VERSIONS).values(model=model, version=number, **words))
                    shutil.rmtree(home / str(number), ignore_errors=True)  # left by a kill
                    os.rename(partial, home / str(number))
                    moved = home / str(number)
                    return number

                number = self._changed("push", model, "", why, finish)
            except BaseException as error:
                if moved is not None:  # the database could not keep its record
                    shutil.rmtree(moved, ignore_errors=True)
                if isinstance(error, OSError):
                    raise UserError(f"cannot write {home}: {error.strerror or error}; nothing was pushed.") from error
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):
                    home.rmdir()  # where it is empty
        return self.find(f"{model}:{number}")

    def promote(self, spec: str, alias: str, require: Mapping[str, bool] | None = None, why: str = "") -> Version:
        """Makes an alias mean a version.

        Args:
          require: further conditions by their text, each with whether it holds.

        Raises:
          UserError: see ``resolve``; or a condition does not hold, or a proof of the version fails.
        """
        version = self.resolve(spec)
        named(alias, "alias")
        if failed := [*version.card["failed"], *(text for text, holds in (require or {}).items() if not holds)]:
            raise UserError(f"{version} is not promoted to {alias}: {'; '.join(failed)}.")
        self._changed("promote", version.model, alias, why, lambda _: version.version)
        return version

    def rollback(self, spec: str, why: str = "") -> Version:
        """Makes ``NAME@ALIAS`` mean what it meant before its last promotion; again: before the one before.

        Raises:
          UserError: there is no such alias, or nothing before.
        """
        model, at, alias = spec.partition("@")
        if not at:
            raise UserError(f"--model={spec} names no alias to roll back; give --model={spec.partition(':')[0]}@ALIAS.")
        now = self.find(spec)

        def before(db: sa.Connection) -> int:
            lines = db.execute(_of(sa.select(_CHANGES).order_by(_CHANGES.c.id), _CHANGES, model))
            stack = _stack([dict(row._mapping) for row in lines][:-1], alias)  # the last is this one
            if len(stack) < 2:
                raise UserError(f"{spec} has meant nothing before {now}; promote another version.")
            return stack[-2]

        return self.find(f"{model}:{self._changed('rollback', model, alias, why, before)}")

    # ----------------------------------------------------------------------------------------------------- within

    def _changed(self, action: str, model: str, alias: str, why: str, decide: Callable[[sa.Connection], int]) -> int:
        """Adds a line to the changes; ``decide`` gives its version while nobody else can change anything."""
        line = {"who": who(), "why": redact.hide(why), "action": action, "model": model, "alias": alias, "version": 0}
        for _ in range(_TRIES):
            with contextlib.suppress(sa.exc.IntegrityError), self._asked("write") as db, db.begin():
                number = (db.scalar(sa.select(sa.func.max(_CHANGES.c.id))) or 0) + 1
                db.execute(sa.insert(_CHANGES).values(id=number, at=now(), **line))
                version = decide(db)
                db.execute(sa.update(_CHANGES).where(_CHANGES.c.id == number).values(version=version))
                return version
            time.sleep(0.01 * random.random())
        raise UserError(f"{self.folder} is changed by too many others at once; try again.")

    @contextlib.contextmanager
    def _asked(self, verb: str) -> Iterator[sa.Connection]:
        """A connection, whose errors are sentences; only that somebody else took a number stays what it is."""
        try:
            with self._engine.connect() as db:
                yield db
        except sa.exc.IntegrityError:
            raise
        except sa.exc.SQLAlchemyError as error:
            why = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise UserError(f"cannot {verb} the registry of {self.folder}: {why}.") from error

    def _version(self, row: sa.Row) -> Version:
        """A record; what is in it is checked, since the folder may come from anywhere."""
        try:
            files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in json.loads(row.files).items()}
            card = json.loads(row.card)
            folder = self.folder / ARTEFACTS / named(row.model, "model") / str(int(row.version))
            if not isinstance(card["metrics"], dict) or not isinstance(card["failed"], list):
                raise ValueError("its card has no metrics")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the registry of {self.folder} is damaged: {row.model!r:.40}: {error}.") from error
        return Version(row.model, int(row.version), folder, card, files)


def named(name: str, what: str) -> str:
    """The name, if it may be one of a model or an alias.

    Raises:
      UserError: it may not.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r:.80} is no name of a{'n' * (what[0] in 'aeiou')} {what}: letters, digits, . _ and -.")
    return name


def who() -> str:
    """Who runs this process, as ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # of a container, that no file names
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _stack(lines: list[dict[str, Any]], alias: str) -> list[int]:
    """The versions that an alias has meant, of which the last is what it means; a rollback takes one away."""
    found: list[int] = []
    for line in lines:
        if line["alias"] == alias:
            found = found[:-1] if line["action"] == "rollback" else [*found, line["version"]]
    return found


def _of(query: Any, table: sa.Table, model: str) -> Any:
    return query.where(table.c.model == model)


def _files(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """The files below a folder, in order, by their path in it.

    Raises:
      OSError: it cannot be read.
      UserError: a folder below it is a link.
    """

    def refuse(error: OSError) -> None:
        raise error

    for home, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in folders:
            if os.path.islink(path := os.path.join(home, name)):
                raise UserError(f"{path} is a link to a folder; copy what it leads to, if you trust it.")
        for name in sorted(names):
            if not _LEFT_OUT.fullmatch(name):
                path = os.path.join(home, name)
                yield os.path.relpath(path, folder), pathlib.Path(path)


def _copied(source: pathlib.Path, target: pathlib.Path, folder: pathlib.Path) -> tuple[int, str]:
    """Copies a file of a folder to disk; returns its size and sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open_regular(source, folder) as read, open(target, "wb") as write:
        while part := read.read(1 << 20):
            digest.update(part)
            size += write.write(part)
        write.flush()
        os.fsync(write.fileno())
    return size, digest.hexdigest()


def _set_up(connection: Any, _: Any) -> None:
    """Of each connection to SQLite.

    Its journal stays the one that is rolled back: readers of the other kind (WAL) write too, and a server may see the
    folder read-only. Each change takes milliseconds, which others wait for.
    """
    connection.execute("PRAGMA synchronous=EXTRA")  # also the folder, once a journal is gone
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA busy_timeout=30000")
