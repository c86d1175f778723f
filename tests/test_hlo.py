"""What is read from compiled programs: texts written by hand, and programs compiled here."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax import config, sharding
from dpo_jax.hlo import collectives, costs, text

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def program(body: str, others: str = "", devices: int = 1) -> text.Program:
    """A program of an entry computation's instructions, and other computations before it."""
    header = f"HloModule jit_step, is_scheduled=true, num_partitions={devices}\n\n{others}\n"
    return text.parse(header + "ENTRY %main (p: f32[2,3]) -> f32[2] {\n" + body + "\n}\n")


def instruction(line: str) -> text.Instruction:
    return text.parse_instruction("  " + line)


TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0:T(8,128)})->\
f32[8]{0}}, replica_count=1, num_partitions=8

FileNames
1 "a {file}.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%region_0.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[]{:T(128)} parameter(0)
  %y.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x.1, %y.1)
}

%fused_computation (param_0: bf16[8,16]) -> (f32[8], s32[]) {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %constant.7 = f32[] constant(0)
  %reduce.1 = f32[8]{0:T(128)} reduce(%param_0, %constant.7), dimensions={1}, \
metadata={op_name="jit(f)/a \\"b\\" {c}, (d/reduce_sum" stack_frame_id=1}, to_apply=%region_0.1
  %constant.8 = s32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %constant.9 = s32[] constant(3)
  ROOT %tuple.1 = (f32[8]{0:T(128)}, /*index=1*/s32[]{:T(128)}) tuple(%reduce.1, %constant.9)
}

ENTRY %main.2_spmd (p.1: f32[8,16]) -> f32[8] {
  %p.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %convert = bf16[8,16]{1,0:T(8,128)(2,1)} convert(f32[8,16]{1,0:T(8,128)} %p.1)
  %fusion = (f32[8]{0:T(128)}, s32[]{:T(128)}) fusion(%convert), kind=kLoop, \
calls=%fused_computation, backend_config={"flag_configs":[],"x":"{,)"}
  ROOT %get-tuple-element = f32[8]{0:T(128)} get-tuple-element(%fusion), index=0
}

%after (x.2: f32[]) -> f32[] {
  ROOT %x.2 = f32[]{:T(128)} parameter(0)
}
"""


def test_text_of_a_tpu_is_read():
    found = text.parse(TPU)
    assert (found.name, found.entry, found.devices) == ("jit_f", "main.2_spmd", 8)
    assert list(found.computations) == ["region_0.1", "fused_computation", "main.2_spmd", "after"]
    inner = found.computations["fused_computation"]
    assert inner.root == "tuple.1"
    assert inner.instructions["tuple.1"] == text.Instruction(
        "tuple.1",
        "tuple",
        (text.Array("f32", (8,)), text.Array("s32", ())),
        ("reduce.1", "constant.9"),
        {},
        "",
    )
    assert inner.instructions["param_0"].arrays == (text.Array("bf16", (8, 16), 1),)
    assert inner.instructions["param_0"].operands == ("0",)
    assert inner.instructions["constant.8"].operands == ("{ { 1, 2 }, { 3, 4 } }",)
    reduce = inner.instructions["reduce.1"]
    assert reduce.op_name == r"jit(f)/a \"b\" {c}, (d/reduce_sum"
    assert reduce.attributes["dimensions"] == "{1}"
    assert reduce.attributes["to_apply"] == "%region_0.1"
    main = found.computations["main.2_spmd"].instructions
    assert main["convert"].operands == ("p.1",)
    assert main["fusion"].attributes["calls"] == "%fused_computation"
    assert main["fusion"].attributes["backend_config"] == '{"flag_configs":[],"x":"{,)"}'
    assert text.inputs(found.computations["main.2_spmd"], main["fusion"]) == [
        text.Array("bf16", (8, 16))
    ]


def test_names_may_be_without_their_sign():
    found = instruction("ROOT add.1 = (f32[2]{0}, (s32[], token[])) call(a, b.2), to_apply=c")
    assert (found.name, found.opcode, found.operands) == ("add.1", "call", ("a", "b.2"))
    assert found.arrays == (text.Array("f32", (2,)), text.Array("s32", ()), text.Array("token", ()))


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ("  %a = f32[2] add(%b, %c", "a bracket is not closed"),
        ("  %a = f32[2] 3", "no opcode"),
        ("add", "no instruction: 'add'"),
    ],
)
def test_a_line_that_is_no_instruction_is_refused(written, error):
    with pytest.raises(ValueError, match=error):
        text.parse_instruction(written)


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        text.parse("module @jit_f {\n  func.func public @main() {\n}\n")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("pred[5]", 5),
        ("s4[5]{0}", 3),
        ("c64[2]", 16),
        ("f8e4m3fn[3]", 3),
        ("f32[]", 4),
        ("s32[<=10]{0}", 40),
        ("token[]", 0),
    ],
)
def test_bytes_of_an_array(shape, expected):
    (array,) = text.arrays(shape)
    assert text.bytes_of(array) == expected


def test_an_unknown_type_of_elements_is_refused():
    with pytest.raises(ValueError, match="type elephant"):
        text.bytes_of(text.Array("elephant", (2,)))


DOT = """  %l = f32[5,2,3]{2,1,0} parameter(0)
  %r = f32[5,3,7]{2,1,0} parameter(1)
  ROOT %dot = f32[5,2,7]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}"""


def test_a_product_has_two_flops_a_pair():
    assert costs.flops(program(DOT)) == 2 * 5 * 2 * 3 * 7


@pytest.mark.parametrize(
    ("left", "kernel", "result", "attributes", "expected"),
    [
        # as TPUs have products: no spatial axis, one, and a batch as a dilated one
        ("4,3", "3,7", "4,7", "dim_labels=bf_io->bf", 4 * 3 * 7),
        ("4,6,3", "3,7,1", "4,6,7", "window={size=1}, dim_labels=b0f_io0->b0f", 4 * 6 * 3 * 7),
        (
            "5,2,3",
            "5,3,7",
            "5,2,7",
            "window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            5 * 2 * 3 * 7,
        ),
        # a head's axis of the result, all of which the padding passes by the window
        (
            "4,6,1,3",
            "6,2,3,7",
            "4,2,7,1",
            "window={size=6x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=b01f_01io->b1f0",
            4 * 6 * 3 * 2 * 7,
        ),
        # five places, of which the outer two meet two of three numbers
        (
            "1,5,2",
            "3,2,4",
            "1,5,4",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 4 * (2 + 3 + 3 + 3 + 2),
        ),
        # two groups of three features each
        (
            "1,5,6",
            "1,3,4",
            "1,5,4",
            "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2",
            5 * 3 * 4,
        ),
    ],
)
def test_a_convolution_has_two_flops_a_pair_that_is_no_padding(
    left, kernel, result, attributes, expected
):
    body = f"""  %l = bf16[{left}] parameter(0)
  %k = bf16[{kernel}] parameter(1)
  ROOT %c = f32[{result}] convolution(%l, %k), {attributes}"""
    assert costs.flops(program(body)) == 2 * expected


def test_pairs_of_a_window_are_those_that_are_counted_one_by_one():
    generator = np.random.default_rng(0)
    seen = 0
    for _ in range(300):
        inputs, kernel, outputs = (int(one) for one in generator.integers(1, 9, 3))
        names = {"stride": 5, "lhs_dilate": 5, "rhs_dilate": 3}
        window = {name: int(generator.integers(1, most)) for name, most in names.items()}
        window["pad"] = int(generator.integers(-2, 6))
        expected = 0
        for output in range(outputs):
            for place in range(kernel):
                at = output * window["stride"] + place * window["rhs_dilate"] - window["pad"]
                spread = window["lhs_dilate"]
                expected += at % spread == 0 and 0 <= at // spread < inputs
        assert costs.pairs(inputs, kernel, outputs, window) == expected
        seen += expected
    assert seen > 1000


BODY = """%body (b: (s32[], f32[4,4], s32[])) -> (s32[], f32[4,4], s32[]) {
  %b = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %m = f32[4,4]{1,0} get-tuple-element(%b), index=1
  %n = s32[] get-tuple-element(%b), index=2
  %one = s32[] constant(STEP)
  %next = s32[] STEPS
  %dot = f32[4,4]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}, s32[]) tuple(%next, %dot, %n)
}
"""
PLUS_FUSION = """%plus (x: s32[], y: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %sum = s32[] add(%x, %y)
}
%compared (x: s32[], y: s32[]) -> pred[] {
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %lt = pred[] compare(%x, %y), direction=LT
}
"""
CONDITION = """%condition (c: (s32[], f32[4,4], s32[])) -> pred[] {
  %c = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=2
  %limit = s32[] constant(LIMIT)
  ROOT %lt = pred[] COMPARE
}
"""
BACK = "compare(%i, %limit), direction=GT"
LOOP = """  %first = s32[] constant(FIRST)
  %bound = s32[] BOUND
  %m = f32[4,4]{1,0} parameter(0)
  %t = (s32[], f32[4,4]{1,0}, s32[]) tuple(%first, %m, %bound)
  %while = (s32[], f32[4,4]{1,0}, s32[]) while(%t), condition=%condition, body=%bodyKNOWN
  ROOT %r = f32[4,4]{1,0} get-tuple-element(%while), index=1"""


def loop(**changes) -> text.Program:
    """A program of a loop over products of 4 x 4 matrices."""
    parts = {
        "FIRST": "0",
        "STEPS": "add(%i, %one)",
        "STEP": "1",
        "LIMIT": "6",
        "COMPARE": "compare(%i, %limit), direction=LT",
        "BOUND": "constant(9)",
        "KNOWN": "",
        **changes,
    }
    others, body = PLUS_FUSION + BODY + CONDITION, LOOP
    for name, value in sorted(parts.items(), reverse=True):
        others, body = others.replace(name, value), body.replace(name, value)
    return program(body, others)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 6),
        ({"FIRST": "1", "STEP": "2"}, 3),
        ({"COMPARE": "compare(%i, %limit), direction=LE"}, 7),
        ({"COMPARE": "compare(%limit, %i), direction=GT"}, 6),
        ({"COMPARE": "compare(%i, %limit), direction=NE", "STEP": "3"}, 2),
        ({"FIRST": "9", "STEP": "-1", "COMPARE": BACK}, 3),
        ({"FIRST": "9", "STEPS": "subtract(%i, %one)", "COMPARE": BACK}, 3),
        ({"FIRST": "9"}, 0),
        # the bound is carried along
        ({"COMPARE": "compare(%i, %n), direction=LT"}, 9),
        # in fusions
        ({"STEPS": "fusion(%i, %one), kind=kLoop, calls=%plus"}, 6),
        ({"COMPARE": "fusion(%i, %limit), kind=kLoop, calls=%compared"}, 6),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(changes, times):
    found = loop(**changes)
    assert costs.flops(found) == times * 2 * 4**3
    assert costs.uncounted(found) == []


def test_what_the_compiler_knows_of_a_loop_goes_before_what_is_read():
    known = '{"known_trip_count":{"n":"11"}}'
    found = loop(KNOWN=f", backend_config={known}")
    assert costs.flops(found) == 11 * 2 * 4**3


@pytest.mark.parametrize(
    "changes",
    [
        {"BOUND": "parameter(1)", "COMPARE": "compare(%i, %n), direction=LT"},
        {"STEPS": "multiply(%i, %one)"},
        {"COMPARE": "and(%i, %limit)"},
        {"COMPARE": BACK, "FIRST": "9"},
        {"COMPARE": "compare(%i, %limit), direction=NE", "STEP": "4"},
    ],
)
def test_a_loop_of_unknown_length_counts_once_and_is_named(changes):
    found = loop(**changes)
    assert costs.flops(found) == 2 * 4**3
    assert costs.uncounted(found) == ["loop while of unknown length"]


BRANCHES = """%small (a: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  ROOT %dot = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%large (a: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %dot.1 = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %dot.2 = f32[2,2]{1,0} dot(%dot.1, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(
    "attributes",
    [
        "branch_computations={%small, %large}",
        "true_computation=%large, false_computation=%small",
    ],
)
def test_a_conditional_counts_as_its_costliest_branch(attributes):
    body = f"""  %a = f32[2,2] parameter(0)
  %p = pred[] parameter(1)
  ROOT %c = f32[2,2] conditional(%p, %a, %a), {attributes}"""
    assert costs.flops(program(body, BRANCHES)) == 2 * 2 * 2**3


@pytest.mark.parametrize(
    "call",
    [
        "fusion(%a), kind=kOutput, calls=%large",
        "call(%a), to_apply=%large",
        "async-start(%a), calls=%large",
        "fusion-start(%a), kind=kOutput, calls=%large",
    ],
)
def test_what_is_called_counts(call):
    assert (
        costs.flops(program(f"  %a = f32[2,2] parameter(0)\n  ROOT %c = f32[2,2] {call}", BRANCHES))
        == 32
    )


GEMM = """custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_batch_dimensions":[]}}}"""
PALLAS = """custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"TUzv","cost_estimate":{"flops":"1234","transcendentals":"5"}}}"""


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "expected"),
    [
        ("5,2", "5,7", "(f32[2,7], s8[64])", GEMM, 2 * 5 * 2 * 7),
        ("3,2,5", "3,7,5", "f32[3,2,7]", 'custom_call_target="__onednn$matmul"', 2 * 3 * 2 * 5 * 7),
        ("3,2", "2,3", "f32[3]", PALLAS, 1234),
        ("3,2", "2,3", "f32[3]", 'custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_calls_of_products_count(left, right, result, attributes, expected):
    body = f"""  %l = f32[{left}] parameter(0)
  %r = f32[{right}] parameter(1)
  ROOT %c = {result} custom-call(%l, %r), {attributes}"""
    found = program(body)
    assert costs.flops(found) == expected
    assert costs.uncounted(found) == []


def test_what_cannot_be_counted_is_named_once():
    body = """  %l = f32[2,2] parameter(0)
  %s = s32[2] parameter(1)
  %a = f32[2,2] custom-call(%l), custom_call_target="mosaic_gpu", metadata={op_name="jit(f)/splash"}
  %b = f32[2,2] custom-call(%a), custom_call_target="mosaic_gpu", metadata={op_name="jit(f)/splash"}
  %c = f32[2,2] ragged-dot(%b, %l, %s), lhs_contracting_dims={1}
  ROOT %d = f32[2,2] dot(%c, %l), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
    found = program(body)
    assert costs.uncounted(found) == ["custom-call mosaic_gpu (jit(f)/splash)", "ragged-dot c"]
    assert costs.flops(found) == 16


def test_the_largest_arrays_are_those_written_to_memory():
    others = """%fused (x: f32[2,2]) -> (f32[2,2], bf16[9]) {
  %x = f32[2,2]{1,0} parameter(0)
  %wide = f32[2,2,100]{2,1,0} broadcast(%x), dimensions={0,1}
  %y = bf16[9]{0} constant({...})
  ROOT %both = (f32[2,2]{1,0}, bf16[9]{0}) tuple(%x, %y)
}
"""
    body = """  %p = f32[50]{0} parameter(0)
  %m = f32[2,2]{1,0} slice(%p), slice={[0:4]}
  %f = (f32[2,2]{1,0}, bf16[9]{0}) fusion(%m), kind=kLoop, calls=%fused
  %g = f32[2,2]{1,0} get-tuple-element(%f), index=0
  ROOT %e = f32[3]{0} slice(%p), slice={[0:3]}, metadata={op_name="jit(f)/end"}"""
    found = costs.largest_arrays(program(body, others), 3)
    assert [(made.bytes, made.name) for made in found] == [(18, "f"), (16, "m"), (16, "f")]
    least = costs.largest_arrays(program(body, others), 9)[-1]
    assert least == costs.Made(12, text.Array("f32", (3,)), "slice", "e", "jit(f)/end")


@pytest.mark.parametrize(
    ("attributes", "groups", "axes"),
    [
        ({"replica_groups": "{{0,2},{4,6},{1,3},{5,7}}"}, "02 46 13 57", ("fsdp",)),
        ({"replica_groups": "{}"}, "01234567", ("data", "fsdp", "tensor")),
        ({"replica_groups": "{{0},{1}}"}, "0 1", ()),
        ({"replica_groups": "[2,4]<=[8]"}, "0123 4567", ("fsdp", "tensor")),
        ({"replica_groups": "[4,2]<=[2,2,2]T(0,2,1)"}, "02 13 46 57", ("fsdp",)),
        ({"replica_groups": "[2,4]<=[4,2]T(1,0)"}, "0246 1357", ("data", "fsdp")),
        (
            {"replica_groups": "mesh['axis_0'=2,'axis_1'=1,'axis_2'=2,'axis_3'=2] {'axis_2'}"},
            "02 13 46 57",
            ("fsdp",),
        ),
        ({"replica_groups": "mesh['a'=4,'b'=2] {'a'}"}, "0246 1357", ("data", "fsdp")),
        ({"replica_groups": "mesh['a'=4,'b'=2] {'a','b'}"}, "01234567", tuple(MESH)),
        # the outer half of an axis, and the inner one
        ({"replica_groups": "mesh['a'=4,'b'=2] {'a':(1)2}"}, "04 15 26 37", ("data",)),
        ({"replica_groups": "mesh['a'=4,'b'=2] {'a':(2)2}"}, "02 13 46 57", ("fsdp",)),
        ({"replica_groups": "mesh['a'=8] {'a':(1)2,'a':(4)2}"}, "0145 2367", ("data", "tensor")),
        # devices in another order
        (
            {"replica_groups": "mesh['a'=2,'b'=4]", "device_ids": "([2,2,2]T(1,0,2)) {'a'}"},
            "02 13 46 57",
            ("fsdp",),
        ),
        (
            {"replica_groups": "mesh['a'=2,'b'=4]", "device_ids": "(0,1,4,5,2,3,6,7) {'a'}"},
            "02 13 46 57",
            ("fsdp",),
        ),
        ({"source_target_pairs": "{{0,4},{4,0},{1,1}}"}, "04 40 11", ("data",)),
    ],
)
def test_groups_and_their_axes(attributes, groups, axes):
    found = collectives.groups_of(attributes, 8)
    expected = {tuple(map(int, group)) for group in groups.split()}
    assert set(found) == expected and len(found) == len(expected)
    assert collectives.axes_of(found, MESH) == axes
    assert collectives.axes_of(found, {}) == ()


ASYNCHRONOUS = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
%all-reduce-scatter.1 (input: f32[8,4]) -> f32[4,4] {
  %input = f32[8,4]{1,0} parameter(0)
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%input), channel_id=3, \
replica_groups={{0,2},{4,6},{1,3},{5,7}}, to_apply=%add
  %place = u32[] constant(0)
  ROOT %part = f32[4,4]{1,0} dynamic-slice(%all-reduce.1, %place, %place), \
dynamic_slice_sizes={4,4}
}
%start (q: bf16[4,4]) -> (bf16[4,4], bf16[8,4], u32[]) {
  %q = bf16[4,4]{1,0} parameter(0)
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%q), channel_id=5, replica_groups=[4,2]<=[8], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %call.1 = (bf16[4,4], bf16[8,4], u32[]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}
%done (q: bf16[4,4]) -> bf16[8,4] {
  %q = bf16[4,4]{1,0} parameter(0)
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%q), channel_id=5, replica_groups=[4,2]<=[8], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %call.2 = bf16[8,4] custom-call(%q, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}
%wrapped (q: f32[4,4]) -> f32[2,4] {
  %q = f32[4,4]{1,0} parameter(0)
  ROOT %reduce-scatter = f32[2,4]{1,0} reduce-scatter(%q), replica_groups=[4,2]<=[8], \
dimensions={0}, to_apply=%add
}
"""


def test_an_asynchronous_collective_counts_once():
    body = """  %p = f32[4,4]{1,0} parameter(0)
  %h = bf16[4,4]{1,0} convert(%p)
  %gather = (f32[4,4], f32[16,4]) all-gather-start(%p), \
replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/gather"}
  %gathered = f32[16,4] all-gather-done(%gather)
  %moved = (f32[4,4], f32[4,4], u32[], u32[]) collective-permute-start(%p), \
source_target_pairs={{0,1},{1,0}}
  %moved.1 = f32[4,4] collective-permute-done(%moved)
  %started = (bf16[4,4], bf16[8,4], u32[]) fusion(%h), kind=kCustom, calls=%start
  %part = bf16[4,4] get-tuple-element(%started), index=0
  %ended = bf16[8,4] fusion(%part), kind=kCustom, calls=%done
  %both = f32[8,4] concatenate(%p, %p), dimensions={0}
  %own = f32[4,4] fusion(%both), kind=kCustom, calls=%all-reduce-scatter.1
  %async = ((f32[4,4]), f32[2,4], u32[]) async-start(%own), calls=%wrapped
  ROOT %scattered = f32[2,4] async-done(%async)"""
    found = collectives.collectives(program(body, ASYNCHRONOUS, devices=8), MESH)
    assert [(one.kind, one.bytes, one.axes, one.times) for one in found] == [
        ("all-gather", 4 * 64, ("fsdp", "tensor"), 1),
        ("collective-permute", 64, ("tensor",), 1),
        ("all-gather", 2 * 32, ("tensor",), 1),
        ("reduce-scatter", 128, ("fsdp",), 1),
        ("reduce-scatter", 64, ("tensor",), 1),
    ]
    assert found[0].op_name == "jit(f)/gather"
    assert found[0].arrays == (text.Array("f32", (4, 4)),)


def compiled(function: Callable, *arguments) -> text.Program:
    """The program of a function of arrays or shapes, compiled for their devices."""
    return text.parse(jax.jit(function).lower(*arguments).compile().as_text() or "")


def test_a_scan_of_products_is_counted_with_its_gradient():
    def total(weights, start):
        def one(carry, weight):
            return jnp.tanh(carry @ weight), None

        return jnp.sum(jax.lax.scan(one, start, weights)[0] ** 2)

    weights, start = jnp.ones((5, 16, 16)), jnp.ones((8, 16))
    found = compiled(jax.grad(total, argnums=(0, 1)), weights, start)
    assert costs.flops(found) == 3 * 5 * 2 * 8 * 16 * 16
    assert costs.uncounted(found) == []


def test_a_loop_that_ends_with_its_data_is_named():
    def run(start):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x @ x, start)

    found = compiled(run, jnp.ones((16, 16)))
    assert costs.flops(found) == 2 * 16**3
    (named,) = costs.uncounted(found)
    assert named.startswith("loop while") and "jit(run)/while" in named


@pytest.mark.parametrize(
    ("operation", "kind", "axes", "expected"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", ("fsdp",), 128),
        (lambda x: jax.lax.psum(x, ("data", "tensor")), "all-reduce", ("data", "tensor"), 128),
        (lambda x: jax.lax.all_gather(x, "data"), "all-gather", ("data",), 256),
        (lambda x: jax.lax.all_to_all(x, "tensor", 0, 0), "all-to-all", ("tensor",), 128),
        (
            lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
            "reduce-scatter",
            ("tensor",),
            128,
        ),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
            "collective-permute",
            ("fsdp",),
            128,
        ),
    ],
)
def test_collectives_of_a_mesh_are_found_with_their_axes(operation, kind, axes, expected):
    mesh = sharding.make_mesh(config.Mesh(2, 2, 2), jax.devices())

    def run(whole):
        def own(part):
            return jax.lax.scan(lambda x, _: (x + 1, operation(x)), part, length=3)[1]

        spread = P(("data", "fsdp", "tensor"))
        mapped = jax.shard_map(own, mesh=mesh, in_specs=spread, out_specs=P(None, spread[0]))
        return mapped(whole)

    program = compiled(run, jnp.ones((16, 16)))
    found = collectives.collectives(program, mesh.shape)
    # 2 x 16 numbers on a device
    assert [(one.kind, one.axes, one.bytes, one.times) for one in found] == [
        (kind, axes, expected, 3)
    ]
