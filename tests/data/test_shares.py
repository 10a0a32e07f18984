"""Evaluation in several processes: over all of them, every image counts once."""

from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from photograph_files import SMALL, write_folder

from lowprec.data import create_data
from lowprec.data.epochs import ShareSampler

PROCESSES = 2


def load(rank: int, root: Path) -> None:
    """What one process gets of all loaders, as a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=PROCESSES)
    photographs = create_data(
        "image_folder", root=root, data_config=SMALL, num_workers=0, eval_batch_size=4, validation_share=0.4
    )
    digits = create_data("digits", limit_test=41)
    found = {
        "test": torch.cat([images for images, _ in photographs.test_dataloader()]),
        "validation": torch.cat([images for images, _ in photographs.val_dataloader()]),
        "digits": torch.cat([images for images, _ in digits.test_dataloader()]),
        "calibration": torch.cat(photographs.calibration_batches(5)),
        "batches": torch.tensor(len(photographs.test_dataloader())),
    }
    torch.save(found, root / f"{rank}.pt")
    distributed.destroy_process_group()


def test_every_image_counts_once_over_all_processes(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 6, "val": 5})
    torch.multiprocessing.start_processes(load, (root,), nprocs=PROCESSES, start_method="fork")
    shares = [torch.load(root / f"{rank}.pt") for rank in range(PROCESSES)]
    photographs = create_data("image_folder", root=root, data_config=SMALL, num_workers=0, validation_share=0.4)
    whole = {
        "test": photographs.test_dataloader(),
        "validation": photographs.val_dataloader(),
        "digits": create_data("digits", limit_test=41).test_dataloader(),
    }
    for name, loader in whole.items():
        expected = torch.cat([images for images, _ in loader])
        for rank, share in enumerate(shares):
            assert torch.equal(share[name], expected[rank::PROCESSES]), name
        assert sum(len(share[name]) for share in shares) == len(expected)
    assert len(shares[0]["test"]) == 8  # 15 images: the shares are uneven
    assert int(shares[0]["batches"]) == 2
    calibration = torch.cat(photographs.calibration_batches(5))
    assert all(torch.equal(share["calibration"], calibration) for share in shares)


def test_shares_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for images in (1, 2, 7, 8):
        for processes in (1, 2, 3, 5):
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_, size=processes: size)
            indices = []
            for rank in range(processes):
                monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
                share = ShareSampler(images)
                assert len(list(share)) == len(share)
                indices += list(share)
            assert sorted(indices) == list(range(images))
