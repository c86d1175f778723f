"""What slices send each other, read from texts in the form that TPUs' compiler writes."""

import pytest

from dpo_jax.hlo import megascale, text, work


def sent(result: str, kind: str, target: str) -> str:
    """A program of one transfer to other slices."""
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale'
        '_runtime",_xla_host_transfer_rendezvous="x_0",_xla_megascale_reduce_operation="SUM",'
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    )
    return f"""HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (p: {result}) -> {result} {{
  %p = {result} parameter(0)
  %t = token[] after-all()
  %send = ({result}, u32[], token[]) send(%p, %t), channel_id=3, {attributes}
  %recv = ({result}, u32[], token[]) recv(%t), channel_id=2, {attributes}
  %sent = token[] send-done(%send), channel_id=3
  %received = ({result}, token[]) recv-done(%recv), channel_id=2
  ROOT %r = {result} get-tuple-element(%received), index=0
}}
"""


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', ("all-reduce", 4 * 64, (0, 1))),
        # the whole of what three slices have
        ("ALL_GATHER", '"{1,2,4}x{0:3}"', ("all-gather", 3 * 4 * 64, (0, 1, 3))),
        ("REDUCE_SCATTER", '"{1:4}x{0:3}"', ("reduce-scatter", 4 * 64, (0, 1, 2, 3))),
        # two groups, of which the first stands for both
        ("ALL_REDUCE", '"{2,4}x{0:3},{1,3}x{0:3}"', ("all-reduce", 4 * 64, (1, 3))),
        ("ALL_TO_ALL", "{{100000,100001,200000,200001}}", ("all-to-all", 4 * 64, (0, 1))),
    ],
)
def test_a_transfer_is_read_with_the_slices_that_exchange(kind, target, expected):
    (found,) = megascale.transfers(text.parse(sent("f32[8,8]{1,0}", kind, target)))
    assert (found.kind, found.bytes, found.slices) == expected
    assert found.times == 1


def test_what_hosts_exchange_is_no_work_of_the_chip():
    program = text.parse(sent("f32[8,8]{1,0}", "ALL_REDUCE", '"{1,2}x{0:3}"'))
    assert list(work.work(program)) == []


def test_another_kind_of_send_is_none():
    written = sent("f32[8,8]{1,0}", "ALL_REDUCE", '"{1,2}x{0:3}"')
    plain = written.replace("_xla_megascale_transfer_type", "_other")
    assert megascale.transfers(text.parse(plain)) == []
