"""What every test shares: CPU devices, strict numerics, its own cache, real data."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# JAX_PLATFORMS=cuda (or tpu) with -m gpu (or tpu) runs the tests that need such a device
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this test run, so that the user's own is neither read nor written."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers: $DPO_JAX_SHARED, or shared/ beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("DPO_JAX_SHARED") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; DPO_JAX_SHARED can name another folder")
    return folder
