"""``--forget``: takes documents out of what was cleaned, by id, and says who has trained on them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from bigbase_jax.clean import card
from bigbase_jax.clean.read import SPLITS, key_of
from bigbase_jax.core import UserError
from bigbase_jax.data.card import leaves
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.untrusted import read_object
from bigbase_jax.runtime.whole import written

_MASK = (1 << 62) - 1


def keys(out: pathlib.Path) -> frozenset[int]:
    """Keys, which are hashes, of what was forgotten: it is not read again."""
    try:
        return frozenset(map(int, read_object(out / ".clean" / "forgotten.json")["keys"]))
    except FileNotFoundError:
        return frozenset()


def forget(out: pathlib.Path, given: Sequence[str], runs: pathlib.Path) -> dict[str, Any]:
    """Writes anew the files that hold these documents, the card and the page; keeps the hashes of their ids.

    Args:
      given: ids, or the paths of files with one on each line.

    Returns:
      ``forgotten``, how many documents went; ``files``, which were written anew; ``unknown``, ids that are not there;
      ``alike``, ids of those that stay and are duplicates of them; ``runs``, folders of runs that have trained on this
      output, or begun from such a run.

    Raises:
      UserError: nothing was cleaned there, or the disk refuses.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        manifest = read_object(out / ".clean" / "manifest.json")
    except FileNotFoundError as error:
        raise UserError(f"{out} is not the output of a cleaning that has ended; nothing was forgotten.") from error
    ids = [line for item in given for line in (_lines(item) if os.path.isfile(item) else [item]) if line]
    wanted = {key: name for name in ids for key in (key_of(name, split) for split in SPLITS)}
    already = keys(out)
    with written(out / ".clean" / "forgotten.json") as file:  # first: what follows can be done again
        file.write(json.dumps({"keys": sorted(already | set(wanted))}).encode())
    parts: dict[str, int] = manifest["written"]["parts"]
    shards: dict[str, set[str]] = {}
    for key, name in wanted.items():
        split = SPLITS[key >> 62]
        if split in parts:
            shards.setdefault(f"{split}-{key % parts[split]:05}-of-{parts[split]:05}.parquet", set()).add(name)
    gone: set[str] = set()
    touched: list[str] = []
    records = {record["name"]: record for record in manifest["files"]}
    for name, those in sorted(shards.items()):
        if name not in records:
            continue
        table = pq.ParquetFile(out / name).read()
        hit = pc.is_in(table["id"], value_set=pa.array(sorted(those), table["id"].type))
        if not pc.any(hit).as_py():
            continue
        gone |= set(table.filter(hit)["id"].to_pylist())
        table = table.filter(pc.invert(hit))
        with written(out / name) as file:
            pq.write_table(table, file, compression="zstd", row_group_size=4096)
        touched.append(name)
        records[name] |= {
            "rows": table.num_rows,
            "bytes": (out / name).stat().st_size,
            "sha256": card.sha256(out / name),
        }
    for step in manifest["steps"]:
        for why, examples in step.get("examples", {}).items():
            step["examples"][why] = [e for e in examples if e[0] not in wanted]
    manifest |= {"files": list(records.values()), "forgotten": len({k & _MASK for k in already | set(wanted)})}
    manifest["identity"] = ""  # the same command would read the files anew, without these
    card.write(out, manifest)
    alike = _alike(out, wanted, parts)
    unknown = [name for name in ids if name not in gone]
    trained = _trained(out, runs)
    for run in trained:
        say(f"trained on it: {run}")
    if alike:
        say(f"the same text stays under the ids {', '.join(alike[:10])}; forget these too if it is theirs")
    return {"forgotten": len(gone), "files": touched, "unknown": unknown, "alike": alike, "runs": trained}


def _alike(out: pathlib.Path, wanted: dict[int, str], parts: dict[str, int]) -> list[str]:
    """Ids of documents that stay, of which those to be forgotten are duplicates."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = out / ".clean" / "duplicates.parquet"
    if not path.is_file():
        return []
    table = pq.read_table(path)
    hit = pc.is_in(table["key"], value_set=pa.array(sorted(wanted), table["key"].type))
    of = {key for key in table.filter(hit)["of"].to_pylist() if key not in wanted}
    found = []
    for name in sorted({f"{SPLITS[k >> 62]}-{k % parts[SPLITS[k >> 62]]:05}" for k in of if SPLITS[k >> 62] in parts}):
        for file in out.glob(f"{name}-of-*.parquet"):
            there = pq.read_table(file, columns=["id"])["id"].to_pylist()
            found += [i for i in there if key_of(i, name.partition("-")[0]) in of]
    return found


def _trained(out: pathlib.Path, runs: pathlib.Path) -> list[str]:
    """Folders of runs whose data is this output, and of those that began from one of these or were taught by it."""
    here = os.path.realpath(out)
    told: dict[str, tuple[bool, set[str]]] = {}
    for path in sorted(runs.glob("**/config.json")) if runs.is_dir() else ():
        try:
            config = read_object(path)
        except UserError:
            continue
        if "task" in config and "data" in config:
            values = [os.path.realpath(os.path.expanduser(v)) for _, v in leaves(config)]
            own = any(v == here or v.startswith(os.path.join(here, "")) for v in values)
            told[os.path.realpath(path.parent)] = own, set(values)
    found = {run for run, (own, _) in told.items() if own}
    while more := {run for run, (_, values) in told.items() if any(_within(v, found) for v in values)} - found:
        found |= more
    return sorted(os.path.relpath(run) for run in found)


def _within(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(os.path.join(folder, "")) for folder in folders)


def _lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines()
