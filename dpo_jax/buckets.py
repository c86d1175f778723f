"""What a launcher asks and notes in a sweep's folder on gs://, through gcloud. Imports no jax."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator

from dpo_jax import queued_resources
from dpo_jax.queued_resources import Done, Refused

STORAGE = ["gcloud", "storage"]
# the file in a sweep's folder that names the launcher which runs it
LOCK = "LAUNCHER"
ATTEMPTS = 3


def account() -> list[str]:
    """The command that tells who is logged in."""
    return ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]


def list_finished(folder: str) -> list[str]:
    """The command that lists the finished runs of a sweep's folder."""
    return [*STORAGE, "ls", f"{folder}/*/DONE"]


def write_lock(folder: str) -> list[str]:
    """The command that writes the lock of its standard input, if there is none (generation 0)."""
    return [*STORAGE, "cp", "-", f"{folder}/{LOCK}", "--if-generation-match=0", "--quiet"]


def cat(file: str) -> list[str]:
    """The command that prints a file."""
    return [*STORAGE, "cat", file]


def read_lock(folder: str) -> list[str]:
    """The command that prints the lock."""
    return cat(f"{folder}/{LOCK}")


def remove_lock(folder: str) -> list[str]:
    """The command that removes the lock."""
    return [*STORAGE, "rm", f"{folder}/{LOCK}", "--quiet"]


def who() -> str:
    """The account that gcloud is logged in with; Refused where there is none."""
    try:
        done = ask(account())
    except FileNotFoundError:
        raise Refused(
            "there is no gcloud on PATH: install it (https://cloud.google.com/sdk/docs/install), "
            f"then {queued_resources.LOGIN}"
        ) from None
    if done.code != 0:
        raise Refused(queued_resources.explain(done.errors))
    if not done.output.strip():
        raise Refused(f"gcloud is not logged in: {queued_resources.LOGIN}")
    return done.output.split()[0]


def finished(folder: str) -> set[str]:
    """The names of the finished runs in a sweep's folder."""
    done = ask(list_finished(folder))
    if done.code != 0 and not queued_resources.is_missing(done.errors):
        raise Refused(f"{folder} cannot be read: {queued_resources.explain(done.errors)}")
    return {line.split("/")[-2] for line in done.output.splitlines() if line.endswith("/DONE")}


def read(file: str) -> str | None:
    """The content of a file; None where it is not there."""
    done = ask(cat(file))
    if done.code == 0:
        return done.output
    if queued_resources.is_missing(done.errors):
        return None
    raise Refused(f"{file} cannot be read: {queued_resources.explain(done.errors)}")


@contextlib.contextmanager
def held(folder: str, person: str, *, take_over: bool) -> Iterator[None]:
    """Holds the lock of a sweep's folder; Refused says which launcher holds it."""
    holder = {
        "account": person,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    text = json.dumps(holder)
    try:
        if take_over:
            ask(remove_lock(folder))
        take(folder, text)
        yield
    finally:
        if ask(read_lock(folder)).output == text and ask(remove_lock(folder)).code != 0:
            print(f"{folder}/{LOCK} could not be removed: --take-over goes on without it")


def take(folder: str, text: str) -> None:
    """Writes the lock, or raises Refused with what is in it."""
    done = ask(write_lock(folder), text)
    if done.code == 0:
        return
    other = ask(read_lock(folder))
    if other.code != 0:
        reason = queued_resources.explain(done.errors)
        raise Refused(f"{folder}/{LOCK} cannot be written: {reason}")
    # the answer to a first try may have been lost
    if other.output != text:
        raise Refused(
            f"another launcher runs this sweep: {other.output.strip()}. If it is no more, "
            "--take-over takes its place and deletes the queued resources that it has left"
        )


def ask(command: list[str], text: str = "") -> Done:
    """Runs a short command of gcloud's with a text as its input, outside of any event loop."""
    for left in reversed(range(ATTEMPTS)):
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, start_new_session=True
        )
        if done.returncode == 0 or left == 0 or queued_resources.is_final(done.stderr):
            break
    return Done(done.returncode, done.stdout, done.stderr)
