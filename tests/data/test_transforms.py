"""The picture transforms against Pillow, numpy formulas and the definitions in the papers."""

import dataclasses
import inspect

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from bigbase_jax.build import build, target
from bigbase_jax.core import UserError
from bigbase_jax.data.transforms import image as T


def picture(h=37, w=53, c=3, seed=0):
    """A smooth picture with some noise, since resizing pure noise tells little about photos."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    waves = [127 + 90 * np.sin(x / (5 + k) + k) * np.cos(y / (7 - k)) for k in range(c)]
    return (np.stack(waves, -1) + rng.uniform(-20, 20, (h, w, c))).clip(0, 255).astype(np.uint8)


def apply(transform, x, seed=0):
    return transform({"image": x}, np.random.default_rng(seed))["image"]


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).max()


EVERY = [
    T.Resize(24),
    T.Resize((20, 30), "bicubic"),
    T.CenterCrop(24),
    T.ResizeCenterCrop(32, 24),
    T.RandomResizedCrop(24),
    T.RandomCrop(24, padding=20),
    T.RandomFlip(),
    T.ColorJitter(0.4, 0.4, 0.4, 0.1),
    T.TrivialAugment(),
    T.RandAugment(2, 15),
    T.RandomErasing(1.0),
    T.Grey(),
]


def test_the_list_above_is_complete():
    public = {
        c for c in vars(T).values() if inspect.isclass(c) and issubclass(c, T.ImageTransform) and c.__name__[0] != "_"
    }
    assert public - {T.ImageTransform, T.Geometric} == {type(t) for t in EVERY}


@pytest.mark.parametrize("transform", EVERY, ids=repr)
@pytest.mark.parametrize("shape", [(37, 53, 3), (53, 37, 1), (1, 40, 3), (40, 1, 1), (2, 3, 3), (1, 1, 1)], ids=str)
def test_any_shape_leaves_the_input_alone_and_depends_on_the_generator_alone(transform, shape):
    if isinstance(transform, T.RandomCrop):
        transform = dataclasses.replace(transform, size=16)
    x = picture(*shape)
    x.flags.writeable = False
    example = {"image": x, "label": 3}
    before = x.copy()
    out = transform(example, np.random.default_rng(1))
    again = transform(example, np.random.default_rng(1))
    assert out is not example and example["image"] is x and out["label"] == 3
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(out["image"], again["image"])
    assert out["image"].ndim == 3 and out["image"].shape[2] == (1 if isinstance(transform, T.Grey) else shape[2])
    assert out["image"].dtype == np.uint8
    size = getattr(transform, "size", None)
    if size is not None and not (isinstance(transform, T.Resize) and isinstance(size, int)):
        assert out["image"].shape[:2] == (size if isinstance(size, tuple) else (size, size))


@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_random_is_declared_truly(transform):
    x = picture()
    outs = [apply(transform, x, seed) for seed in range(20)]
    differ = any(a.shape != outs[0].shape or (a != outs[0]).any() for a in outs)
    assert differ == transform.random


@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_goes_through_a_config(transform):
    fields = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    assert build(target(type(transform), **fields)) == transform


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(37, 53), (53, 37), (40, 40), (1, 30)])
def test_resize_gives_the_short_side_the_size_and_matches_pillow(h, w):
    x = picture(h, w)
    out = apply(T.Resize(24), x)
    size = (24, int(24 * w / h)) if h <= w else (int(24 * h / w), 24)
    assert out.shape == (*size, 3)
    reference = np.asarray(Image.fromarray(x).resize(size[::-1], Image.Resampling.BILINEAR))
    assert difference(out, reference) == 0


def test_resize_antialiases_also_far_down():
    x = picture(640, 640, 1)
    out = apply(T.Resize(40), x)
    reference = np.asarray(Image.fromarray(x[..., 0]).resize((40, 40), Image.Resampling.BILINEAR))[..., None]
    assert difference(out, reference) <= 2
    assert difference(apply(T.Resize(40, "nearest"), x), reference) > 10


def test_resize_by_box_averages_whole_blocks():
    x = picture(12, 18)
    blocks = x.reshape(4, 3, 6, 3, 3).mean((1, 3))
    assert np.abs(apply(T.Resize((4, 6), "box"), x) - blocks).max() <= 1  # rounded along each axis


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(37, 53, 3), (211, 97, 1), (64, 64, 3), (400, 603, 3)])
def test_fused_resize_and_crop_equals_the_two(method, shape):
    x = picture(*shape)
    two = apply(T.CenterCrop((20, 24)), apply(T.Resize(28, method), x))
    assert difference(apply(T.ResizeCenterCrop(28, (20, 24), method), x), two) <= 2


def test_center_crop_cuts_the_middle_and_pads_what_is_too_small():
    x = picture(10, 7, 1)
    np.testing.assert_array_equal(apply(T.CenterCrop((4, 3)), x), x[3:7, 2:5])
    out = apply(T.CenterCrop((12, 10)), x)
    np.testing.assert_array_equal(out[1:11, 1:8], x)
    assert out.sum() == x.sum()


def test_random_resized_crop_draws_area_evenly_and_keeps_ratio_and_bounds():
    crop, rng = T.RandomResizedCrop(8, scale=(0.1, 0.5)), np.random.default_rng(0)
    boxes = np.array([crop.box(300, 300, rng) for _ in range(3000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 300).all() and (left + w <= 300).all()
    area, ratio = h * w / 300**2, w / h
    assert 0.09 < area.min() < 0.11 and 0.49 < area.max() < 0.51
    np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.02)
    assert ratio.min() > 0.73 and ratio.max() < 1.37 and abs(np.log(ratio).mean()) < 0.02
    centre = (top + h / 2).mean(), (left + w / 2).mean()
    np.testing.assert_allclose(centre, (150, 150), atol=4)


def test_random_resized_crop_of_the_whole_is_a_resize():
    x = picture(48, 48)
    out = apply(T.RandomResizedCrop(20, scale=(1.0, 1.0), ratio=(1.0, 1.0)), x)
    np.testing.assert_array_equal(out, apply(T.Resize((20, 20)), x))


def test_random_resized_crop_falls_back_to_the_middle():
    assert T.RandomResizedCrop(8, scale=(0.9, 1.0)).box(10, 100, np.random.default_rng(0)) == (0, 43, 10, 13)


@pytest.mark.parametrize("mode", ["reflect", "edge", "constant"])
def test_random_crop_is_a_window_of_the_padded_picture(mode):
    x = picture(9, 11)
    padded = np.pad(x, [(4, 4), (4, 4), (0, 0)], mode=mode)
    windows = {padded[i : i + 8, j : j + 8].tobytes(): (i, j) for i in range(10) for j in range(12)}
    seen = {windows[apply(T.RandomCrop(8, 4, mode), x, seed).tobytes()] for seed in range(1500)}
    assert len(seen) == 120  # every window comes up


def test_random_flip_flips_by_its_probability():
    x = picture()
    for prob in (0.0, 0.3, 1.0):
        flips = [np.array_equal(apply(T.RandomFlip(prob), x, seed), x[:, ::-1]) for seed in range(400)]
        assert abs(np.mean(flips) - prob) < 0.07 * (0 < prob < 1) + 1e-9


# --- colour -----------------------------------------------------------------------------------------------------------


def test_colour_jitter_without_strength_is_the_identity():
    np.testing.assert_array_equal(apply(T.ColorJitter(), picture()), picture())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_jitter_matches_the_formula(name):
    x, strength = picture(), 0.4
    luma = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    base = {"brightness": 0.0, "contrast": np.round(luma.mean()), "saturation": luma}[name]
    factors = []
    for seed in range(40):
        out = apply(T.ColorJitter(**{name: strength}), x, seed)
        inside = (out > 0) & (out < 255)
        weight, change = (x - base)[inside], (out - base)[inside]
        factor = (weight * change).sum() / (weight * weight).sum()
        assert np.abs(out - (base + factor * (x - base)).clip(0, 255)).max() < 2.5
        factors.append(factor)
    assert 0.58 < min(factors) < 0.7 and 1.3 < max(factors) < 1.42


def test_hue_turns_red_to_every_colour_but_keeps_grey():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    grey = np.full((4, 4, 3), 90, np.uint8)
    jitter = T.ColorJitter(hue=0.5)
    turned = np.array([apply(jitter, red, seed)[0, 0] for seed in range(60)])
    assert (turned.max(1) == 200).all() and (turned.min(1) <= 2).all()
    assert (np.bincount(turned.argmax(1), minlength=3) > 8).all()
    np.testing.assert_array_equal(apply(jitter, grey), grey)


def test_grey_is_bt601_luma():
    x = picture()
    luma = x @ np.array([0.299, 0.587, 0.114])
    assert np.abs(apply(T.Grey(), x)[..., 0] - luma).max() <= 0.51


# --- policies ---------------------------------------------------------------------------------------------------------


def references(level, sign, strength, translate):
    """Every operation by Pillow's other routes, or by numpy."""
    s = {k: sign * level * v for k, v in strength.items()}
    pixels = int(sign * level * translate)

    def shift(a, n, axis):
        out = np.roll(a, n, axis)
        index = [slice(None)] * 3
        index[axis] = slice(0, n) if n >= 0 else slice(n, None)
        out[tuple(index)] = 0
        return out

    def shear(a):  # nearest sample, row by row
        out = np.zeros_like(a)
        for y in range(a.shape[0]):
            at = np.floor(np.arange(a.shape[1]) + 0.5 + s["shear"] * (y + 0.5)).astype(int)
            inside = (at >= 0) & (at < a.shape[1])
            out[y, inside] = a[y, at[inside]]
        return out

    def via_pil(f):
        return lambda a: np.asarray(f(Image.fromarray(a)))

    bits = 8 - round(level * strength["bits"])
    return {
        "identity": lambda a: a,
        "shear_x": shear,
        "shear_y": lambda a: shear(a.transpose(1, 0, 2)).transpose(1, 0, 2),
        "translate_x": lambda a: shift(a, pixels, 1),
        "translate_y": lambda a: shift(a, pixels, 0),
        "rotate": via_pil(lambda i: i.rotate(s["rotate"], Image.Resampling.NEAREST)),
        "brightness": via_pil(lambda i: ImageEnhance.Brightness(i).enhance(1 + s["enhance"])),
        "color": via_pil(lambda i: ImageEnhance.Color(i).enhance(1 + s["enhance"])),
        "contrast": via_pil(lambda i: ImageEnhance.Contrast(i).enhance(1 + s["enhance"])),
        "sharpness": via_pil(lambda i: ImageEnhance.Sharpness(i).enhance(1 + s["enhance"])),
        "posterize": lambda a: a & np.uint8(256 - 2 ** (8 - bits)),
        "solarize": lambda a: np.where(a < 255 * (1 - level), a, 255 - a),
        "autocontrast": via_pil(ImageOps.autocontrast),
        "equalize": via_pil(ImageOps.equalize),
    }


WIDE = {"shear": 0.99, "rotate": 135.0, "enhance": 0.99, "bits": 6.0}


@pytest.mark.parametrize("op", T._OPS)
@pytest.mark.parametrize(("level", "sign"), [(0.0, 1.0), (0.4, -1.0), (1.0, 1.0)])
def test_operations_match_their_references(op, level, sign):
    x = picture(40, 48)
    if op == "identity":
        return
    out, _ = T._operated(x, [(op, level, sign)], WIDE | {"translate": 32.0}, T.TrivialAugment())
    np.testing.assert_array_equal(out, references(level, sign, WIDE, 32.0)[op](x))


def test_trivial_augment_draws_from_the_whole_space():
    x = picture(24, 24)
    bins = 5
    names = {}
    for i in range(bins):
        for sign in (1.0, -1.0):
            for op, f in references(i / (bins - 1), sign, WIDE, 32.0).items():
                names.setdefault(f(x).tobytes(), op)
    seen = [names[apply(T.TrivialAugment(bins), x, seed).tobytes()] for seed in range(600)]
    counts = {op: seen.count(op) for op in T._OPS}
    assert all(10 < counts[op] < 110 for op in T._OPS if op != "identity"), counts
    assert counts["identity"] > 30  # and all that level 0 leaves as it is


def test_rand_augment_repeats_and_none_is_the_identity():
    x = picture()
    np.testing.assert_array_equal(apply(T.RandAugment(0), x), x)
    strength = {"shear": 0.3, "rotate": 30.0, "enhance": 0.9, "bits": 4.0}
    singles = {
        f(x).tobytes()
        for sign in (1.0, -1.0)
        for side in (37, 53)
        for f in references(9 / 30, sign, strength, 150 / 331 * side).values()
    }
    assert all(apply(T.RandAugment(1, 9), x, seed).tobytes() in singles for seed in range(60))
    assert not all(apply(T.RandAugment(2, 9), x, seed).tobytes() in singles for seed in range(60))


def test_random_erasing_overwrites_one_box_of_the_right_size():
    x = np.full((64, 48, 3), 7, np.uint8)
    areas = []
    for seed in range(300):
        changed = (apply(T.RandomErasing(1.0, value=200.0), x, seed) == 200).all(-1)
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum()
        areas.append(changed.mean())
    assert 0.01 < min(areas) < 0.04 and 0.30 < max(areas) < 0.35
    noise = apply(T.RandomErasing(1.0), x, 0)
    assert len(np.unique(noise)) > 50
    share = np.mean([(apply(T.RandomErasing(0.25), x, seed) != x).any() for seed in range(400)])
    assert abs(share - 0.25) < 0.07


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: T.Resize(0), "above 0"),
        (lambda: T.Resize((3,)), "height, width"),
        (lambda: T.Resize(8, "bilinaer"), "bilinear"),
        (lambda: T.ResizeCenterCrop(24, 32), "enlarge resize"),
        (lambda: T.RandomResizedCrop(8, scale=(0.5, 0.1)), "low < high|low <= high"),
        (lambda: T.RandomCrop(8, mode="reflct"), "reflect"),
        (lambda: T.RandomFlip(2.0), "within"),
        (lambda: T.ColorJitter(hue=0.7), "0.5"),
        (lambda: T.RandAugment(2, 31), "30"),
        (lambda: T.RandomErasing(value="mean"), "random"),
        (lambda: apply(T.RandomCrop(50), picture()), "resize first"),
        (lambda: apply(T.Resize(8), picture().astype(np.float32)), "comes last"),
        (lambda: T.Grey()({"x": 1}, np.random.default_rng(0)), "'image'"),
    ],
)
def test_mistakes_are_explained(make, says):
    with pytest.raises(UserError, match=says):
        make()
