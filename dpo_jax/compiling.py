"""What a run spends on compiling, as JAX reports it: tracing, lowering, and compiling or reading
compiled programs from the disk's cache.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax import monitoring

TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


class Span(NamedTuple):
    """A time in which a program was traced, lowered or compiled."""

    event: str
    program: str
    # seconds since the epoch
    start: float
    stop: float


@contextlib.contextmanager
def recorded() -> Iterator[list[Span]]:
    """A list that gets all spans of the process until the context ends."""
    spans: list[Span] = []

    def note(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        if event in (TRACED, LOWERED, COMPILED):
            spans.append(Span(event, str(kwargs.get("fun_name", "")), start_time, end_time))

    monitoring.register_event_time_span_listener(note)
    try:
        yield spans
    finally:
        monitoring.unregister_event_time_span_listener(note)


def count(spans: Sequence[Span], function: str) -> int:
    """How often a jitted function of this name was compiled, or read from the disk's cache."""
    return sum(span.event == COMPILED and span.program == f"jit({function})" for span in spans)


def seconds(spans: Sequence[Span]) -> float:
    """For how long anything was traced, lowered or compiled; what is traced within another program
    counts once.
    """
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(span.stop - max(span.start, end), 0.0)
        end = max(end, span.stop)
    return total
