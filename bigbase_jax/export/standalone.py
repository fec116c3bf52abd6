"""Answers with the model of this folder; it needs jax and numpy, and for picture files Pillow.

python predict.py a.jpg b.png            a JSON line for each
python predict.py inputs.npz out.npz     arrays by name, as manifest.json has them in "inputs" -> in "outputs"
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
KINDS = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def load():
    """The program of the platform here, as a function of arrays by name."""
    if MANIFEST["version"] > 1:
        sys.exit(
            f"this folder is of version {MANIFEST['version']}, and this script reads 1: take the predict.py in it."
        )
    for name, about in MANIFEST["files"].items():
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != about["sha256"]:
            sys.exit(f"{name} is not what was exported; copy the folder again.")
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in MANIFEST["platforms"]:
        sys.exit(f"there are programs for {', '.join(MANIFEST['platforms'])}, and none for {platform}.")
    data = np.memmap(HERE / "weights.safetensors", np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    weights = {}
    for name, about in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            kind = ml_dtypes.bfloat16 if about["dtype"] == "BF16" else KINDS[about["dtype"]]
            first, last = (start + at for at in about["data_offsets"])
            weights[name] = jax.device_put(data[first:last].view(kind).reshape(about["shape"]))
    program = jax.jit(jax.export.deserialize(bytearray((HERE / f"{platform}.stablehlo").read_bytes())).call)
    return lambda inputs: {name: np.asarray(x) for name, x in program(weights, inputs).items()}


def picture(path):
    """A picture file as the model was trained to see it."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for step in MANIFEST["preprocessing"]:
        (w, h), size = image.size, step["size"]
        full = step.get("resize", size)
        full = (
            full
            if isinstance(full, list)
            else [full * max(h, w) // w if h > w else full, full * max(h, w) // h if w > h else full]
        )
        method = Image.Resampling[step.get("method", "bilinear").upper()]
        if step["name"] == "Resize":
            image = image.resize(full[::-1], method)
        elif step["name"] == "ResizeCenterCrop":
            inner = size if isinstance(size, list) else [size, size]
            top, left = (round((a - b) / 2) for a, b in zip(full, inner, strict=True))
            box = (
                left * w / full[1],
                top * h / full[0],
                (left + inner[1]) * w / full[1],
                (top + inner[0]) * h / full[0],
            )
            image = image.resize(inner[::-1], method, (*box[:2], min(box[2], w), min(box[3], h)))
        else:
            sys.exit(f"manifest.json has the step {step['name']}, which is not done here; give arrays in an .npz.")
    _, *shape = MANIFEST["inputs"]["image"]["shape"]
    image = image if list(image.size) == shape[1::-1] else image.resize(shape[1::-1], Image.Resampling.BICUBIC)
    return np.asarray(image if shape[2:] == [3] else image.convert("L")).reshape(shape)


def main(words):
    if not words:
        sys.exit(__doc__)
    MANIFEST.update(json.loads((HERE / "manifest.json").read_text(encoding="utf-8")))
    model = load()
    if words[0].endswith(".npz"):
        with np.load(words[0]) as given:
            np.savez(words[1], **model({name: given[name] for name in MANIFEST["inputs"]}))
        return
    for path in words:
        p = model({"image": picture(path)[None]})["probabilities"][0]
        names = MANIFEST["class_names"] or [str(k) for k in range(len(p))]
        print(json.dumps({"input": path, "label": names[p.argmax()], "probability": float(p.max())}))


if __name__ == "__main__":
    main(sys.argv[1:])
