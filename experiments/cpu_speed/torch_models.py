"""The models of the table in plain PyTorch, as torchvision, timm, nanoGPT and textbooks write them.

Each is the same function as ours, with as many parameters: dropout stands where ours stands, BERT is told which tokens
are padding, and the three projections of attention are one product, which is faster than three.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads, dropout=0.0, causal=False, post_norm=False, approximate="none"):
        super().__init__()
        self.heads, self.causal, self.post_norm, self.approximate = heads, causal, post_norm, approximate
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def attention(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))

    def feed_forward(self, x):
        return self.drop(self.down(self.drop(F.gelu(self.up(x), approximate=self.approximate))))

    def forward(self, x, mask=None):
        if self.post_norm:
            x = self.norm1(x + self.attention(x, mask))
            return self.norm2(x + self.feed_forward(x))
        x = x + self.attention(self.norm1(x), mask)
        return x + self.feed_forward(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, depth, width, heads, pixels, patch, classes):
        super().__init__()
        self.embedding = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (pixels // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.embedding(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Bert(nn.Module):
    def __init__(self, depth, width, heads, vocab, length, dropout, classes=2):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.kind = nn.Embedding(2, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, post_norm=True) for _ in range(depth))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        for table in (self.embedding, self.position, self.kind):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids, real):
        x = self.embedding(ids) + self.position.weight + self.kind(torch.zeros_like(ids))
        x = self.drop(self.norm(x))
        for block in self.blocks:
            x = block(x, real[:, None, None])
        return self.head(self.drop(torch.tanh(self.pooler(x[:, 0]))))


class Decoder(nn.Module):
    def __init__(self, depth, width, heads, vocab, length, dropout):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, causal=True, approximate="tanh") for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids):
        x = self.drop(self.embedding(ids) + self.position.weight)
        for block in self.blocks:
            x = block(x)
        return (self.norm(x) @ self.embedding.weight.T).flatten(0, 1)


class Residual(nn.Module):
    def __init__(self, channels, width, stride, bottleneck):
        super().__init__()
        layers = [(1, width), (3, width), (1, 4 * width)] if bottleneck else [(3, width), (3, width)]
        strided, out = (1 if bottleneck else 0), layers[-1][1]
        self.convs, self.norms, read = nn.ModuleList(), nn.ModuleList(), channels
        for i, (kernel, features) in enumerate(layers):
            s = stride if i == strided else 1
            self.convs.append(nn.Conv2d(read, features, kernel, s, kernel // 2, bias=False))
            self.norms.append(nn.BatchNorm2d(features))
            read = features
        self.shortcut = nn.Identity()
        if channels != out or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y if i == 0 else F.relu(y, inplace=True)))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self, depth, width, classes):
        super().__init__()
        bottleneck, counts = {18: (False, (2, 2, 2, 2)), 50: (True, (3, 4, 6, 3))}[depth]
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
        blocks, channels = [], width
        for stage, count in enumerate(counts):
            for i in range(count):
                features = width * 2**stage
                blocks.append(Residual(channels, features, 2 if stage and not i else 1, bottleneck))
                channels = 4 * features if bottleneck else features
        self.body = nn.Sequential(*stem, *blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class ConvNet(nn.Module):
    """The classic network; or, where ``dense`` is None, the one with BatchNorm and the mean of the last map.

    dense: (pixels of the picture, width of the dense layer).
    """

    def __init__(self, stages, dense, classes):
        super().__init__()
        layers, channels = [], 3
        for features in stages:
            norm = [nn.BatchNorm2d(features)] if dense is None else []
            conv = nn.Conv2d(channels, features, 3, padding=1, bias=dense is not None)
            layers += [conv, *norm, nn.ReLU(True), nn.MaxPool2d(2)]
            channels = features
        self.body = nn.Sequential(*layers)
        self.dense = None
        if dense is not None:
            pixels, width = dense
            self.dense, channels = nn.Linear(channels * (pixels >> len(stages)) ** 2, width), width
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.body(x)
        x = x.mean((2, 3)) if self.dense is None else F.relu(self.dense(x.flatten(1)))
        return self.head(x)
