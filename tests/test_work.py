"""What instructions of a compiled program compute and move."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.hlo import costs, text, work

# a loop of five steps over the layers of a stack in main memory: each reads its own layer, keeps a
# product in the chip's memory and writes a slice of the result
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[5,64,32], param_1: s32[], param_2: f32[16,64]) -> f32[16,32] {
  %param_0 = f32[5,64,32]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = f32[1,64,32]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), \
dynamic_slice_sizes={1,64,32}
  %matrix = f32[64,32]{1,0} bitcast(%layer)
  %param_2 = f32[16,64]{1,0} parameter(2)
  ROOT %dot = f32[16,32]{1,0} dot(%param_2, %matrix), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%update (param_0.1: f32[5,16,32], param_1.1: f32[16,32], param_2.1: s32[]) -> f32[5,16,32] {
  %param_0.1 = f32[5,16,32]{2,1,0} parameter(0)
  %param_1.1 = f32[16,32]{1,0} parameter(1)
  %row = f32[1,16,32]{2,1,0} bitcast(%param_1.1)
  %param_2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = f32[5,16,32]{2,1,0} dynamic-update-slice(%param_0.1, %row, %param_2.1, %zero.1, \
%zero.1)
}

%body (state: (s32[], f32[5,64,32], f32[16,64], f32[5,16,32])) -> \
(s32[], f32[5,64,32], f32[16,64], f32[5,16,32]) {
  %state = (s32[], f32[5,64,32]{2,1,0}, f32[16,64]{1,0}, f32[5,16,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[5,64,32]{2,1,0} get-tuple-element(%state), index=1
  %input = f32[16,64]{1,0} get-tuple-element(%state), index=2
  %out = f32[5,16,32]{2,1,0} get-tuple-element(%state), index=3
  %product = f32[16,32]{1,0:T(8,128)S(1)} fusion(%stack, %i, %input), kind=kOutput, \
calls=%fused, backend_config={"estimated_cycles":"700"}
  %next = f32[5,16,32]{2,1,0} fusion(%out, %product, %i), kind=kLoop, calls=%update
  ROOT %tuple = (s32[], f32[5,64,32]{2,1,0}, f32[16,64]{1,0}, f32[5,16,32]{2,1,0}) \
tuple(%i, %stack, %input, %next)
}

%condition (state.1: (s32[], f32[5,64,32], f32[16,64], f32[5,16,32])) -> pred[] {
  %state.1 = (s32[], f32[5,64,32]{2,1,0}, f32[16,64]{1,0}, f32[5,16,32]{2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (first: (s32[], f32[5,64,32], f32[16,64], f32[5,16,32])) -> \
(s32[], f32[5,64,32], f32[16,64], f32[5,16,32]) {
  %first = (s32[], f32[5,64,32]{2,1,0}, f32[16,64]{1,0}, f32[5,16,32]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], f32[5,64,32]{2,1,0}, f32[16,64]{1,0}, f32[5,16,32]{2,1,0}) \
while(%first), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_a_loop_reads_its_own_slices_and_keeps_what_the_chip_holds():
    product, update = (one for one in work.work(text.parse(PROGRAM)) if one.bytes)
    # a layer of 64 x 32, the number of the step, and an input of 16 x 64; the result stays
    assert product == work.Work(2 * 16 * 64 * 32, 4 * (64 * 32 + 1 + 16 * 64), 700, 5, "")
    # the number of the step, and the 16 x 32 that are written; what it writes was on the chip
    assert update == work.Work(0, 4 * (1 + 16 * 32), 0, 5, "")


def test_loops_of_unknown_length_run_as_often_as_is_said():
    unknown = text.parse(PROGRAM.replace('"known_trip_count":{"n":"5"}', ""))
    times = {one.times for one in work.work(unknown, {"": 2.5})}
    assert times == {2.5}


def test_the_work_of_a_compiled_product_is_what_is_written_down():
    left, right = jnp.ones((48, 96)), jnp.ones((96, 64))
    lowered: Any = jax.jit(lambda a, b: jnp.tanh(a @ b))
    found = text.parse(lowered.lower(left, right).compile().as_text())
    done = list(work.work(found))
    assert sum(one.flops * one.times for one in done) == 2 * 48 * 96 * 64 == costs.flops(found)
    arguments = 4 * (48 * 96 + 96 * 64)
    # the product is written, and at most once more read and written
    result = 4 * 48 * 64
    moved = sum(one.bytes * one.times for one in done)
    assert arguments + result <= moved <= arguments + 3 * result


def test_an_asynchronous_copy_reads_and_writes_once():
    body = """HloModule jit_f

ENTRY %main (first: f32[256]) -> f32[256] {
  %first = f32[256]{0} parameter(0)
  %start = (f32[256]{0:S(1)}, f32[256]{0}, u32[]) copy-start(%first)
  ROOT %done = f32[256]{0:S(1)} copy-done(%start)
}
"""
    assert [one.bytes for one in work.work(text.parse(body))] == [1024]
    back = body.replace("{0:S(1)}", "{0}")
    assert [one.bytes for one in work.work(text.parse(back))] == [2048]


@pytest.mark.parametrize(
    ("size", "line", "moved"),
    [(16, "slice(%first), slice={[0:16]}", 2 * 64), (256, "negate(%first)", 2 * 1024)],
)
def test_what_looks_at_a_part_reads_that_part(size, line, moved):
    body = f"""HloModule jit_f

ENTRY %main (first: f32[256]) -> f32[{size}] {{
  %first = f32[256]{{0}} parameter(0)
  ROOT %one = f32[{size}]{{0}} {line}
}}
"""
    assert [one.bytes for one in work.work(text.parse(body))] == [moved]
