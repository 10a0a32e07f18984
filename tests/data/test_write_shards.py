"""Writing shards: whole, reproducible, labelled as the folders are."""

import errno
import tarfile
from pathlib import Path

import pytest
from photograph_files import encoded, write_folder

from lowprec.data import DataError
from lowprec.data.write_shards import main, write_shards


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def test_images_labels_and_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 3, "val": 1, "test": 1})
    (folder / "train" / "cat" / "001.jpg").rename(folder / "train" / "cat" / "001.JPEG")
    counts = write_shards(folder, tmp_path / "out", images_per_shard=4, seed=1)
    assert counts == {"train": 9, "val": 3, "test": 3}
    assert (tmp_path / "out" / "classes.txt").read_text() == "bird\ncat\ndog\n"
    written = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert written == ["000000.tar", "000001.tar", "000002.tar"]
    content: dict[str, bytes] = {}
    for name in written:
        content |= members(tmp_path / "out" / "train" / name)
    labels = [int(content[f"{number:08d}.cls"]) for number in range(9)]
    images = [next(content[f"{number:08d}.{kind}"] for kind in ("jpg", "jpeg") if f"{number:08d}.{kind}" in content)
              for number in range(9)]  # fmt: skip
    # write_folder numbers its images class by class.
    order = [images.index(encoded(number)) for number in range(9)]
    assert [labels[place] for place in order] == [0] * 3 + [1] * 3 + [2] * 3
    assert order != sorted(order)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 4, "val": 1})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shards(folder, tmp_path / name, seed=seed)
    first, again, other = ((tmp_path / name / "train" / "000000.tar").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_existing_shards_are_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 1, "val": 1})
    write_shards(folder, tmp_path / "out")
    before = (tmp_path / "out" / "train" / "000000.tar").read_bytes()
    with pytest.raises(DataError, match="train holds tar files already"):
        write_shards(folder, tmp_path / "out", seed=5)
    assert (tmp_path / "out" / "train" / "000000.tar").read_bytes() == before


def test_unsupported_kind_is_named_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 2, "val": 1})
    victim = folder / "val" / "dog" / "0.bmp"
    victim.write_bytes(encoded(0, "BMP"))
    with pytest.raises(DataError, match=rf"{victim} is of a kind that shards do not hold"):
        write_shards(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="at least 1, not 0"):
        write_shards(folder, tmp_path / "out", images_per_shard=0)


def test_interrupted_write_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 2, "val": 1})

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shards(folder, tmp_path / "out")
    assert list((tmp_path / "out" / "train").iterdir()) == []


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 1, "val": 1})
    monkeypatch.setattr("sys.argv", ["write_shards", str(folder), str(tmp_path / "out"), "--images-per-shard", "2"])
    assert main() == 0
    assert "3 images in train, 3 images in val" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "train").iterdir())) == 2
    assert main() == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out' / 'train'} holds tar files already")
