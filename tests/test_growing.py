import io

import numpy as np
import pytest

from dpo_jax.data import growing


@pytest.mark.parametrize("counts", [[], [0], [3], [1, 0, 1000, 7]])
def test_a_column_that_grew_is_the_file_that_numpy_writes_at_once(tmp_path, counts):
    parts = [np.arange(count, dtype=np.int64) + 5 for count in counts]
    with growing.column(str(tmp_path / "a.npy"), np.int32) as append:
        for part in parts:
            append(part)
    expected = io.BytesIO()
    np.save(expected, np.concatenate([np.zeros(0), *parts]).astype(np.int32))
    assert (tmp_path / "a.npy").read_bytes() == expected.getvalue()


def test_texts_come_back_whatever_their_characters_and_their_file_is_gone(tmp_path):
    found = ["one", "", "zwei é\n", "\u2028", "one"]
    with growing.Texts(str(tmp_path)) as texts:
        for text in found:
            texts.append(text)
        assert list(texts) == found and len(texts) == 5 and texts[2] == "zwei é\n"
        with pytest.raises(IndexError):
            texts[5]
    assert texts.file.closed and not list(tmp_path.iterdir())
