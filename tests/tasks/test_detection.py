"""Detection: targets and losses by hand, measures as pycocotools', answers in original pixels, what is drawn."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from PIL import Image

from bigbase_jax.core import Evaluated, Gallery, Plot, Table, UserError
from bigbase_jax.data.transforms import boxes as T
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.fcos import FCOS, Dense
from bigbase_jax.models.fpn import FeaturePyramid
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.tasks.dense_detection import DenseDetection, centreness, focal
from bigbase_jax.tasks.detection import original
from bigbase_jax.tasks.metrics import boxes as measures

MODEL = FCOS(ConvNet(stages=(4, 4, 4, 4), dense=0, norm=True, pool="mean"), levels=2, width=8, depth=1, groups=2)
TASK = DenseDetection(MODEL.clone(num_classes=2), class_names=("cat", "dog"), keep=10, candidates=20)


def rectangle(seed):
    """A dark picture with a bright rectangle, and its box."""
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(5, 40, 2)
    x1, y1 = x0 + rng.integers(10, 30), y0 + rng.integers(10, 20)
    image = np.full((60, 80, 3), 20, np.uint8)
    image[y0:y1, x0:x1] = 255
    return {
        "image": image,
        "boxes": np.float32([[x0, y0, min(x1, 80), min(y1, 60)]]),
        "classes": np.int32([0]),
        "crowd": np.float32([0]),
    }


def places(size, strides):
    found = [(x, y, s) for s in strides for y in np.arange(s / 2, size, s) for x in np.arange(s / 2, size, s)]
    return np.array([p[:2] for p in found], np.float32), np.array([p[2] for p in found], np.float32)


def said(size=64, strides=(8.0, 16.0), classes=2, logit=-4.0):
    """A model that sees nothing: boxes of no size where its places are."""
    place_N2, stride_N = places(size, strides)
    n = len(place_N2)
    return Dense(
        jnp.full((1, n, classes), logit), jnp.tile(place_N2, 2)[None], jnp.zeros((1, n)), jnp.array(place_N2), stride_N
    )


def labelled(boxes, classes, crowd=None, most=4):
    count = len(boxes)
    pad = [(0, most - count)]
    return {
        "boxes": jnp.pad(jnp.array(boxes, jnp.float32).reshape(-1, 4), [*pad, (0, 0)])[None],
        "classes": jnp.pad(jnp.array(classes, jnp.int32), pad)[None],
        "crowd": jnp.pad(jnp.array(crowd or [0] * count, jnp.float32), pad)[None],
        "box_mask": jnp.pad(jnp.ones(count), pad)[None],
        "mask": jnp.ones(1),
    }


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_places_of_a_model_cover_the_picture_at_each_stride():
    x = jnp.zeros((1, 64, 96, 3))
    found = jax.eval_shape(lambda: MODEL.clone(num_classes=3).init_with_output(jax.random.key(0), x)[0])
    n = 8 * 12 + 4 * 6
    assert (found.logits.shape, found.boxes.shape, found.centre.shape) == ((1, n, 3), (1, n, 4), (1, n))
    given, _ = MODEL.clone(num_classes=1).init_with_output(jax.random.key(0), x[:, :, :64])
    place_N2, stride_N = places(64, (8.0, 16.0))
    np.testing.assert_allclose(given.places, place_N2)
    np.testing.assert_allclose(given.strides, stride_N)
    assert (given.boxes[0, :, 0] < place_N2[:, 0]).all() and (given.boxes[0, :, 3] > place_N2[:, 1]).all()
    np.testing.assert_allclose(jax.nn.sigmoid(given.logits).mean(), 0.01, rtol=0.2)


def test_odd_pictures_and_coarser_maps():
    model = FCOS(ResNet(depth=18, width=4), 2, levels=2, coarser=2, width=8, depth=1, groups=2)
    x = jnp.zeros((1, 72, 40, 3))
    found = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x)[0])
    assert found.places.shape == (5 * 3 + 3 * 2 + 2 * 1 + 1, 2)
    with pytest.raises(ModelError, match=r"gives 4 maps, fewer than levels=5"):
        jax.eval_shape(model.clone(levels=5).init, jax.random.key(0), x)


def test_a_pyramid_adds_the_coarse_to_the_fine():
    maps = [jnp.zeros((1, 6, 4, 3)), jnp.ones((1, 3, 2, 5))]
    pyramid = FeaturePyramid(2)
    variables = pyramid.init(jax.random.key(0), maps)
    fine, coarse = pyramid.apply(variables, maps)
    assert fine.shape == (1, 6, 4, 2) and coarse.shape == (1, 3, 2, 2)
    assert not np.allclose(fine, pyramid.apply(variables, [maps[0], 0 * maps[1]])[0])
    np.testing.assert_array_equal(coarse, pyramid.apply(variables, [maps[0] + 1, maps[1]])[1])


# --- targets and losses -----------------------------------------------------------------------------------------------


def test_which_place_learns_which_object():
    batch = labelled([[10, 10, 30, 30], [0, 0, 64, 64], [16, 16, 24, 24]], [0, 1, 0])
    object_BN, learnt_BN = TASK.targets(said(), batch)
    place_N2, stride_N = places(64, (8.0, 16.0))
    inside = np.zeros(len(place_N2), int) - 1
    for n, ((x, y), s) in enumerate(zip(place_N2, stride_N, strict=True)):
        for m in (1, 0, 2):  # from the largest to the smallest
            a, b, c, d = np.asarray(batch["boxes"][0, m])
            far = max(x - a, y - b, c - x, d - y)
            near = max(abs(x - (a + c) / 2), abs(y - (b + d) / 2)) < 1.5 * s
            if min(x - a, y - b, c - x, d - y) > 0 and near and (far <= 64 if s == 8 else far > 64):
                inside[n] = m
    np.testing.assert_array_equal(object_BN[0], inside)
    assert {0, 1, 2} & set(inside.tolist()) >= {0, 2} and learnt_BN.min() == 1


def test_the_coarsest_map_takes_what_is_too_large_for_the_finer():
    object_BN, _ = TASK.targets(said(256, (8.0, 16.0)), labelled([[0, 0, 250, 250]], [0]))
    of = places(256, (8.0, 16.0))[1][np.asarray(object_BN[0]) >= 0]
    assert len(of) and set(of.tolist()) == {16.0}


def test_a_crowd_is_neither_learnt_as_objects_nor_as_background():
    plain, crowd = labelled([[8, 8, 40, 40]], [0]), labelled([[8, 8, 40, 40]], [0], [1])
    object_BN, learnt_BN = TASK.targets(said(), crowd)
    assert int(object_BN.max()) == -1
    place_N2, _ = places(64, (8.0, 16.0))
    within = ((place_N2 > 8) & (place_N2 < 40)).all(1)
    np.testing.assert_array_equal(learnt_BN[0] == 0, within)
    gradient = jax.grad(lambda x: TASK.terms(said()._replace(logits=x), crowd)["class"][0].sum())(said().logits)
    assert (np.asarray(gradient[0, within]) == 0).all() and (np.asarray(gradient[0, ~within]) > 0).all()
    assert TASK.terms(said(), plain)["class"][0] != TASK.terms(said(), crowd)["class"][0]


def test_a_picture_without_boxes_is_background_and_its_loss_is_finite():
    terms = TASK.terms(said(), labelled([], []))
    assert all(np.isfinite(x).all() and w.min() > 0 for x, w in terms.values())
    assert terms["box"][0] == 0 and terms["centre"][0] == 0 and terms["class"][0] > 0


def test_a_perfect_answer_has_hardly_any_loss():
    batch = labelled([[10, 10, 30, 30]], [1])
    outputs = said(logit=-12.0)
    object_BN, _ = TASK.targets(outputs, batch)
    is_N = np.asarray(object_BN[0]) >= 0
    box = np.float32([10, 10, 30, 30])
    near = np.asarray(centreness(outputs.places, jnp.broadcast_to(box, (1, len(is_N), 4))))
    logits = np.array(outputs.logits)
    logits[0, is_N, 1] = 12
    boxes = np.where(is_N[:, None], box, outputs.boxes[0])[None]
    z = np.log(np.maximum(near, 1e-6) / np.maximum(1 - near, 1e-6))
    perfect = outputs._replace(logits=jnp.array(logits), boxes=jnp.array(boxes), centre=jnp.array(z))
    terms = {name: float(x[0] / w[0]) for name, (x, w) in TASK.terms(perfect, batch).items()}
    assert terms["class"] < 1e-3 and abs(terms["box"]) < 1e-5
    worse = {name: float(x[0] / w[0]) for name, (x, w) in TASK.terms(outputs, batch).items()}
    assert all(worse[name] > terms[name] + 0.01 for name in terms)


def test_the_focal_loss_is_the_papers():
    for p, y in ((0.9, 1.0), (0.9, 0.0), (0.2, 1.0)):
        right = p if y else 1 - p
        wanted = -(0.25 if y else 0.75) * (1 - right) ** 2 * np.log(right)
        np.testing.assert_allclose(focal(jnp.log(p / (1 - p)), jnp.array(y)), wanted, rtol=1e-4)


def test_padding_and_masked_pictures_change_nothing():
    batch = {**labelled([[10, 10, 30, 30]], [1]), "image": jnp.ones((1, 64, 64, 3))}
    wide = {**batch, **labelled([[10, 10, 30, 30]], [1], most=9)}
    variables = TASK.init(jax.random.key(0), batch)
    one, _ = TASK.loss(variables, batch, jax.random.key(1))
    two, _ = TASK.loss(variables, wide, jax.random.key(1))
    for name in one.terms:
        np.testing.assert_allclose(one.terms[name].mean(), two.terms[name].mean(), rtol=1e-5)
    doubled = {name: jnp.concatenate([x, x]) for name, x in batch.items()}
    masked, _ = TASK.loss(variables, {**doubled, "mask": jnp.array([1.0, 0.0])}, jax.random.key(1))
    assert all(masked.terms[name].weight == one.terms[name].weight for name in one.terms)


def test_detections_are_the_best_boxes_without_their_doubles():
    outputs = said()
    logits = np.full(outputs.logits.shape, -9.0, np.float32)
    boxes = np.array(outputs.boxes)
    for n, (score, kind, box) in enumerate(
        [(2, 0, [8, 8, 30, 30]), (3, 0, [9, 9, 31, 31]), (1, 1, [8, 8, 30, 30]), (2.5, 0, [40, 40, 90, 60])]
    ):
        logits[0, n, kind], boxes[0, n] = score, box
    found = TASK.detections(
        outputs._replace(logits=jnp.array(logits), boxes=jnp.array(boxes), centre=outputs.centre + 9), (64, 64)
    )
    assert found.classes[0, :3].tolist() == [0, 0, 1] and found.scores.shape == (1, 10)
    assert found.boxes[0, :3].tolist() == [[9, 9, 31, 31], [40, 40, 64, 60], [8, 8, 30, 30]]
    assert (found.scores[0, 3:] == 0).all() and (np.diff(found.scores[0]) <= 0).all()


# --- measures ---------------------------------------------------------------------------------------------------------


def evaluated(boxes, scores, classes, true_boxes, true_classes, crowd=None):
    """One picture."""
    arrays = {
        "boxes": np.float32(boxes).reshape(1, -1, 4),
        "scores": np.float32([scores]),
        "classes": np.int32([classes]),
        "true_boxes": np.float32(true_boxes).reshape(1, -1, 4),
        "true_classes": np.int32([true_classes]),
        "true_crowd": np.float32([crowd or [0] * len(true_classes)]),
        "size": np.int32([[100, 100]]),
        "index": np.int32([0]),
    }
    return arrays


A, B, FAR = [10, 10, 50, 50], [60, 60, 90, 90], [0, 70, 20, 95]


def test_average_precision_by_hand():
    pytest.importorskip("pycocotools")
    perfect = measures.scores(evaluated([A, B], [0.9, 0.8], [0, 0], [A, B], [0, 0]), ["x"])
    assert (perfect["map"], perfect["map50"], perfect["recall"]) == pytest.approx((1, 1, 1))
    half = measures.scores(evaluated([A, FAR], [0.9, 0.8], [0, 0], [A, B], [0, 0]), ["x"])
    assert half["map50"] == pytest.approx(51 / 101) and half["recall"] == 0.5
    loose = measures.scores(evaluated([[10, 10, 50, 42]], [0.9], [0], [A], [0]), ["x"])  # IoU 0.8
    assert (loose["map50"], loose["map75"], loose["map"]) == pytest.approx((1, 1, 0.7))
    wrong = measures.scores(evaluated([A], [0.9], [1], [A], [0]), ["x", "y"])
    assert wrong["map"] == 0 and set(wrong["per_class"]) == {"x"}
    assert measures.scores(evaluated([A], [0.0], [0], [A], [0]), ["x"])["map50"] == 0
    assert "map_large" not in perfect and perfect["map_medium"] == perfect["map_small"] == pytest.approx(1)


def test_crowds_are_neither_found_nor_missed():
    pytest.importorskip("pycocotools")
    found = measures.scores(evaluated([A, B, B], [0.9, 0.8, 0.7], [0] * 3, [A, B], [0, 0], [0, 1]), ["x"])
    assert found["map50"] == pytest.approx(1) and found["per_class"]["x"]["objects"] == 1
    errors = measures.errors(evaluated([A, B], [0.9, 0.8], [0] * 2, [A, B], [0, 0], [0, 1]), 1)
    assert errors.false == [] and errors.missed == []


def test_false_positives_and_misses_by_confidence():
    pytest.importorskip("pycocotools")
    examples = evaluated([B, FAR, A, A], [0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0], [A, B, FAR, [0, 0, 5, 5]], [0, 0, 0, -1])
    errors = measures.errors(examples, 2)
    assert errors.false == [(0, 0), (0, 3)]
    assert [(n, m) for n, m, _ in errors.missed] == [(0, 1)] and errors.missed[0][2] == pytest.approx(0.9)
    figures = list(TASK.figures(Evaluated("test", measures.scores(examples, ["cat", "dog"]), examples)))
    assert [type(figure) for figure in figures] == [Table, Plot, Gallery, Gallery]
    assert "AP50" in figures[0].columns and list(figures[1].series) == ["cat"]
    assert figures[2].cards[0].caption == "said dog 90.0 %" and figures[2].cards[0].boxes[0][:4] == (0.6, 0.6, 0.9, 0.9)
    assert figures[3].cards[0].caption == "missed cat; best on it 90.0 %"


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_in_pixels_of_the_original_picture_and_drawn_on_it():
    picture = np.zeros((40, 80, 3), np.uint8)
    example = T.Letterbox((64, 64))({"image": picture, "original": picture}, np.random.default_rng(0))
    box = np.array([20, 10, 60, 30]) * 0.8 + [0, 16, 0, 16]
    output = {"boxes": np.array([box, box]), "scores": np.array([0.9, 0.1]), "classes": np.array([1, 0])}
    answer = TASK.postprocess(output, example)
    assert answer == {"objects": [{"label": "dog", "score": 0.9, "box": [20, 10, 60, 30]}], "width": 80, "height": 40}
    drawn = np.asarray(Image.open(io.BytesIO(TASK.rendered(output, example).data)))
    assert drawn.shape == picture.shape and (drawn[30, 20:60].max(-1) > 0).all() and drawn[35:].max() == 0
    small = np.asarray(Image.open(io.BytesIO(TASK.rendered(output, {**example, "original": None} | example).data)))
    assert small.shape == picture.shape
    del example["original"]
    assert np.asarray(Image.open(io.BytesIO(TASK.rendered(output, example).data))).shape == (64, 64, 3)


def test_arguments_that_do_not_fit():
    with pytest.raises(UserError, match=r"numbers of classes disagree \(class_names: 3, model.num_classes: 2\)"):
        DenseDetection(MODEL.clone(num_classes=2), class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="candidates is 5, fewer than keep=10"):
        DenseDetection(MODEL, keep=10, candidates=5)
    with pytest.raises(UserError, match="shown 2"):
        DenseDetection(MODEL, shown=2)


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 64), (96, 40)])
def test_a_bright_rectangle_stays_where_its_box_says_in_random_views(size):
    view = T.RandomView(size, scale=(0.5, 2.0), vertical=0.5)
    seen = set()
    for seed in range(60):
        example = view(rectangle(seed), np.random.default_rng(seed))
        seen.add(tuple(np.sign(example["scale"]).tolist()))
        assert example["image"].shape == (*size, 3)
        shown = example["image"][..., 0] > 180
        if not example["box_valid"][0]:
            assert shown.sum() <= 2 * sum(size)
            continue
        box, (ys, xs) = example["boxes"][0], np.nonzero(shown)
        if len(xs) and min(np.ptp(xs), np.ptp(ys)) > 3:
            np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.6)
            whole = rectangle(seed)["boxes"][0] * np.tile(np.abs(example["scale"]), 2)
            left = (box[2:] - box[:2]).prod() / (whole[2:] - whole[:2]).prod()
            assert example["crowd"][0] == float(left < 0.3) or abs(left - 0.3) < 0.02
        back = original(example["boxes"], example)
        low, high = np.minimum(back[0, :2], back[0, 2:]), np.maximum(back[0, :2], back[0, 2:])
        given = rectangle(seed)["boxes"][0]
        assert (low > given[:2] - 0.1).all() and (high < given[2:] + 0.1).all()
    assert len(seen) == 4


def test_a_detector_is_exported_at_a_free_batch():
    task = DenseDetection(MODEL.clone(num_classes=3), keep=5, candidates=20)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    variables = jax.eval_shape(task.init, jax.random.key(0), {"image": image})
    (batch,) = export.symbolic_shape("B")
    given = {"image": jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.uint8)}
    exported = export.export(jax.jit(task.predict))(variables, given)
    assert sorted(str(x.shape) for x in exported.out_avals) == ["(B, 5)", "(B, 5)", "(B, 5, 4)"]
