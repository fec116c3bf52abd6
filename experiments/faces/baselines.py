"""What the recipe's network is held against, on the very pairs and probes of its runs: Eigenfaces, and dlib's network.

python experiments/faces/baselines.py eigenfaces LFW ORL
python experiments/faces/baselines.py pictures LFW pictures.npz
python experiments/faces/baselines.py dlib pictures.npz        with dlib-bin and face_recognition_models alone
python experiments/faces/baselines.py measure pictures.npz

dlib's part needs none of our packages, so that it runs in an environment of its own.
"""

import sys
import time

import numpy as np


def eigenfaces(lfw: str, orl: str) -> None:
    """PCA of grey pixels (Turk & Pentland 1991); the number of components and whitening are chosen on val."""
    from sklearn.decomposition import PCA

    from bigbase_jax.data.sources.image.faces import Faces
    from bigbase_jax.data.sources.image.image import resized
    from bigbase_jax.tasks.metrics import verification

    def pixels(source: object, shape: tuple[int, int, int]) -> np.ndarray:
        return np.stack([resized(source[i]["image"], shape).ravel() / 255 for i in range(len(source))])

    splits = Faces(lfw).splits
    x = {name: pixels(source, (56, 56, 1)) for name, source in splits.items()}
    found = {}
    for whiten in (False, True):
        for components in (25, 50, 100, 200, 400):
            pca = PCA(components, whiten=whiten, svd_solver="randomized", random_state=0).fit(x["train"])
            for split in ("val", "test"):
                y = pca.transform(x[split])
                y /= np.linalg.norm(y, axis=1, keepdims=True)
                pairs = splits[split].pairs
                score = (y[pairs[:, 0]] * y[pairs[:, 1]]).sum(1)
                found[whiten, components, split] = verification.scores(score, splits[split].same)
    best = max((key for key in found if key[2] == "val"), key=lambda key: found[key]["accuracy"])
    print("LFW", best, found[best], "test", found[*best[:2], "test"])

    for seed in range(3):
        photos = Faces(orl, split="photos", val_fraction=0, test_fraction=0.5, seed=seed).splits
        train, test = (pixels(photos[name], (28, 23, 1)) for name in ("train", "test"))
        said = []
        for components in (20, 40, 80, 150):
            pca = PCA(components, random_state=0).fit(train)
            a, b = pca.transform(train), pca.transform(test)
            distance = ((b[:, None] - a[None]) ** 2).sum(-1)
            right = photos["train"].labels[distance.argmin(1)] == photos["test"].labels
            said.append(f"{components}: {right.mean():.4f}")
        print("ORL seed", seed, "rank-1 by components", *said)


def pictures(lfw: str, output: str) -> None:
    """The photos of the pairs of val and test."""
    from bigbase_jax.data.sources.image.faces import Faces

    arrays = {}
    for split in ("val", "test"):
        source = Faces(lfw).splits[split]
        used, pairs = np.unique(source.pairs, return_inverse=True)
        arrays[split] = np.stack([source[int(i)]["image"] for i in used])
        arrays[f"{split}_pairs"], arrays[f"{split}_same"] = pairs.reshape(-1, 2), source.same
    np.savez_compressed(output, **arrays)


def dlib(path: str) -> None:
    """dlib's 128 numbers of each: where its detector finds a face, else of the middle."""
    import os

    import dlib
    import face_recognition_models as models

    folder = os.path.join(os.path.dirname(models.__file__), "models")
    detector = dlib.get_frontal_face_detector()
    shape = dlib.shape_predictor(os.path.join(folder, "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(os.path.join(folder, "dlib_face_recognition_resnet_model_v1.dat"))
    arrays = dict(np.load(path))
    start = time.process_time()
    for split in ("val", "test"):
        vectors, missed = [], 0
        for x in arrays[split]:
            found = detector(x, 1)
            missed += not found
            box = max(found, key=lambda r: r.area()) if found else dlib.rectangle(20, 25, 92, 97)
            vectors.append(network.compute_face_descriptor(x, shape(x, box)))
        arrays[f"{split}_vectors"] = np.array(vectors)
        print(split, len(vectors), "photos,", missed, "without a detection")
    print(f"{time.process_time() - start:.0f} core-seconds")
    np.savez_compressed(path, **arrays)


def measure(path: str) -> None:
    """dlib compares by distance."""
    from bigbase_jax.tasks.metrics import verification

    arrays = dict(np.load(path))
    for split in ("val", "test"):
        a, b = arrays[f"{split}_vectors"][arrays[f"{split}_pairs"].T]
        print(split, verification.scores(-np.linalg.norm(a - b, axis=1), arrays[f"{split}_same"]))


if __name__ == "__main__":
    {"eigenfaces": eigenfaces, "pictures": pictures, "dlib": dlib, "measure": measure}[sys.argv[1]](*sys.argv[2:])
