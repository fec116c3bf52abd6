import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from toys import Regression, regression_batch

from bigbase_jax import parallel
from bigbase_jax.plan.hlo import Collective, Module, bits


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def conv(x, k, stride=1, padding="SAME", groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, k, (stride, stride), padding, dimension_numbers=dims, feature_group_count=groups
    )


def dense(w, y):
    return jnp.sum(jnp.tanh(y @ w) @ w)


def scanned(w, y_N):
    return jax.lax.scan(lambda c, y: (jnp.tanh((c + y) @ w), None), jnp.zeros_like(y_N[0]), y_N)[0].sum()


X, K, W, Y = jnp.ones((8, 20, 24, 4)), jnp.ones((5, 3, 4, 6)), jnp.ones((64, 64)), jnp.ones((32, 64))


@pytest.mark.parametrize(
    "program",
    [
        lambda: compiled(conv, X, K),
        lambda: compiled(functools.partial(conv, stride=2, padding="VALID"), X, K),
        lambda: compiled(functools.partial(conv, groups=2), X, jnp.ones((3, 3, 2, 6))),
        lambda: compiled(jax.grad(lambda k, x: jnp.tanh(conv(x, k, 2)).sum(), (0, 1)), K, X),
        lambda: compiled(jax.grad(dense), W, Y),
        lambda: compiled(lambda x: jnp.einsum("blhk,bmhk->bhlm", x, x), jnp.ones((2, 16, 4, 8))),
    ],
    ids=["conv", "strided", "grouped", "conv gradient", "dense gradient", "einsum"],
)
def test_without_loops_the_counts_are_the_compilers(program):
    program = program()
    work, analysis = Module(program.as_text()).work(), program.cost_analysis()
    assert work.flops > 1000
    assert work.flops == pytest.approx(analysis["flops"], rel=2e-3)
    assert work.memory_bytes == pytest.approx(analysis["bytes accessed"], rel=1e-2)


def turns_of(module):
    """How often each loop turns."""
    instructions = [(c, i) for c in module.computations.values() for i in c.instructions.values()]
    return [module.trip_count(c, i) for c, i in instructions if i.opcode == "while"]


def test_a_loop_counts_as_often_as_it_turns():
    one = 2 * Y.size * W.shape[1]
    program = compiled(scanned, W, jnp.ones((7, *Y.shape)))
    assert program.cost_analysis()["flops"] < 2 * one  # the compiler counts the body once, which this test is about
    module = Module(program.as_text())
    assert turns_of(module) == [7]
    assert module.work().matmul_flops == {"f32": 7 * one}
    assert module.work(loops=False).flops == pytest.approx(program.cost_analysis()["flops"], rel=2e-3)
    assert module.work().unknown_loops == 0
    backward = Module(compiled(jax.grad(scanned), W, jnp.ones((7, *Y.shape))).as_text())
    assert backward.work().matmul_flops == {"f32": pytest.approx(3 * 7 * one, rel=0.1)}  # less what is hoisted


def test_nested_loops_multiply():
    def fn(w, y):
        inner = lambda _, y: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), y)  # noqa: E731
        return jax.lax.fori_loop(2, 12, inner, y)

    assert Module(compiled(fn, W, Y).as_text()).work().matmul_flops == {"f32": 10 * 3 * 2 * Y.size * W.shape[1]}


def test_a_loop_that_ends_by_its_data_is_unknown():
    text = compiled(lambda y: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, y), Y).as_text()
    assert Module(text).work().unknown_loops == 1


def test_the_text_before_optimisation_tells_the_types_of_the_products():
    lowered = jax.jit(lambda a, w: (a.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) @ w).lower(
        Y, W
    )
    work = Module(lowered.compiler_ir("hlo").as_hlo_text()).work()
    assert work.matmul_flops == {"bf16": 2 * Y.size * 64, "f32": 2 * Y.size * 64}


@pytest.mark.parametrize("microbatches", [1, 4])
def test_accumulated_steps_do_the_work_of_whole_ones(microbatches):
    batch = regression_batch(64)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    mesh = parallel.make_mesh()
    program = parallel.program(Regression(), optax.sgd(0.1), spec, mesh, microbatches=microbatches)
    step = program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile()
    module = Module(step.as_text())
    assert turns_of(module) == ([microbatches] if microbatches > 1 else [])
    forward = 64 * (2 * 3 * 5 + 2 * 5 * 1)  # the backward pass does as much: no gradient of the inputs is wanted
    assert sum(module.work().matmul_flops.values()) * mesh.size == pytest.approx(2 * forward, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "fn", "moved"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "i"), 2 * 7 / 8 * 4096),
        ("all-gather", lambda x: jax.lax.all_gather(x, "i", tiled=True), 7 / 8 * 8 * 4096),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "i", tiled=True), 7 / 8 * 4096),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "i", 0, 0, tiled=True), 7 / 8 * 4096),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "i", [(i, (i + 1) % 8) for i in range(8)]), 4096),
    ],
)
def test_collectives_and_what_each_device_sends(kind, fn, moved):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False)
    work = Module(compiled(mapped, jnp.ones((8 * 1024,))).as_text()).work()
    assert work.collective_bytes() == {kind: pytest.approx(moved)}
    assert len(work.collectives[0].group) == (2 if kind == "collective-permute" else 8)


def test_groups_are_the_devices_that_talk():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for axis, group in (("a", (0, 4)), ("b", (0, 1, 2, 3))):
        mapped = jax.shard_map(
            functools.partial(jax.lax.psum, axis_name=axis),
            mesh=mesh,
            in_specs=P("a", "b"),
            out_specs=P("a", "b"),
            check_vma=False,
        )
        work = Module(compiled(mapped, jnp.ones((8, 8))).as_text()).work()
        assert work.collectives[0].group == group


TPU = """HloModule jit_f, is_scheduled=true, num_partitions=16

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %reduce = f32[8,4]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) tuple(%next, %reduce)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%piece (a: bf16[2,4]) -> bf16[8,4] {
  %a = bf16[2,4]{1,0} parameter(0)
  ROOT %gather = bf16[8,4]{1,0} all-gather(%a), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), x={chain_id="0"}
}

%other_piece (a: bf16[2,4]) -> bf16[8,4] {
  %a.1 = bf16[2,4]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,4]{1,0} all-gather(%a.1), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), x={chain_id="0"}
}

ENTRY %main (x: f32[8,4], a: bf16[2,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %a.2 = bf16[2,4]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)} copy(%zero)
  %start = bf16[8,4]{1,0} fusion(%a.2), kind=kCustom, calls=%piece
  %done = bf16[8,4]{1,0} fusion(%a.2), kind=kCustom, calls=%other_piece
  %in = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) tuple(%copied, %x.1)
  %loop = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) while(%in), condition=%condition, body=%body
  %y = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %send = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-start(%y), replica_groups=GROUPS, to_apply=%add
  ROOT %sent = f32[8,4]{1,0} all-reduce-done(%send)
}
"""


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", (0, 1, 2, 3)),
        ("[4,4]<=[16]", (0, 1, 2, 3)),
        ("[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", (0, 4, 8, 12)),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=16] {'axis_0':(1)4}", (0, 4, 8, 12)),
        ("{}", tuple(range(16))),
    ],
)
def test_the_tpu_compilers_text(groups, first):
    """Loops without a noted count, scratch memory, tiled layouts, pieces of one collective, starts and dones."""
    module = Module(TPU.replace("GROUPS", groups))
    assert module.devices == 16
    assert turns_of(module) == [3]  # from 2 to 5
    work = module.work()
    reduces = [c for c in work.collectives if c.kind == "all-reduce"]
    assert sorted(c.times for c in reduces) == [1, 3]
    assert {c.group for c in reduces} == {first}
    gathers = [c for c in work.collectives if c.kind == "all-gather"]
    assert len(gathers) == 1 and gathers[0].group == (0, 4, 8, 12)
    assert gathers[0].moved == 3 / 4 * 8 * 4 * 2
    n = len(first)
    assert work.collective_bytes()["all-reduce"] == 4 * 2 * (n - 1) / n * 8 * 4 * 4


def test_a_group_of_one_moves_nothing():
    assert Collective("all-reduce", (3,), 100.0, 1.0).moved == 0


def test_bits_of_types():
    assert [bits(t) for t in ("f32", "bf16", "f8e4m3fn", "s4", "pred", "c64", "token")] == [32, 16, 8, 4, 8, 64, 0]


def test_slices_of_a_stack_do_not_count_as_the_whole():
    """A loop over stacked layers reads one layer a turn."""
    stack = jnp.ones((32, 64, 64))
    text = compiled(lambda s, y: jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, s)[0], stack, Y).as_text()
    touched = Module(text).work().memory_bytes
    assert 1.0 < touched / (stack.nbytes + 32 * 3 * Y.nbytes) < 4
    assert touched < 32 * np.prod(stack.shape) * 4 / 4  # the whole stack every turn would be eight times that


def test_slices_inside_of_fusions_in_fusions_count_as_slices():
    """As the TPU compiler writes a scanned layer: the stack is sliced two fusions down, and updated in place."""
    text = """HloModule jit_f, num_partitions=1

%slice (p: bf16[40,8,128], i: s32[]) -> bf16[8,128] {
  %p = bf16[40,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %cut = bf16[1,8,128]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,8,128}
  ROOT %flat = bf16[8,128]{1,0} bitcast(%cut)
}

%layer (q: bf16[40,8,128], j: s32[], old: f32[40,8,128]) -> f32[40,8,128] {
  %q = bf16[40,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %old = f32[40,8,128]{2,1,0} parameter(2)
  %view = bf16[40,8,128]{2,1,0} bitcast(%q)
  %piece = bf16[8,128]{1,0} fusion(%view, %j), kind=kLoop, calls=%slice
  %wide = f32[8,128]{1,0} convert(%piece)
  %one = f32[1,8,128]{2,1,0} bitcast(%wide)
  ROOT %new = f32[40,8,128]{2,1,0} dynamic-update-slice(%old, %one, %j, %j, %j)
}

ENTRY %main (stack: bf16[40,8,128], k: s32[], sums: f32[40,8,128]) -> f32[40,8,128] {
  %stack = bf16[40,8,128]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %sums = f32[40,8,128]{2,1,0} parameter(2)
  ROOT %done = f32[40,8,128]{2,1,0} fusion(%stack, %k, %sums), kind=kLoop, calls=%layer
}
"""
    assert Module(text).work().memory_bytes == pytest.approx(8 * 128 * (2 + 4), abs=32)
    whole = text.replace("convert(%piece)", "convert(%piece), control-predecessors={}").replace(
        "ROOT %new", "%all = f32[40,8,128]{2,1,0} convert(%q)\n  ROOT %new"
    )
    assert Module(whole).work().memory_bytes > 40 * 8 * 128 * 2  # another reader takes all of it


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("", "", 3),
        ("constant(5)", "constant(50)", 48),
        ("one = s32[]{:T(128)} constant(1)", "one = s32[]{:T(128)} constant(2)", 2),  # 2, 4
        (  # an unrolled turn
            "%next = s32[]{:T(128)} add(%i, %one)",
            "%half = s32[]{:T(128)} add(%i, %one)\n  %next = s32[]{:T(128)} add(%half, %one)",
            2,
        ),
        ("compare(%i.1, %limit), direction=LT", "compare(%limit, %i.1), direction=GT", 3),
        ("direction=LT", "direction=LE", 4),
        ("direction=LT", "direction=GT", None),  # a step away from the limit
        ("add(%i, %one)", "add(%i, %i)", 2),  # 2, 4: only the first turn's step is looked at
        ("%copied = s32[]{:T(128)} copy(%zero)", "%copied = s32[]{:T(128)} negate(%zero)", None),
    ],
)
def test_turns_from_start_step_and_limit(old, new, turns):
    text = TPU.replace("GROUPS", "{}")
    assert old in text
    assert turns_of(Module(text.replace(old, new) if old else text)) == [turns]
