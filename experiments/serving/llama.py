"""llama.cpp's own server, by a Python that has xllamacpp (its prebuilt build): llama.py FILE.gguf PORT, for load.py."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_ctx, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 16, 16 * 128, 2, 2
server = xllamacpp.Server(params)
threading.Event().wait()
