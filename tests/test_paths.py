import builtins
import subprocess
import sys

import pytest

from dpo_jax import paths
from tests import tiny


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "folder")
    return f"memory://{tmp_path.name}"


def test_text_and_bytes_come_back_as_they_were_written(folder):
    paths.write_text(paths.join(folder, "deep", "text.txt"), "a\r\né\n")
    paths.write_bytes(paths.join(folder, "bytes"), b"\x00\xff")
    assert paths.read_text(paths.join(folder, "deep", "text.txt")) == "a\r\né\n"
    assert paths.read_bytes(paths.join(folder, "bytes")) == b"\x00\xff"


def test_an_open_file_holds_text_as_utf8(folder):
    paths.make_folder(folder)
    name = paths.join(folder, "lines.txt")
    with paths.open(name, "w") as file:
        file.write("é\n")
    with paths.open(name, "r") as file:
        assert file.read() == "é\n"
    assert paths.read_bytes(name) == b"\xc3\xa9\n"


def test_exists_and_is_folder_tell_files_from_folders(folder):
    name = paths.join(folder, "file")
    assert not paths.exists(name)
    paths.write_text(name, "x")
    assert paths.exists(name) and not paths.is_folder(name)
    assert paths.is_folder(folder)


def test_a_listing_is_sorted_and_its_paths_can_be_read(folder):
    for name in ("b.txt", "a.txt", "c.other"):
        paths.write_text(paths.join(folder, name), name)
    found = paths.listing(paths.join(folder, "*.txt"))
    assert [paths.read_text(path) for path in found] == ["a.txt", "b.txt"]


def test_a_removed_file_is_gone_and_one_that_is_not_there_is_no_error(folder):
    name = paths.join(folder, "file")
    paths.write_text(name, "x")
    paths.remove(name)
    assert not paths.exists(name)
    paths.remove(name)


def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    paths.write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        paths.write_text(path, "new")
    assert paths.read_text(path) == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


WRITES = """
import os, signal, sys
from dpo_jax import paths
with paths.replacing(sys.argv[1]) as file, open(file, "wb") as out:
    out.write(b"half")
    out.flush()
    print("writing", flush=True)
    signal.pause()
"""


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path, monkeypatch
):
    (tmp_path / "[in]").mkdir()
    command = [sys.executable, "-c", WRITES, str(tmp_path / "[in]" / "tokens.npy")]
    with subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
            paths.write_text(str(tmp_path / "kept"), "whole")
            paths.remove_abandoned(str(tmp_path))
            assert len(list(tmp_path.glob("*/*"))) == 1
        finally:
            writer.kill()
    with monkeypatch.context() as patch:
        # another machine, which does not know of this one's locks
        patch.setattr("socket.gethostname", lambda: "another")
        paths.remove_abandoned(str(tmp_path))
    assert len(list(tmp_path.glob("*/*"))) == 1
    paths.remove_abandoned(str(tmp_path))
    assert list(tmp_path.glob("*/*")) == [] and (tmp_path / "kept").exists()


def test_a_gs_path_without_gcsfs_names_the_package_and_the_command(monkeypatch):
    load = builtins.__import__

    def without_gcsfs(name, *rest):
        if name.split(".")[0] == "gcsfs":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_gcsfs)
    monkeypatch.delitem(sys.modules, "gcsfs", raising=False)
    with pytest.raises(ValueError, match="gs://bucket/file.*pip install gcsfs"):
        paths.read_text("gs://bucket/file")


def test_join_keeps_the_protocol_and_is_local_tells_by_it():
    assert paths.join("gs://bucket/a/", "b", "c.txt") == "gs://bucket/a/b/c.txt"
    assert paths.join("a", "b", "c.txt") == "a/b/c.txt"
    assert paths.is_local("a/b") and not paths.is_local("gs://bucket/a")


def test_the_cache_folder_is_the_environments_or_one_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", "elsewhere")
    assert paths.cache_folder() == "elsewhere"
    monkeypatch.delenv("DPO_JAX_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.cache_folder() == "/home/someone/.cache/dpo_jax"
