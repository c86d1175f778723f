"""The record of a benchmark as a Markdown table."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax import benchmark_flops

HEADER = """\
| contender | useful tokens/s | slower than the first by | bound | reached | fill | FLOPs / floor |\
 share of the product rate | peak memory | first step | again | compile |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
BOUND = (
    "The bound is the ratio that would be seen if both ran all their own matrix products at the "
    "rate of products of their type (JAX's, or as the other trainer's own process measured it) and "
    "did nothing else. Their FLOPs are the compiled program's, or counted from shapes for PyTorch. "
    "It is no limit of the ratio: what is reached is over 100% where the first is nearer to its "
    "rate than the other to its own. And it is of what each computes, not of what had to be: FLOPs "
    "that another trainer computes in vain raise the bound, as they raise the ratio."
)


def describe(record: Mapping[str, Any]) -> str:
    """The record as a table: medians, and ratios to the first contender round by round."""
    results, floor = record["results"], record["floor_flops_per_useful_token"]
    rate = record["matmul_flops_per_second"]
    adapted = "" if record["adapter"] is None else f", an adapter of rank {record['adapter']}"
    lines = [
        f"{record['loss']} of {record['model']}{adapted} on {record['data']}, {record['dtype']}, "
        f"{record['devices']} x {record['device']}, {record['settings']['batch_size']} examples a "
        f"step; matrix products at {rate / 1e9:,.0f} GFLOP/s; the floor is "
        f"{floor / 1e6:,.1f} MFLOP a useful token",
        "",
        HEADER,
        *(describe_one(result, record) for result in results),
    ]
    if len(results) > 1:
        lines += ["", BOUND]
    lines += ["", *record["left_out"]] if record["left_out"] else []
    losses = [f"{result['name']} {result['loss']:.4f}" for result in results]
    lines += ["", f"Loss of the first step: {', '.join(losses)}."]
    for result in results:
        if result["uncounted"]:
            left_out = "; ".join(result["uncounted"])
            lines += ["", f"Not in the FLOPs of {result['name']}: {left_out}."]
    return "\n".join(lines)


def describe_one(result: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """A contender's line."""
    first, floor = record["results"][0], record["floor_flops_per_useful_token"]
    product_rate = record["matmul_flops_per_second"]
    rates = np.array(result["rates"])
    median = float(np.median(rates))
    ratio = float(np.median(np.array(first["rates"]) / rates))
    bound = reached = ""
    shortest, own = (shortest_time(one, record) for one in (result, first))
    if shortest is not None and own is not None:
        bound, reached = f"{shortest / own:.2f}", f"{ratio * own / shortest:.0%}"
    fill = "" if result["fill"] is None else f"{result['fill']:.1%}"
    flops = f"{sum(result['flops'].values()) / floor:.2f}" if result["flops"] else ""
    again, compiled = (
        "" if result[name] is None else f"{result[name]:.1f} s"
        for name in ("first_step_again", "compile")
    )
    return (
        f"| {result['name']} | {median:,.0f} ({rates.min():,.0f} to {rates.max():,.0f}) | "
        f"{ratio:.2f} | {bound} | {reached} | {fill} | {flops} | "
        f"{median * floor / product_rate:.0%} | {result['peak'] / 2**30:.2f} GiB | "
        f"{result['first_step']:.1f} s | {again} | {compiled} |"
    )


def shortest_time(result: Mapping[str, Any], record: Mapping[str, Any]) -> float | None:
    """Seconds that a contender's FLOPs for a useful token take at the rates of matrix products: its
    own process's, or the benchmark's for this project's layouts.
    """
    of_project = {record["dtype"]: record["matmul_flops_per_second"]}
    return benchmark_flops.shortest_time(result["flops"], result["products"] or of_project)
