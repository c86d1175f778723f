"""A plan's record as text for the terminal."""

from collections.abc import Mapping
from typing import Any

GIB = 2**30
NETWORK = "data-centre network"


def describe(record: Mapping[str, Any]) -> str:
    """The whole plan."""
    lines = [*describe_run(record), "", *describe_memory(record)]
    if "seconds" in record:
        lines += ["", *describe_sent(record), "", *describe_time(record)]
    return "\n".join(lines)


def describe_run(record: Mapping[str, Any]) -> list[str]:
    """What is planned."""
    shape, mesh = record["batch_shape"], record["mesh"]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    trained = "all" if record["lora_rank"] is None else f"{record['trained_parameters']:,} of"
    tokens, scored = record["fill"]["tokens"], record["fill"]["scored"]
    return [
        f"{record['model']}, {record['loss']}, on {record['target']}",
        f"mesh {axes}, {record['devices']} devices",
        f"training {trained} {record['parameters']:,} parameters with {record['optimizer']} in "
        f"{record['dtype']}, reference {record['reference']}, remat {record['remat']}",
        f"{record['batch_size']} examples a step in {record['microbatches']} microbatches; "
        f"compiled for the largest shape, {shape['rows']} rows x {shape['tokens']} tokens, "
        f"{shape['scored']} of them scored; filled {tokens:.1%} ({scored:.1%})",
        record["lengths"],
    ]


def describe_memory(record: Mapping[str, Any]) -> list[str]:
    """Memory by kind, whether it fits, and what to do where it does not."""
    memory, capacity = record["memory_bytes_per_device"], record["capacity_bytes_per_device"]
    per_chip = record["devices"] / record["chips"]
    device = "chip" if per_chip == 1 else "device"
    total = sum(memory.values())
    lines = [f"| memory of a {device} | GiB |", "| --- | ---: |"]
    lines += [f"| {kind} | {size / GIB:.2f} |" for kind, size in memory.items() if size]
    lines += [
        f"| all | {total / GIB:.2f} |",
        f"| a program may use | {capacity / GIB:.2f} |",
        "",
    ]
    if record["fits"]:
        share = total / capacity
        lines.append(
            f"It fits: {share:.0%} of what a program may use. Compiled in "
            f"{record['compile_seconds']:.0f} s."
        )
        return lines
    lines.append(
        f"It does not fit: {total / GIB:.2f} GiB are needed, and a program may use "
        f"{capacity / GIB:.2f}."
    )
    if record["error"]:
        lines.append(f"The compiler says: {record['error']}")
    lines += ["What takes less:", *(f"  {line}" for line in record["advice"])]
    return lines


def describe_sent(record: Mapping[str, Any]) -> list[str]:
    """What devices send each other in a step."""
    if not record["collectives"]:
        return ["Devices send each other nothing."]
    lines = [
        "| sent in a step | over | times | GB of whole arrays a device | seconds |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for one in record["collectives"]:
        axes = " x ".join(one["axes"]) or "all"
        axes += ", between slices (DCN)" if one["is_between_slices"] else ""
        lines.append(
            f"| {one['kind']} | {axes} | {one['runs']:,.0f} | {one['bytes'] / 1e9:.3f} | "
            f"{one['seconds']:.4f} |"
        )
    far = [one for one in record["collectives"] if one["is_between_slices"]]
    if any("fsdp" in one["axes"] for one in far):
        lines += [
            "",
            "fsdp lies across slices, which therefore exchange parameters for every layer: with "
            f"--mesh.data {record['slices']} they would exchange gradients alone, and each slice "
            "hold all parameters.",
        ]
    return lines


def describe_time(record: Mapping[str, Any]) -> list[str]:
    """Times, and what they rest on."""
    seconds = record["seconds"]
    ratio = record["flops_per_step"] / record["model_flops_per_step"]
    lines = [
        f"A step computes {record['flops_per_step']:.4g} FLOPs, {ratio:.2f} times what the model "
        "needs. Predicted from the devices' published rates, not measured:",
        "",
        "| bound of a step | seconds |",
        "| --- | ---: |",
        f"| compute | {seconds['compute']:.4f} |",
        f"| memory | {seconds['memory']:.4f} |",
        f"| each instruction's longer one | {seconds['chip']:.4f} |",
        f"| interconnect | {seconds['interconnect']:.4f} |",
        *([f"| {NETWORK} | {seconds[NETWORK]:.4f} |"] if record["slices"] > 1 else []),
        "",
        "| communication | step, s | MFU | useful tokens/s | hours an epoch | cost |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, label in (("hidden", "all communication hidden"), ("exposed", "none hidden")):
        cost = record["cost_per_epoch"]
        lines.append(
            f"| {label} | {seconds[label]:.3f} | {record['mfu'][name]:.1%} | "
            f"{record['tokens_per_second'][name]:,.0f} | {record['hours_per_epoch'][name]:.3g} | "
            f"{'' if cost is None else f'{cost[name]:,.2f}'} |"
        )
    lines += ["", f"An epoch is {record['steps_per_epoch']:,.1f} steps of this shape."]
    if record["estimated_cycles"]:
        cycles = record["estimated_cycles"]
        clock = record["clock"]
        took = f", {cycles / clock:.3f} s at {clock / 1e9:.2f} GHz" if clock else ""
        lines.append(
            f"The compiler's own estimate of all instructions: {cycles:,.0f} cycles{took}."
        )
    if record["uncounted"]:
        lines.append(f"Not counted: {'; '.join(record['uncounted'])}.")
    lines += ["Assumed:", *(f"- {one}" for one in record["assumptions"])]
    return lines
