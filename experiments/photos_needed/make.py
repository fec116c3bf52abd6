"""Folders of few training photos, as many of each class: python make.py DATA/cats_dogs_256 OUT

Writes OUT/DRAW-COUNT/{train,val,test}/CLASS/, links to the photos: three draws, of 125 to 2,000 photos each, the
smaller within the larger ones of a draw (of 125, one class has 63). All have the same val (100 of each class) and test,
which are dealt from the data's test photos; no photo of train is in either.
"""

import pathlib
import random
import sys

COUNTS = (125, 250, 500, 1000, 2000)
DRAWS = 3


def link(photos, folder):
    folder.mkdir(parents=True)
    for photo in photos:
        (folder / photo.name).symlink_to(photo.resolve())


def main(data, out, counts=COUNTS):
    data, out = pathlib.Path(data), pathlib.Path(out)
    classes = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
    for k, name in enumerate(classes):
        held = sorted((data / "test" / name).iterdir())
        random.Random(0).shuffle(held)
        for draw in range(DRAWS):
            photos = sorted((data / "train" / name).iterdir())
            random.Random(f"{draw}/{name}").shuffle(photos)
            for count in counts:
                mine = (count + len(classes) - 1 - k) // len(classes)
                if mine > len(photos):
                    sys.exit(f"{data / 'train' / name} has {len(photos)} photos, of which {mine} were to be taken.")
                folder = out / f"{draw}-{count}"
                for split, part in {"train": photos[:mine], "val": held[:100], "test": held[100:]}.items():
                    link(part, folder / split / name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(count) for count in sys.argv[3:]] or COUNTS)
