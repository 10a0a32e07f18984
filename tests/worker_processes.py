"""Runs a function in several processes that are one Gloo group, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from lowprec.training import processes


def run_in_processes(function: Callable[..., Any], *arguments: Any, folder: Path, count: int = 2) -> list[Any]:
    """What ``function(*arguments)`` returned in each process, in the order of ranks; exceptions are returned as texts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    files = [folder / f"result{rank}.pt" for rank in range(count)]
    started = [
        context.Process(target=_work, args=(rank, count, port, files[rank], function, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [torch.load(file, weights_only=False) if file.is_file() else "no result" for file in files]


def _work(
    rank: int, count: int, port: int, file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        TORCHELASTIC_RUN_ID="test",
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        with warnings.catch_warnings(), processes.joined(processes.launch(), gpu=False):
            warnings.simplefilter("ignore")
            result = function(*arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(result, file)
