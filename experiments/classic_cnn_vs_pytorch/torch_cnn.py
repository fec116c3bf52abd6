"""The classic CNN as a PyTorch user writes it: Dataset, DataLoader, Pillow, fp32. Prints one JSON line.

python torch_cnn.py --what=pipeline --data=DIR [--workers=0]
python torch_cnn.py --what=job --data=DIR --epochs=1
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Photos(Dataset):
    def __init__(self, root, split):
        classes = sorted(p for p in (pathlib.Path(root) / split).iterdir() if p.is_dir())
        self.items = [(file, k) for k, folder in enumerate(classes) for file in sorted(folder.iterdir())]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        file, label = self.items[index]
        image = Image.open(file).convert("RGB")
        width, height = image.size
        scale = 256 / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), Image.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        image = image.crop((left, top, left + 224, top + 224))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)  # torchvision's ToTensor
        return x, label


def network():
    layers, channels = [], 3
    for _ in range(3):
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = 64
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 28 * 28, 1024), nn.ReLU(), nn.Linear(1024, 2))


def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def pipeline(root, workers, epochs=2):
    loader = DataLoader(Photos(root, "train"), 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    rates = []
    for _ in range(epochs):
        began, count = time.perf_counter(), 0
        for x, _ in loader:
            count += len(x)
        rates.append(count / (time.perf_counter() - began))
    return {"images_per_second": rates}


def job(root, epochs, workers):
    began = time.perf_counter()
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    train = DataLoader(Photos(root, "train"), 4, shuffle=True, num_workers=workers)
    seconds = []
    for epoch in range(epochs):
        start, running = time.perf_counter(), 0.0
        for i, (x, y) in enumerate(train):
            running += train_step(model, optimizer, x, y)
            if i % 25 == 24:
                print(f"epoch {epoch + 1} batch {i + 1} loss {running / 25:.3f}", flush=True)
                running = 0.0
        seconds.append(time.perf_counter() - start)
    model.eval()
    start, right, count = time.perf_counter(), 0, 0
    with torch.no_grad():
        for x, y in DataLoader(Photos(root, "test"), 4, num_workers=workers):
            right += (model(x).argmax(1) == y).sum().item()
            count += len(y)
    return {
        "accuracy": right / count,
        "epoch_seconds": seconds,
        "test_seconds": time.perf_counter() - start,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=["pipeline", "job"], required=True)
    parser.add_argument("--data")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {
        "pipeline": lambda: pipeline(args.data, args.workers),
        "job": lambda: job(args.data, args.epochs, args.workers),
    }[args.what]()
    print(json.dumps({"torch": torch.__version__, **found}))
