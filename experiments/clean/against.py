"""Ours, datatrove and text-dedup on the same JSON lines, one after the other: MB/s per core, and peak memory.

python experiments/clean/against.py INPUT PYTHON      PYTHON has datatrove[processing], spacy and text-dedup

CPU seconds are those of the process and all below it, peak memory is the sum of what these hold at once. Ours run in
one process, with all steps; of each, what its card says, which leaves out the start. datatrove: the rules of Gopher, C4
and FineWeb; MinHash in 25 bands of 5, four stages; ftfy with personal data. text-dedup: MinHash alone, as many bands.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline import dedup, filters, formatters, readers, writers
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig

what, source, to = sys.argv[1:]
read = readers.JsonlReader(source, glob_pattern="*.jsonl")
write = writers.JsonlWriter(f"{to}/out")

def run(name, *steps, tasks=1):
    LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=f"{to}/logs/{name}").run()

if what == "rules":
    gopher = filters.GopherRepetitionFilter(), filters.GopherQualityFilter()
    run("rules", read, *gopher, filters.C4QualityFilter(), filters.FineWebQualityFilter(), write)
elif what == "normalise and personal data":
    run("pii", read, formatters.FTFYFormatter(), formatters.PIIFormatter(), write)
else:
    config = MinhashConfig(n_grams=5, num_buckets=25, hashes_per_bucket=5, hash_config=HashConfig(precision=64))
    run("signatures", read, dedup.MinhashDedupSignature(f"{to}/signatures", config))
    run("buckets", dedup.MinhashDedupBuckets(f"{to}/signatures", f"{to}/buckets", config=config), tasks=25)
    run("clusters", dedup.MinhashDedupCluster(f"{to}/buckets", f"{to}/removed", config=config))
    run("filter", read, dedup.MinhashDedupFilter(f"{to}/removed"), write)
"""


def ran(command, log):
    """CPU seconds, wall seconds and peak MB of a command and all processes of its session."""
    start, peak, page = time.perf_counter(), 0, os.sysconf("SC_PAGE_SIZE")
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            held = 0
            for entry in filter(str.isdigit, os.listdir("/proc")):
                try:
                    fields = pathlib.Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                held += int(fields[21]) * page if int(fields[3]) == child.pid else 0
            peak = max(peak, held)
            time.sleep(0.2)
    if ended[1]:
        sys.exit(f"{command[:3]} failed:\n{pathlib.Path(log).read_text()[-2000:]}")
    return ended[2].ru_utime + ended[2].ru_stime, time.perf_counter() - start, peak / 1e6


def main(source, python):
    megabytes = 0.0
    for path in sorted(pathlib.Path(source).glob("*.jsonl")):
        with open(path) as file:
            megabytes += sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6
    print(f"{megabytes:.1f} MB of text")

    def told(name, cpu, wall, peak):
        print(f"{name:42} {megabytes / cpu:7.2f} MB/s/core {cpu:8.1f} CPU s {wall:8.1f} s {peak:7,.0f} MB", flush=True)

    work = pathlib.Path(tempfile.mkdtemp())
    log = work / "log"
    config = f"configs/clean.py:root={source},out={work}/ours,id=id,workers=0"
    ours = ran([sys.executable, "launch.py", "--mode=clean", f"--config={config}"], log)
    manifest = json.loads((work / "ours/.clean/manifest.json").read_text())
    for step in manifest["steps"]:
        told(f"ours, {step['step']}", step["cpu_seconds"], step["seconds"], step["peak_bytes"] / 1e6)
    told("ours, whole, with its start", *ours)
    total, most, walls = 0.0, 0.0, 0.0
    for what in ("rules", "minhash", "normalise and personal data"):
        (work / "datatrove" / what).mkdir(parents=True)
        cpu, wall, peak = ran([python, "-c", DATATROVE, what, str(source), str(work / "datatrove" / what)], log)
        total, walls, most = total + cpu, walls + wall, max(most, peak)
        told(f"datatrove, {what}", cpu, wall, peak)
    told("datatrove, the three, with their starts", total, walls, most)
    (folder := work / "cache").mkdir()
    texts = ["--path", "json", "--data_files", f"{source}/*.jsonl", "--split", "train", "--column", "text"]
    bands = ["--num_perm", "125", "--b", "25", "--r", "5", "--ngram", "5", "--threshold", "0.8", "--num_proc", "1"]
    to = ["--cache_dir", str(folder), "--output", str(work / "text_dedup")]
    told("text-dedup, minhash", *ran([python, "-m", "text_dedup.minhash", *texts, *bands, *to], log))
    shutil.rmtree(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
