"""The index of tar files: what is read from their headers, what is kept of it, and what is refused."""

import json
import os
from pathlib import Path

import pytest
from photograph_files import encoded, samples, write_tar

from lowprec.data import DataError, tar_index
from lowprec.data.tar_index import INDEX_FILE, index_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tar files whose headers were read, as it happens."""
    names: list[str] = []
    read = tar_index._read_entries

    def noting(path: Path) -> tar_index._Entries:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(tar_index, "_read_entries", noting)
    return names


def test_images_and_labels_of_all_kinds(tmp_path: Path) -> None:
    first = {
        "a/x.jpg": encoded(0), "a/x.cls": b" 2\n", "a/x.txt": b"ignored", "README": b"ignored",
        "b.cls": b"0", "b.JPEG": encoded(1),
        "c.json": json.dumps({"label": 1, "text": "é"}).encode(), "c.png": encoded(2, "PNG"),
        "d.json": json.dumps({"text": "no label here"}).encode(), "d.webp": encoded(3, "WEBP"), "d.cls": b"1",
    }  # fmt: skip
    write_tar(tmp_path / "1.tar", first)
    write_tar(tmp_path / "0.tar", samples([7], first=10))
    (tmp_path / "notes.txt").write_text("no shard")
    found = index_shards(tmp_path)
    assert found.labels.tolist() == [7, 2, 0, 1, 1]
    assert found.name(1) == f"{tmp_path / '1.tar'}: a/x.jpg"
    assert [found.read(index) for index in range(5)] == [
        encoded(10), encoded(0), encoded(1), encoded(2, "PNG"), encoded(3, "WEBP")
    ]  # fmt: skip


def test_long_names(tmp_path: Path) -> None:
    key = "é" * 40 + "/" + "k" * 180
    write_tar(tmp_path / "0.tar", {f"{key}.jpg": encoded(0), f"{key}.cls": b"0"})
    found = index_shards(tmp_path)
    assert found.name(0).endswith(f"{key}.jpg")
    assert found.read(0) == encoded(0)


def test_headers_are_read_once(tmp_path: Path, headers_read: list[str]) -> None:
    write_tar(tmp_path / "0.tar", samples([0, 1]))
    write_tar(tmp_path / "1.tar", samples([1], first=2))
    first = index_shards(tmp_path)
    assert sorted(headers_read) == ["0.tar", "1.tar"]
    again = index_shards(tmp_path)
    assert len(headers_read) == 2
    assert again.labels.tolist() == first.labels.tolist() == [0, 1, 1]
    assert [again.name(index) for index in range(3)] == [first.name(index) for index in range(3)]
    assert [again.read(index) for index in range(3)] == [encoded(index) for index in range(3)]


def test_a_changed_tar_file_is_read_again(tmp_path: Path, headers_read: list[str]) -> None:
    write_tar(tmp_path / "0.tar", samples([0, 1]))
    changed = write_tar(tmp_path / "1.tar", samples([1], first=2))
    index_shards(tmp_path)
    state = changed.stat()
    write_tar(changed, samples([0], first=2))  # of the same size
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    headers_read.clear()
    assert index_shards(tmp_path).labels.tolist() == [0, 1, 0]
    assert headers_read == ["1.tar"]
    write_tar(tmp_path / "2.tar", samples([2], first=3))
    (tmp_path / "0.tar").unlink()
    assert index_shards(tmp_path).labels.tolist() == [0, 2]
    assert headers_read == ["1.tar", "2.tar"]


def test_a_damaged_index_is_made_anew(tmp_path: Path, headers_read: list[str]) -> None:
    write_tar(tmp_path / "0.tar", samples([0]))
    index_shards(tmp_path)
    for content in (b"", b"no index", (tmp_path / INDEX_FILE).read_bytes()[:100]):
        (tmp_path / INDEX_FILE).write_bytes(content)
        assert index_shards(tmp_path).labels.tolist() == [0]
    assert len(headers_read) == 4


def test_index_of_a_folder_that_cannot_be_written_to(
    tmp_path: Path, headers_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "0.tar", samples([0]))
    (tmp_path / INDEX_FILE).mkdir()  # stands for a read-only folder, which there is none of for root
    index_shards(tmp_path)
    assert index_shards(tmp_path).labels.tolist() == [0]
    assert headers_read == ["0.tar"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "0.tar"))  # no folder: nothing can be kept anywhere
    assert index_shards(tmp_path).labels.tolist() == [0]
    assert headers_read == ["0.tar", "0.tar"]


def test_no_tar_files(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{tmp_path} has no tar files"):
        index_shards(tmp_path)


@pytest.mark.parametrize("blocks", [1, 3, -21, -20])
def test_truncated_tar_file_is_named(tmp_path: Path, blocks: int) -> None:
    path = write_tar(tmp_path / "0.tar", samples([0, 1, 2]))
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 + 1  # blocks of headers and contents; then come those of the end
    kept = blocks if blocks > 0 else end + 20 + blocks
    path.write_bytes(content[: 512 * kept])
    with pytest.raises(DataError, match=rf"{path} is truncated"):
        index_shards(tmp_path)


def test_garbage_between_members_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples([0, 1]))
    content = bytearray(path.read_bytes())
    place = content.index(b"0001.jpg")
    content[place : place + 512] = b"\xff" * 512
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is truncated or damaged"):
        index_shards(tmp_path)


def test_compressed_tar_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"0\.tar is truncated, compressed or no tar file"):
        index_shards(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x"}, "1 of 1 images have no label, the first is a.jpg"),
        ({"a.jpg": b"x", "a.json": b'{"class": 3}'}, "1 of 1 images have no label, the first is a.jpg"),
        ({"a.jpg": b"x", "a.cls": b"0", "b.cls": b"0"}, "1 labels have no image .* the first is b"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"0"}, "the key a has two images, a.jpg and a.png"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls is no class index: b'cat'"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "a.cls: the label is -1, expected a class index from 0"),
        ({"a.jpg": b"x", "a.json": b"{"}, "a.json is no JSON"),
        ({"a.jpg": b"x", "a.json": b'{"label": "cat"}'}, "a.json: the label is 'cat', expected a class index"),
        ({"a.jpg": b"x", "a.json": b'{"label": true}'}, "a.json: the label is True, expected a class index"),
        ({"README": b"x"}, "0.tar holds no images"),
    ],
)
def test_wrong_members_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=message):
        index_shards(tmp_path)


def test_tar_file_that_shrank_since(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples([0, 1]))
    found = index_shards(tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"0\.tar has become shorter"):
        found.read(1)
    path.unlink()
    with pytest.raises(DataError, match=r"0\.tar cannot be read"):
        found.read(0)
