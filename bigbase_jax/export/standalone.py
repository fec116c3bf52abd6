"""Answers with the model of this folder; it needs jax and numpy, and for picture files Pillow.

python predict.py a.jpg b.png               a JSON line for each
python predict.py inputs.npz out.npz        arrays by name, as manifest.json has them in "inputs" -> in "outputs"
python predict.py generate 32 17 4 201      the 32 likeliest tokens after these, one by one, of a decoder
"""

import hashlib
import json
import pathlib
import sys

import jax
import jax.export
import ml_dtypes
import numpy as np

HERE = pathlib.Path(__file__).parent
MANIFEST: dict = {}
SPECIAL = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "BOOL": "?"}


def check():
    MANIFEST.update(json.loads((HERE / "manifest.json").read_text(encoding="utf-8")))
    if MANIFEST["version"] > 1:
        sys.exit(
            f"this folder is of version {MANIFEST['version']}, and this script reads 1: take the predict.py in it."
        )
    for name, about in MANIFEST["files"].items():
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != about["sha256"]:
            sys.exit(f"{name} is not what was exported; copy the folder again.")


def program(prefix=""):
    """The compiled program of the platform here."""
    here = jax.default_backend()
    platform = next((name for name in ("cuda", "rocm") if here == "gpu" and name in MANIFEST["platforms"]), here)
    if platform not in MANIFEST["platforms"]:
        sys.exit(f"there are programs for {', '.join(MANIFEST['platforms'])}, and none for {platform}.")
    return jax.jit(jax.export.deserialize(bytearray((HERE / f"{prefix}{platform}.stablehlo").read_bytes())).call)


def load_weights():
    data = np.memmap(HERE / "weights.safetensors", np.uint8, "r")
    start, weights = 8 + int(data[:8].view("<u8")[0]), {}
    for name, about in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            kind = about["dtype"]  # such as F32
            dtype = SPECIAL.get(kind) or f"{kind[0].lower()}{int(kind[1:]) // 8}"
            first, last = (start + at for at in about["data_offsets"])
            weights[name] = jax.device_put(data[first:last].view(dtype).reshape(about["shape"]))
    return weights


def picture(path):
    """A picture file as the model was trained to see it."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for step in MANIFEST["preprocessing"]:
        if step["name"] not in ("Resize", "ResizeCenterCrop"):
            sys.exit(f"manifest.json has the step {step['name']}, which is not done here; give arrays in an .npz.")
        w, h = image.size
        full = step.get("resize", step["size"])  # the shorter side, or height and width
        full = full if isinstance(full, list) else [max(full * n // min(w, h), 1) for n in (h, w)]
        inner = full if step["name"] == "Resize" else step["size"]
        inner = inner if isinstance(inner, list) else [inner, inner]
        top, left = (round((a - b) / 2) for a, b in zip(full, inner, strict=True))
        box = (left * w / full[1], top * h / full[0], (left + inner[1]) * w / full[1], (top + inner[0]) * h / full[0])
        method = Image.Resampling[step["method"].upper()]
        image = image.resize(inner[::-1], method, (*box[:2], min(box[2], w), min(box[3], h)))
    _, *shape = MANIFEST["inputs"]["image"]["shape"]
    image = image if list(image.size) == shape[1::-1] else image.resize(shape[1::-1], Image.Resampling.BICUBIC)
    return np.asarray(image if shape[2:] == [3] else image.convert("L")).reshape(shape)


def generate(count, tokens):
    """The likeliest tokens after these, up to ``count`` or one that ends a text."""
    about, step, weights = MANIFEST["generate"], program("generate-"), load_weights()
    cache = {name: np.zeros([1, *x["shape"][1:]], x["dtype"]) for name, x in about["cache"].items()}
    new = tokens if about["inputs"]["tokens"]["shape"][1] == "length" else tokens[:1]
    at = 0
    found: list[int] = []
    while at < min(about["places"], len(tokens) + count):
        given = {"tokens": np.array([new], np.int32), "position": np.array([at], np.int32)}
        logits, cache = step(weights, cache, given)
        at += len(new)
        new = tokens[at : at + 1] or [int(np.argmax(logits[0]))]
        if at >= len(tokens):
            if new[0] in about["ends"] or len(found) == count:
                break
            found += new
    return found


def main(words):
    if not words:
        sys.exit(__doc__)
    check()
    if words[0] == "generate":
        print(json.dumps(generate(int(words[1]), [int(word) for word in words[2:]])))
        return
    model, weights = program(), load_weights()
    if words[0].endswith(".npz"):
        with np.load(words[0]) as given:
            found = model(weights, {name: given[name] for name in MANIFEST["inputs"]})
        np.savez(words[1], **{name: np.asarray(x) for name, x in found.items()})  # type: ignore[arg-type]
        return
    for path in words:
        p = np.asarray(model(weights, {"image": picture(path)[None]})["probabilities"][0])
        names = MANIFEST["class_names"] or [str(k) for k in range(len(p))]
        print(json.dumps({"input": path, "label": names[p.argmax()], "probability": float(p.max())}))


if __name__ == "__main__":
    main(sys.argv[1:])
