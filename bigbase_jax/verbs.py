"""The verbs of the command line, each on a run folder: train, evaluate, predict, embed, generate, export, report."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax import compare as comparing
from bigbase_jax import parallel, pretrained
from bigbase_jax import train as training
from bigbase_jax.build import build, suggest
from bigbase_jax.clean.command import clean as clean
from bigbase_jax.compare.runs import task_of
from bigbase_jax.compress.command import compress as compress
from bigbase_jax.core import Evaluator, UserError
from bigbase_jax.data.files import kind_of
from bigbase_jax.data.sources.image.image import SUFFIXES
from bigbase_jax.evaluate import Split, check_splits, evaluators
from bigbase_jax.export.benchmark import benchmark as benchmark
from bigbase_jax.export.command import export as export
from bigbase_jax.inference import answers, faces, generation, inputs
from bigbase_jax.inference.gallery import Identifier
from bigbase_jax.inference.gallery import gallery as gallery
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pages import comparison as comparison_page
from bigbase_jax.pages import report as report_page
from bigbase_jax.pages.figures import Pictures
from bigbase_jax.runtime import compilation, distributed, whole
from bigbase_jax.runtime.log import Diverged, say
from bigbase_jax.runtime.rundir import RunDir

Add = Callable[[inputs.Input, dict[str, Any]], None]
"""Takes an input and its answer."""


def train(config: ConfigDict, workdir: str, name: str = "", observe: training.Observe | None = None) -> dict[str, Any]:
    """Trains, or goes on with the run in ``workdir``; then evaluates and writes the report. Returns the metrics."""
    compilation.setup()
    run = RunDir(workdir)
    with run.locked():
        config = pretrained.resolve(config, pretrained.recorded_origin(run))
        try:
            result = training.train(config, workdir, name, observe)
        except Diverged as error:
            distributed.about_to_end()
            _report_once(workdir)
            anew = "nothing was saved before it, so that the next start begins anew"
            kept = "the last good checkpoint is kept" if run.begun else anew
            raise UserError(f"{str(error).removesuffix('.')}; {kept}.") from error
        if "split" in result:
            _report_once(workdir)
        return result


def evaluate(workdir: str, step: int | None = None, split: str | None = None, engine: str = "jax") -> dict[str, Any]:
    """Restores a checkpoint of a run and evaluates it; returns the metrics, as ``train`` does.

    Args:
      split: that split alone, or the evaluator of the config that has this name; None: as at the end of training.
      engine: what computes, see ``Predictor.open``; only what JAX computes is kept in the run folder.

    Raises:
      UserError: no run, no such checkpoint, no such split, or the data is not there.
    """
    compilation.setup()
    run = RunDir(workdir)
    config = run.config()
    data = build(pretrained.data_of(run, config), _path="config.data").prepare(say)
    if data.fingerprint() != run.read_json("lineage.json")["data"]["fingerprint"]:
        say("the data is not what the run was trained on: names, sizes or times of files differ")
    own: dict[str, Evaluator] = build(config.get("evaluators", {}), data.dataset_info, _path="config.evaluators")
    if split is not None and split not in (*data.splits, *own):
        known = [*data.splits, *own]
        raise UserError(f"this data has no split {split!r}.{suggest(split, known, 'split')}")
    predictor = Predictor.open(workdir, step, spread=True, engine=engine)
    task, mesh, step = predictor.task, predictor.mesh, predictor.step
    parallel.check_batch(data.eval_batch_size, mesh, what="config.data.eval_batch_size")
    if split is None:
        chosen = evaluators(task, mesh, data.splits, own).final
    else:
        chosen = {split: own.get(split) or Split(split)}
        check_splits(chosen, data.splits)
    results: dict[str, Any] = {}
    for name, evaluator in chosen.items():
        found = evaluator.run(task, predictor.variables, data, mesh)
        result = {"step": step, "split": name, **found.metrics}
        try:
            if engine == "jax":
                training.keep_evaluation(run, step, name, found)
        except UserError as error:  # a folder that is only read, or a full disk
            say(f"the evaluation is not kept: {error}")
        results = {**results, name: result} if results else result
    return results


def predict(
    workdir: str,
    pattern: str,
    step: int | None = None,
    output: str | None = None,
    out: Any = None,
    adapter: str | None = None,
    engine: str = "jax",
    answers_of: Sequence[str] = (),
    top: int | None = None,
    gallery: str | None = None,
    detector: str | None = None,
) -> int:
    """Answers files, and the rows of tables and the lines of texts one by one, in the order of their names.

    Prints one JSON line per answer: ``{"input", "row", ...the task's answer}``, without ``row`` where a file is one
    input. What cannot be read gives ``{"input", "row", "error"}``, and the others go on.

    Args:
      output: a file to write them to instead (see ``answers.Answers``), each beside the columns of its row; where there
        is a column of the same name, the answer's is called ``predicted_NAME``. A folder takes the files that the model
        makes of them, such as sounds (``Task.rendered``), and the answers as ``answers.jsonl``.
      adapter: the folder of an adapter of the model in ``workdir``.
      engine, answers_of, top: see ``Predictor.open``.
      gallery: a file of people (``inference.gallery``), of whom the answers name one.
      detector: a folder of MTCNN's weights; pictures are cut to the face that it finds.

    Returns:
      The exit status: 1 if something could not be read.

    Raises:
      UserError: ``pattern`` holds nothing, the only table has no column for the model, or the disk refuses.
    """
    compilation.setup()
    files = inputs.to_answer(pattern, output)
    columns: set[str] = set()
    folder = answers.folder_of(output)
    if folder is not None:
        output = str(folder / "answers.jsonl")
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(answers.Answers(output)) if output is not None else None

        def add(item: inputs.Input, answer: dict[str, Any]) -> None:
            assert write is not None
            columns.update(item.values)
            named = {f"predicted_{name}" if name in columns else name: value for name, value in answer.items()}
            write({**(item.place if len(files) > 1 or item.row is None else {}), **item.values, **named})

        predictor = Predictor.open(workdir, step, adapter, engine=engine, answers_of=answers_of, top=top)
        predictor = predictor if detector is None else faces.aligned(predictor, detector)
        predictor = predictor if gallery is None else Identifier.of(predictor, gallery)
        keep = None if write is None else add
        number, failed = _answer(predictor, files, pattern, "predict", keep, out, folder)
    if output is not None:
        print(json.dumps({"output": output, "answers": number, "errors": failed}), flush=True, file=out)
    return int(failed > 0)


def embed(workdir: str, pattern: str, step: int | None = None, output: str | None = None, out: Any = None) -> int:
    """A vector for each text, be it a row of a table, a line or a file, by a run or a folder of published weights; or
    for each picture or recording, by a run that compares these, or of pictures and texts.

    Prints ``{"input", "row", "vector"}`` or ``{"input", "row", "error"}`` each.

    Args:
      output: a file to write them to instead, ``.npy`` (f32[N,D], NaN where a text is unreadable) or as ``predict``.

    Returns:
      The exit status: 1 if something could not be read.

    Raises:
      UserError: ``pattern`` holds nothing, the model gives no vectors, or the disk refuses.
    """
    from bigbase_jax.inference.embedding import Vectors, embedder, width_of

    compilation.setup()
    files = inputs.to_answer(pattern, output)
    with contextlib.ExitStack() as stack:
        predictor = embedder(workdir, step, texts=not all(kind_of(file) in SUFFIXES for file in files))
        width = width_of(predictor)
        add: Add | None = None
        if output is not None and output.lower().endswith(".npy"):
            file = stack.enter_context(whole.written(pathlib.Path(os.path.expanduser(output))))
            write_vector = stack.enter_context(Vectors(file, width))

            def add(item: inputs.Input, answer: dict[str, Any]) -> None:
                write_vector(np.asarray(answer.get("vector", np.full(width, np.nan))))
                if "error" in answer:
                    say(f"{item.file}{'' if item.row is None else f', row {item.row}'}: {answer['error']}")

        elif output is not None:
            write = stack.enter_context(answers.Answers(output))

            def add(item: inputs.Input, answer: dict[str, Any]) -> None:
                write({**item.place, **item.values, **answer})

        number, failed = _answer(predictor, files, pattern, "embed", add, out)
    if output is not None:
        about = {"output": output, "vectors": number, "width": width, "errors": failed}
        print(json.dumps(about), flush=True, file=out)
    return int(failed > 0)


def generate(
    workdir: str,
    prompts: Sequence[str] | None,
    pattern: str | None = None,
    sample: str | None = None,
    stop: Sequence[str] | None = None,
    chat: bool = False,
    step: int | None = None,
    adapter: str | None = None,
    out: TextIO | None = None,
    engine: str = "jax",
) -> int:
    """Continues prompts (``generation.answers``) and prints a JSON line for each; of a single one, a terminal sees the
    text as it comes.

    Args:
      workdir: the folder of a run, or of published weights.
      prompts: texts; None: those of ``pattern``, a file with one in each line, or in each line's "prompt" (.jsonl).
      sample: ``temperature=0.8,top_k=50,...``, the words of ``sampling.SamplingParams``.
      stop: texts at which to stop; "\\n" is a new line.
      chat: take a prompt for what a user says, and answer by the model's chat template.
      adapter: the folder of an adapter (``--mode=export --to=adapter``), to be applied to the model.
      engine: what computes; see ``Predictor.open``.

    Returns:
      The exit status.

    Raises:
      UserError: there are no prompts, the model does not write, or a prompt or the adapter does not fit.
    """
    compilation.setup()
    out = out or sys.stdout
    prompts = prompts or generation.read_prompts(pattern)
    params = generation.parse_sampling(sample, stop or ()) if sample or stop else None
    show = functools.partial(print, end="", flush=True, file=out) if len(prompts) == 1 and out.isatty() else None
    for line in generation.answers(Predictor.open(workdir, step, adapter, engine=engine), prompts, params, chat, show):
        print(answers.as_json(line), flush=True, file=out)
    return 0


def _answer(
    predictor: Predictor,
    files: Sequence[str],
    pattern: str,
    verb: str,
    add: Add | None,
    out: Any,
    folder: pathlib.Path | None = None,
) -> tuple[int, int]:
    """Takes each answer to ``add``, or prints it; returns how many there were, and how many of them are errors.

    Args:
      folder: where the files are written that the model makes of the inputs; None: it makes none.
    """
    number = failed = 0
    reading = predictor.reading
    given = inputs.read(files, reading.codec.fields, reading.limits)
    found = predictor.answers(given) if folder is None else answers.filed(folder, predictor.files(given))
    for item, answer in answers.counted(found, inputs.estimate(files, reading.codec.fields), verb):
        number += 1
        failed += "error" in answer
        if add is None:
            print(answers.as_json({**item.place, **answer}), flush=True, file=out)
        else:
            add(item, answer)
    if not number:
        raise UserError(f"--input={pattern} holds no row and no text to answer.")
    return number, failed


def report(workdir: str) -> dict[str, Any]:
    """(Re)writes ``report.html`` of a run; returns its path. Pictures need the data to be where it was."""
    run = RunDir(workdir)
    config = run.config()

    def pictures() -> Pictures:
        task = task_of(run)
        data = build(pretrained.data_of(run, config), _path="config.data").prepare(lambda line: None)
        source = {name: data.source(name) for name in data.splits}
        return lambda split, index: (source[split][index][task.inputs[0]], source[split].name(index))

    page = report_page.write(str(run.path), pictures)
    say(f"report: {page}")
    return {"report": page}


def compare(
    workdirs: Sequence[str], output: str | None = None, split: str | None = None, storage: str | None = None
) -> dict[str, Any]:
    """Compares runs, prints the tables on stdout, and writes ``comparison.html`` and three CSV files.

    Args:
      workdirs, split, storage: see ``compare.compare``.
      output: the folder to write; None: ``comparison`` in the current one.

    Returns:
      Where the files are, and the tests in short.

    Raises:
      UserError: no run at all, none evaluated on ``split``, or a folder that cannot be written.
    """
    found = comparing.compare(workdirs, split, storage=storage)
    for note in comparing.said_once(found.notes):
        say(note)
    folder = pathlib.Path(output or "comparison")
    page = comparison_page.write(folder, found)
    for name, text in comparing.csv_files(found).items():
        with whole.written(folder / name) as file:
            file.write(text.encode())
    comparing.show(found)
    say(f"comparison: {page}")
    return {"comparison": page, **comparing.summary(found)}


def serve(workdirs: Sequence[str], **words: Any) -> int:
    """Answers requests over HTTP; see ``serve.command.serve``.

    Raises:
      UserError: the extra is not installed, or a model cannot be loaded.
    """
    with _of_extra("serve"):
        from bigbase_jax.serve import command
    return command.serve(workdirs, **words)


def registry(workdirs: Sequence[str], **words: Any) -> dict[str, Any]:
    """Versions of models, and what is in service; see ``ops.command.registry``.

    Raises:
      UserError: the extra is not installed, or what is asked cannot be done.
    """
    with _of_extra("registry"):
        from bigbase_jax.ops import command
    return command.registry(workdirs, **words)


def monitor(workdirs: Sequence[str], **words: Any) -> dict[str, Any]:
    """Drift and live accuracy of sampled predictions; see ``ops.monitor.monitor``.

    Raises:
      UserError: the extra is not installed, or there is nothing to compare.
    """
    with _of_extra("monitor"):
        from bigbase_jax.ops import monitor
    compilation.setup()
    return monitor.monitor(workdirs, **words)


@contextlib.contextmanager
def _of_extra(mode: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"--mode={mode} needs the extra: pip install -e '.[serve]' ({error}).") from error


def _report_once(workdir: str) -> None:
    if jax.process_index() == 0:
        report(workdir)
