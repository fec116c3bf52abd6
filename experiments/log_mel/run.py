"""Milliseconds of one core for the log-mel features of a second of sound: ours, and whichever peers are installed.

OMP_NUM_THREADS=1 taskset -c 0 python experiments/log_mel/run.py
"""

import importlib
import json
import time

import numpy as np

SECONDS, ROWS, RATE = 10, 8, 16_000


def cost(compute, times=7):
    """The least process time of several calls, in milliseconds for a second of sound."""
    compute()
    spent = []
    for _ in range(times):
        began = time.process_time()
        compute()
        spent.append(time.process_time() - began)
    return 1e3 * min(spent) / (SECONDS * ROWS)


def ours(x_BT):
    import jax

    from bigbase_jax.audio.features import whisper

    features, on_device = whisper(), jax.numpy.asarray(x_BT)
    compiled = jax.jit(features)
    yield "ours, JAX", lambda: jax.block_until_ready(compiled(on_device))
    yield "ours, numpy", lambda: features(x_BT, np)


def librosa(x_BT):
    library = importlib.import_module("librosa")

    def compute():
        mel = library.feature.melspectrogram(y=x_BT, sr=RATE, n_fft=400, hop_length=160, n_mels=80)
        return np.log10(np.maximum(mel, 1e-10))

    yield f"librosa {library.__version__}", compute


def torchaudio(x_BT):
    torch, library = importlib.import_module("torch"), importlib.import_module("torchaudio")
    mel = library.transforms.MelSpectrogram(
        RATE, n_fft=400, hop_length=160, n_mels=80, mel_scale="slaney", norm="slaney"
    )
    given = torch.from_numpy(x_BT)
    yield f"torchaudio {library.__version__}", lambda: torch.log10(torch.clamp(mel(given), 1e-10))


def torch(x_BT):
    """torchaudio's transform in torch's own words: ``stft``, squares, a product with the bands."""
    library = importlib.import_module("torch")
    library.set_num_threads(1)
    from bigbase_jax.audio.features import whisper

    window, bands, given = library.hann_window(400), library.from_numpy(whisper().filters), library.from_numpy(x_BT)

    def compute():
        power = library.stft(given, 400, 160, window=window, return_complex=True).abs() ** 2
        return library.log10(library.clamp(power.transpose(1, 2) @ bands, 1e-10))

    yield f"torch {library.__version__}: stft and product", compute


def main():
    x_BT = 0.1 * np.random.default_rng(0).standard_normal((ROWS, RATE * SECONDS)).astype(np.float32)
    for side in (ours, torch, torchaudio, librosa):
        try:
            for name, compute in side(x_BT):
                print(json.dumps({"side": name, "ms": round(cost(compute), 3)}), flush=True)
        except (ImportError, OSError) as error:
            print(json.dumps({"side": side.__name__, "missing": str(error)}), flush=True)


if __name__ == "__main__":
    main()
