import pytest

from lt4rec_sparse.files import whole_file, write_whole


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    target = tmp_path / "state.json"
    write_whole(target, "old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(target) as path:
        path.write_text("new, but")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "state.json"
    for text in ("old", "new"):
        write_whole(target, text)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
