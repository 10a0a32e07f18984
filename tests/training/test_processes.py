"""Several processes: how they were started, what they do together, and that they give what one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worker_processes import run_in_processes

from lowprec.config import ConfigError
from lowprec.training import processes
from lowprec.training.batch_norm import SynchronizedBatchNorm2d, average_statistics, synchronize_batch_norms
from lowprec.training.equality import DesynchronizedError, assert_equal_models
from lowprec.training.processes import Launch, PeerError, check_launch, launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_PROCID": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch("python", 0, 1, 0, 1)),
        (TORCHRUN, Launch("torchrun", 5, 8, 1, 4)),
        (SRUN, Launch("srun", 4, 6, 1, 3)),
        # A batch script, and a shell in an allocation, are no steps with several tasks.
        ({"SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, Launch("python", 0, 1, 0, 1)),
        ({**SRUN, "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, Launch("python", 0, 1, 0, 1)),
    ],
)
def test_the_environment_says_how_processes_were_started(variables: dict[str, str], expected: Launch) -> None:
    assert launch(variables) == expected


def test_lightning_never_requeues_a_job() -> None:
    environment: Any = launch(SRUN).environment
    assert environment.auto_requeue is False


@pytest.mark.parametrize(("nodes", "devices"), [(1, 6), (2, 2), (1, 1), (3, 2)])
def test_as_many_processes_as_were_asked_for(nodes: int, devices: int) -> None:
    check_launch(launch(SRUN), 2, 3)
    with pytest.raises(ConfigError, match=r"srun started 6 \(3 on this node\): give trainer.nodes=2 trainer.devices=3"):
        check_launch(launch(SRUN), nodes, devices)


def test_one_process_needs_no_group() -> None:
    assert (processes.rank(), processes.size(), processes.is_main()) == (0, 1, True)
    assert processes.total(1, 2.5) == [1, 2.5]
    assert processes.largest(3) == [3]
    assert processes.gathered("a") == ["a"]
    assert processes.on_main(lambda: 7) == 7


def together() -> dict[str, Any]:
    rank = processes.rank()
    found: dict[str, Any] = {
        "total": processes.total(rank, 0.5),
        "largest": processes.largest(rank, -rank),
        "gathered": processes.gathered({"rank": rank}),
        "on main": processes.on_main(lambda: f"from {processes.rank()}"),
    }
    try:
        processes.on_main(lambda: {}["missing"])
    except (KeyError, PeerError) as error:
        found["failure"] = type(error).__name__
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.fill_(2)
    assert_equal_models(model)
    with torch.no_grad():
        model.bias[1] += 1e-6 * rank
    try:
        assert_equal_models(model)
    except DesynchronizedError as error:
        found["desynchronized"] = str(error)
    return found


def test_what_processes_do_together(tmp_path: Path) -> None:
    first, second = run_in_processes(together, folder=tmp_path)
    shared = {
        "total": [1, 1.0],
        "largest": [1, 0],
        "gathered": [{"rank": 0}, {"rank": 1}],
        "on main": "from 0",
    }
    assert {key: first[key] for key in shared} == shared == {key: second[key] for key in shared}
    assert (first["failure"], second["failure"]) == ("KeyError", "PeerError")
    assert first["desynchronized"] == second["desynchronized"]
    assert first["desynchronized"].startswith("bias of process 1 differs from that of process 0")


def batch() -> Tensor:
    return torch.randn(8, 3, 5, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1


def normalize(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    output = model(images)
    (output * torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)).sum().backward()
    assert images.grad is not None
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"output": output.detach(), "images": images.grad, **state, "weight.grad": model[0].weight.grad}  # type: ignore[index,dict-item,union-attr]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 2)  # type: ignore[union-attr]
        model[0].bias.uniform_(-1, 1)  # type: ignore[union-attr]
    return model


def normalize_together(shares: list[int]) -> dict[str, Any]:
    model = network()
    synchronize_batch_norms(model)
    assert type(model[0]) is SynchronizedBatchNorm2d
    found: dict[str, Any] = dict(normalize(model, batch().split(shares)[processes.rank()]))
    other = nn.Sequential(nn.BatchNorm2d(1))
    other[0].running_mean.fill_(processes.rank())  # type: ignore[union-attr]
    average_statistics(other)
    return {**found, "averaged": other[0].running_mean.item()}  # type: ignore[union-attr]


@pytest.mark.parametrize("shares", [[4, 4], [6, 2]])
def test_batch_norm_over_processes_is_that_of_the_whole_batch(shares: list[int], tmp_path: Path) -> None:
    results = run_in_processes(normalize_together, shares, folder=tmp_path)
    assert not any(isinstance(result, str) for result in results), results
    expected = normalize(network(), batch())
    for key in ("output", "images"):
        torch.testing.assert_close(torch.cat([result[key] for result in results]), expected[key], rtol=1e-5, atol=1e-5)
    for result in results:
        for key in ("0.running_mean", "0.running_var"):
            torch.testing.assert_close(result[key], expected[key], rtol=1e-6, atol=1e-6)
            assert torch.equal(result[key], results[0][key])
        assert result["0.num_batches_tracked"] == 1
        assert result["averaged"] == 0.5
    summed = results[0]["weight.grad"] + results[1]["weight.grad"]
    torch.testing.assert_close(summed, expected["weight.grad"], rtol=1e-5, atol=1e-5)


def test_a_batch_norm_that_cannot_be_synchronized_is_named() -> None:
    with pytest.raises(TypeError, match=r"trainer\.sync_batchnorm=true: 1 is a BatchNorm1d"):
        synchronize_batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
