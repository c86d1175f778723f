import numpy as np
import pytest

from dpo_jax import paths, tables

TABLE = {
    "chosen": np.array([-1.5, -2.0, -0.1, -7.25], np.float32),
    "chosen.head": np.array([1, 2, 3, 4], np.float32),
}


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "folder")
    return f"memory://{tmp_path.name}"


def part(*index: int) -> tables.Part:
    places = np.array(index, np.int32)
    return tables.Part(places, {name: values[places] for name, values in TABLE.items()})


def assert_same(found: tables.Table):
    assert list(found) == list(TABLE)
    for name, values in TABLE.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values)


def names(folder: str) -> list[str]:
    return [path.rsplit("/", 1)[1] for path in paths.listing(paths.join(folder, "*"))]


def test_a_finished_table_is_read_as_it_was_written(folder):
    assert not tables.is_finished(folder)
    tables.finish(folder, TABLE)
    assert tables.is_finished(folder)
    assert_same(tables.read(folder))


def test_columns_on_this_machines_disk_are_mapped_and_others_read_whole(folder):
    tables.finish(folder, TABLE)
    kinds = {type(column) for column in tables.read(folder).values()}
    assert kinds == {np.memmap if paths.is_local(folder) else np.ndarray}


def test_a_local_url_is_mapped_too(tmp_path):
    folder = f"file://{tmp_path}/folder"
    tables.finish(folder, TABLE)
    assert type(tables.read(folder)["chosen"]) is np.memmap


def test_parts_in_any_order_make_the_table(folder):
    assert tables.read_parts(folder) == []
    written = [
        tables.write_part(folder, [part(3), part(0)]),
        tables.write_part(folder, [part(2, 1)]),
    ]
    found = tables.read_parts(folder)
    assert tables.known(found[:1], 4).sum() == 2
    assert tables.known(found, 4).all()
    assert_same(tables.whole(found, 4))
    assert_same(tables.whole(written, 4))


def test_a_part_with_equal_content_is_one_file(folder):
    for _ in range(2):
        tables.write_part(folder, [part(0, 1)])
    assert len(names(folder)) == 1


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_a_half_written_part_is_not_believed(folder, damage):
    tables.write_part(folder, [part(0, 1)])
    (path,) = tables.list_parts(folder)
    tables.write_part(folder, [part(2, 3)])
    content = paths.read_bytes(path)
    half = {"cut": content[:-8], "zeros": content[:-8] + bytes(8), "empty": b""}[damage]
    paths.write_bytes(path, half)
    (found,) = tables.read_parts(folder)
    assert found.index.tolist() == [2, 3]


def test_a_file_that_was_not_renamed_into_place_is_no_part(folder):
    tables.write_part(folder, [part(0, 1)])
    (path,) = tables.list_parts(folder)
    paths.write_bytes(f"{path}.0123.tmp", paths.read_bytes(path))
    assert tables.list_parts(folder) == [path]


def test_a_part_that_vanishes_while_parts_are_read_is_passed_over(folder, monkeypatch):
    tables.write_part(folder, [part(0, 1)])
    found = tables.list_parts(folder)
    paths.remove(found[0])
    monkeypatch.setattr(tables, "list_parts", lambda _: found)
    assert tables.read_parts(folder) == []


def test_finishing_removes_the_parts_and_leaves_a_finished_table_as_it_is(folder):
    tables.write_part(folder, [part(0, 1)])
    tables.finish(folder, TABLE)
    expected = ["DONE", "chosen.head.npy", "chosen.npy"]
    assert names(folder) == expected
    tables.write_part(folder, [part(2)])
    tables.finish(folder, {name: values + 1 for name, values in TABLE.items()})
    assert names(folder) == expected
    assert_same(tables.read(folder))
