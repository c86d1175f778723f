import gzip
import json
import time

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dpo_jax import paths
from dpo_jax.data import hub, sources

ROWS = [{"prompt": "p é", "label": True}, {"prompt": "q", "label": False}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_jsonl_lines_are_counted_from_one_and_blank_ones_are_skipped_but_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n  \r\n{"a": 2}\n')
    rows = sources.read(path, "train")
    assert [rows[i] for i in range(len(rows))] == [{"a": 1}, {"a": 2}]
    assert [rows.where(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]


def test_a_line_separator_within_json_text_does_not_end_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": "second"}')
    rows = sources.read(path, "train")
    assert rows[0] == {"a": "x\u2028y\x85z"}
    assert rows.where(1) == f"{path}:2"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert sources.read(str(tmp_path / "a.jsonl"), "train")[0] == {"a": 1}


def test_gzipped_jsonl_reads_as_the_plain_file_does(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    rows = sources.read(str(path), "train")
    assert [rows[0], rows[1]] == ROWS
    assert rows.where(1) == f"{path}:2"


def test_a_cut_gzip_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-10])
    with pytest.raises(ValueError, match="a.jsonl.gz: not a complete gzip file"):
        sources.read(str(path), "train")


def test_a_file_of_another_file_system_is_read_through_paths():
    paths.write_text("memory://sources/a.jsonl", '{"a": 1}\n')
    rows = sources.read("memory://sources/a.jsonl", "train")
    assert rows[0] == {"a": 1} and rows.where(0) == "memory://sources/a.jsonl:1"


def test_parquet_rows_are_plain_values_and_counted_from_zero(tmp_path):
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    rows = sources.read(path, "train")
    assert [rows[0], rows[1]] == ROWS
    assert rows.where(1) == f"{path} row 1"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_an_earlier_row_and_the_same_row_can_be_looked_up_again(tmp_path, suffix):
    path, rows = tmp_path / f"a.{suffix}", [{"a": i} for i in range(600)]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=250)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    found = sources.read(str(path), "train")
    assert len(found) == 600
    assert [found[i] for i in (0, 7, 7, 3, 599, 0)] == [rows[i] for i in (0, 7, 7, 3, 599, 0)]
    assert list(found.items) == rows


def test_a_saved_dataset_needs_no_split_and_a_saved_dict_of_them_does(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    one = sources.read(str(tmp_path / "one"), "anything")
    assert [one[0], one[1]] == ROWS
    rows = sources.read(str(tmp_path / "dict"), "train")
    assert [rows[0], rows[1]] == ROWS
    assert rows.where(1) == f"{tmp_path}/dict[train] row 1"
    with pytest.raises(ValueError, match="no split 'test'; there are: 'train'"):
        sources.read(str(tmp_path / "dict"), "test")


def test_a_folder_that_is_no_saved_dataset_says_what_it_holds(tmp_path):
    write(tmp_path / "stray.txt", "x")
    with pytest.raises(ValueError, match="dataset_dict.json.*holds: stray.txt.*save_to_disk"):
        sources.read(str(tmp_path), "train")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    message = {"role": tfds.features.Text(), "content": tfds.features.Text()}

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "prompt": tfds.features.Text(),
                "label": np.bool_,
                "chosen": tfds.features.Sequence(message),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(25):
                chosen = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é"}]
                yield i, {"prompt": f"é{i}", "label": i % 2 == 0, "chosen": chosen}

    folder = str(tmp_path_factory.mktemp("tfds"))
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return f"{folder}/tiny/1.0.0"


@pytest.mark.filterwarnings("ignore")
def test_tfds_rows_are_text_and_plain_values_and_split_slices_hold(tfds_folder):
    rows = sources.read(f"tfds:{tfds_folder}", "train[:10]")
    assert len(rows) == 10
    assert rows[3] == {
        "prompt": "é3",
        "label": False,
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é"}],
    }
    assert type(rows[3]["label"]) is bool
    assert rows.where(3) == f"tfds:{tfds_folder}[train[:10]] row 3"
    assert sources.read(f"tfds:{tfds_folder}", "train[20:]")[0]["prompt"] == "é20"
    assert len(sources.read(f"tfds:{tfds_folder}", "train")) == 25


@pytest.mark.filterwarnings("ignore")
def test_a_tfds_folder_that_is_none_and_a_split_that_is_not_there_are_named(tfds_folder, tmp_path):
    with pytest.raises(ValueError, match=f"no dataset_info.json in {tmp_path}"):
        sources.read(f"tfds:{tmp_path}", "train")
    with pytest.raises(ValueError, match="no split 'test'; there are: train"):
        sources.read(f"tfds:{tfds_folder}", "test[:3]")


def test_a_hub_name_offline_fails_at_once_and_says_what_to_do():
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        sources.read("hf:nobody/nothing-of-this-name", "train")
    assert time.monotonic() - start < 10
    for part in ("hf:nobody/nothing-of-this-name", "'train'", "HF_HUB_OFFLINE is set", "FOLDER"):
        assert part in str(error.value)


def test_a_hub_dataset_is_asked_for_its_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    rows = sources.read("hf:a/b", "train[:2]")
    assert asked == [("a/b", "train[:2]")]
    assert rows.where(1) == "hf:a/b[train[:2]] row 1" and rows[1] == ROWS[1]


def test_an_endpoint_that_nothing_answers_at_is_unreachable(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in str(hub.why_unreachable())


def test_local_files_only_is_undone_also_after_an_error():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), hub.local_files_only():
        assert constants.HF_HUB_OFFLINE is True
        raise KeyError
    assert constants.HF_HUB_OFFLINE is before


@pytest.mark.parametrize("source", ["data.csv", "nothing", "data.json"])
def test_an_unknown_source_lists_the_kinds(source):
    with pytest.raises(ValueError) as error:
        sources.read(source, "train")
    for part in (source, ".jsonl.gz", ".parquet", "save_to_disk", "hf:NAME", "tfds:DIR"):
        assert part in str(error.value)


def test_builtin_says_that_it_is_prepared_elsewhere():
    with pytest.raises(ValueError, match="'builtin' is prepared.*scripts.train"):
        sources.read("builtin", "train")


def test_a_missing_file_is_named_together_with_the_nearest_one(tmp_path):
    write(tmp_path / "harmless_train.jsonl", "{}\n")
    with pytest.raises(ValueError) as error:
        sources.read(str(tmp_path / "harmles_train.jsonl"), "train")
    assert f"{tmp_path}/harmles_train.jsonl: no such file" in str(error.value)
    assert f"did you mean {tmp_path}/harmless_train.jsonl?" in str(error.value)
    with pytest.raises(ValueError, match="no such file$"):
        sources.read(str(tmp_path / "zzz.parquet"), "train")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match="a.jsonl: the file is empty"):
        sources.read(write(tmp_path / "a.jsonl", content), "train")


def test_a_line_that_is_not_json_is_shown_with_its_place_and_the_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": tru}\n')
    with pytest.raises(ValueError) as error:
        sources.read(path, "train")
    assert f"{path}:3: not JSON (Expecting value" in str(error.value)
    assert '{"a": tru}' in str(error.value)


def test_a_line_that_is_json_and_no_object_says_its_type(tmp_path):
    path = write(tmp_path / "a.jsonl", '["x", "y"]\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1: a row must be.*type list.*\[\"x\", \"y\"\]"):
        sources.read(path, "train")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    with pytest.raises(ValueError, match="a.parquet: not a Parquet file"):
        sources.read(write(tmp_path / "a.parquet", "text"), "train")


def test_a_files_fingerprint_is_that_of_its_content_whatever_its_name(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"a": 1}\n')
    second = write(tmp_path / "b.jsonl", '{"a": 1}\n')
    third = write(tmp_path / "c.jsonl", '{"a": 2}\n')
    assert sources.fingerprint(first, "train") == sources.fingerprint(second, "test")
    assert sources.fingerprint(first, "train") != sources.fingerprint(third, "train")


def test_the_fingerprint_of_a_hub_dataset_is_that_of_its_rows(monkeypatch):
    rows = [{"a": 1}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows)
    )
    first = sources.fingerprint("hf:a", "train")
    assert sources.fingerprint("hf:b", "train") == first
    rows[0] = {"a": 2}
    assert sources.fingerprint("hf:a", "train") != first


def test_the_fingerprint_of_a_saved_folder_changes_with_its_files_and_the_split(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"a": data, "b": data.select([0])}).save_to_disk(str(tmp_path / "dict"))
    first = sources.fingerprint(str(tmp_path / "dict"), "a")
    assert first != sources.fingerprint(str(tmp_path / "dict"), "b")
    assert first == sources.fingerprint(str(tmp_path / "dict"), "a")
    (tmp_path / "dict" / "a" / "state.json").write_text("{}")
    assert first != sources.fingerprint(str(tmp_path / "dict"), "a")


def test_the_published_files_have_the_rows_that_their_lines_say(shared):
    for name, count in (("hh_harmless_train", 1500), ("hh_harmless_test", 300)):
        rows = sources.read(str(shared / "data" / f"{name}.jsonl.gz"), "train")
        assert len(rows) == count and set(rows[count - 1]) == {"chosen", "rejected"}
    assert len(sources.read(str(shared / "data" / "alpaca_eval_judged.jsonl.gz"), "train")) == 1610
