"""The Hugging Face hub, asked only if it answers: offline, its clients retry for a minute."""

import contextlib
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

SECONDS = 4.0
# owner/name
NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def why_unreachable() -> str | None:
    """Why the hub cannot be asked, in words; None where it can. Takes SECONDS at most."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    outcome = [f"{endpoint} does not answer within {SECONDS:g} seconds"]
    # name resolution obeys no timeout of a request, hence a thread that may be left behind
    thread = threading.Thread(target=ask, args=(endpoint, outcome), daemon=True)
    thread.start()
    thread.join(SECONDS)
    return outcome[0] or None


def ask(endpoint: str, outcome: list[str]) -> None:
    """Sets outcome[0] to why the endpoint does not answer, or to '' where it does."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=SECONDS
        ).close()
        outcome[0] = ""
    except urllib.error.HTTPError:
        outcome[0] = ""
    except (OSError, ValueError) as error:
        outcome[0] = f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})"


def find_file(name: str, file: str) -> str | None:
    """The local path of a hub model's file: the cache's, or downloaded; None where there is none.

    A file that cannot be asked for, offline, counts as one that is not there.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if NAME.fullmatch(name) is None:
        return None
    try:
        offline = why_unreachable() is not None
        return huggingface_hub.hf_hub_download(name, file, local_files_only=offline)
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError):
        return None


@contextlib.contextmanager
def local_files_only() -> Iterator[None]:
    """Within it, the clients look at their local cache alone, as with HF_HUB_OFFLINE=1.

    They read that variable when they are imported, so it is their constants that are set for a
    while.
    """
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
