"""What every test shares: CPU devices, strict numerics, its own cache, real data."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import inputs
from dpo_jax.data import builtin, ladder, made_up, tokenise
from tests import tiny

# JAX_PLATFORMS=cuda (or tpu) with -m gpu (or tpu) runs the tests that need such a device
PLATFORM = os.environ.get("JAX_PLATFORMS") or "cpu"
jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", None)

# Tracing makes so many objects that looking for garbage would take a fifth of its time.
gc.set_threshold(50_000, 20, 20)

# Compiling is most of the tests' time. Without LLVM's optimisations it takes a fifth of it, and
# XLA's own are all there. Processes that tests start inherit the flags; who sets XLA_FLAGS, if only
# to nothing, has it otherwise (scripts/test.sh --all does).
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # XLA ends the process for a flag that it does not know
    + (" --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else "")
)
if PLATFORM == "cpu":
    os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)

CACHE_BYTES = 2**31
SHAPES = ladder.MOST_SHAPES
PACKING = {f"tests.test_{name}" for name in ("ladder", "pack", "rows", "steps")}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this test run, so that the user's own is neither read nor written.

    Programs that took long to compile are kept for all of pytest-xdist's processes and those that
    tests start.
    """
    folder = tmp_path_factory.mktemp("cache")
    mine = tmp_path_factory.getbasetemp()
    compiled = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "compiled"
    compiled.mkdir(exist_ok=True)
    (folder / "compiled").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_JAX_CACHE", str(folder))
        # only a cache of limited size is locked while a file is read or written
        patch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        inputs.enable_compile_cache(str(folder / "compiled"))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def one_shape(request: pytest.FixtureRequest) -> Iterator[None]:
    """One shape of batches where packing is not what is tested: each more compiles a step more."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in PACKING:
            patch.setattr(ladder, "MOST_SHAPES", 1)
        yield


@pytest.fixture
def all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many shapes of batches as in a run of another process."""
    monkeypatch.setattr(ladder, "MOST_SHAPES", SHAPES)


@pytest.fixture
def libtpu() -> Iterator[None]:
    """TPUs can be compiled for, with `targets.find`."""
    pytest.importorskip("libtpu")
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", inputs.LEAST_COMPILING)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers: $DPO_JAX_SHARED, or shared/ beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("DPO_JAX_SHARED") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; DPO_JAX_SHARED can name another folder")
    return folder


@pytest.fixture(scope="session")
def draw_examples() -> Callable[..., tokenise.Tokenised]:
    """A function that draws small examples: count, names, seed, fewest and most tokens of a part.

    Unpaired ones (names completion, mismatched) get the column desirable, every other one 1.
    """

    def draw(
        count: int,
        names: tuple[str, ...] = ("chosen", "rejected"),
        *,
        seed: int = 0,
        tokens: tuple[int, int] = (1, 9),
        vocabulary: int = 512,
    ) -> tokenise.Tokenised:
        generator = np.random.default_rng(seed)
        lengths = generator.integers(tokens[0], tokens[1] + 1, (count, 1 + len(names)))
        columns = {}
        if "mismatched" in names:
            columns["desirable"] = (np.arange(count) % 2 == 0).astype(np.float32)
        ids = generator.integers(1, vocabulary, int(lengths.sum()), np.int32)
        drawn_as = f"drawn {count} {names} {seed} {tokens} {vocabulary}"
        return made_up.lay_out(names, lengths, ids, drawn_as, columns)

    return draw


@pytest.fixture(scope="session")
def draw_params() -> Callable[..., dict]:
    """A function that draws a decoder's parameters (config, seed), float32 on the host."""
    return tiny.draw_params


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 pairs in train.jsonl and held_out.jsonl, and a tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("data")
    reviews = builtin.corpus(120, 0)
    builtin.write_tokenizer(folder / "tokenizer", reviews, 400)
    rows = []
    for chosen, rejected in zip(reviews[::2], reviews[1::2], strict=True):
        prompt = " ".join(chosen.split()[:3])
        rows.append({"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": " " + rejected})
    for name, part in {"train": rows[:50], "held_out": rows[50:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder
