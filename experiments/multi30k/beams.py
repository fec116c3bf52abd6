"""The scores of a translation run by beam search, and some translations: python beams.py RUN SPLIT BEAMS [BEAMS ...]"""

import dataclasses
import sys
import time

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.data.sources.text.parallel_text import reference_of
from bigbase_jax.evaluate import evaluate
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.restored import restore
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.text.tokenizer import load
from bigbase_jax.verbs import setup

setup()
folder, split, *counts = sys.argv[1:]
config = RunDir(folder).config()
data = build(config.data).prepare(say)
mesh = parallel.make_mesh()
task, variables, step = restore(RunDir(folder), config, mesh)
tokenizer = load(data.dataset_info["tokenizer"])
for beams in map(int, counts):
    searching = dataclasses.replace(task, beams=beams)
    began = time.process_time()
    found = evaluate(searching, parallel.eval_step(searching, mesh), variables, data.eval_batches(split), mesh)
    seconds = time.process_time() - began
    scores = {name: round(found.metrics[name], 2) for name in ("bleu", "chrf", "loss", "accuracy")}
    print(f"{split} @ {step}, beams {beams}: {scores}, {seconds:.0f} core-seconds")
    for n in range(0, data.num_examples(split), data.num_examples(split) // 12):
        example = data.source(split)[n]
        written = searching.postprocess({name: x[n] for name, x in found.examples.items()}, {})["translation"]
        source = tokenizer.decode(example["source"][example["source_segments"] > 0].tolist())
        print(f"  {n}\n    {source}\n    {reference_of(example['reference'])}\n    {written}")
