"""A recording of HOURS of yesno, the last 20 of its recordings again and again, and beside it what is said.

python experiments/speech/hours.py YESNO HOURS OUT.wav
"""

import pathlib
import sys

import soundfile


def main():
    folder, hours, out = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    paths = sorted(pathlib.Path(folder).rglob("*.wav"))[-20:]
    sounds = [soundfile.read(path, dtype="int16")[0] for path in paths]
    texts = [path.stem.replace("_", " ").replace("1", "yes").replace("0", "no") for path in paths]
    seconds = 0.0
    with soundfile.SoundFile(out, "w", 8000, 1, "PCM_16") as file, open(out + ".txt", "w") as said:
        while seconds < hours * 3600:
            for x_T, text in zip(sounds, texts, strict=True):
                file.write(x_T)
                said.write(text + "\n")
                seconds += len(x_T) / 8000
    print(f"{seconds / 3600:.2f} hours")


if __name__ == "__main__":
    main()
