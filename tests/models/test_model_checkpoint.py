"""Every usual checkpoint loads to the same bits; everything else is refused with a reason and a remedy."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lowprec.models import CheckpointError, checkpoint_metadata, create_model, load_checkpoint, save_checkpoint
from lowprec.models.checkpoint import check_published_head
from lowprec.models.cifar_resnet import resnet8


def build(seed: int = 0, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return resnet8(num_classes=num_classes, in_channels=1, width=4)


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[key]) for key, tensor in first.state_dict().items())


def lightning(state: dict[str, Tensor], attribute: str = "net.") -> dict:
    others = {"teacher.conv1.weight": torch.ones(3), "accuracy.total": torch.ones(1)}
    return {"pytorch-lightning_version": "2.5", "epoch": 3, "state_dict": with_prefix(state, attribute) | others}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "bare.pt": lambda state: state,
    "bare.bin": lambda state: state,
    "state_dict.pth": lambda state: {"state_dict": state, "epoch": 90, "best_acc1": torch.tensor(0.7)},
    "model.pth": lambda state: {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
    "model_state_dict.pt": lambda state: {"model_state_dict": state},
    "ema_alone.pth": lambda state: {"model_ema": with_prefix(state, "module."), "epoch": 1},
    "weights_before_ema.pth": lambda state: {"model_ema": {"conv1.weight": torch.ones(1)}, "model": state},
    "nested.pt": lambda state: {"model": {"state_dict": state}},
    "ddp.pt": lambda state: {"state_dict": with_prefix(state, "module.")},
    "compiled.pt": lambda state: with_prefix(state, "_orig_mod."),
    "compiled_ddp.pt": lambda state: with_prefix(state, "module._orig_mod."),
    "lightning.ckpt": lightning,
    "lightning_model.ckpt": lambda state: lightning(state, "model."),
    "lightning_compiled.ckpt": lambda state: lightning(state, "model._orig_mod."),
    "no_counters.pt": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "half.pt": lambda state: {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_usual_wrappings(tmp_path: Path, name: str) -> None:
    source, target = build(seed=1), build(seed=2)
    for tensor in source.parameters():
        tensor.data = tensor.data.bfloat16().float()  # so that the half-precision file holds the same values
    torch.save(WRAPPINGS[name](source.state_dict()), tmp_path / name)
    load_checkpoint(target, tmp_path / name)
    assert equal(source, target)
    assert all(tensor.dtype == torch.float32 for tensor in target.parameters())


def test_save_and_load(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    path = tmp_path / "made" / "model.safetensors"
    save_checkpoint(source, path, {"top1": "0.91"})
    load_checkpoint(target, path)
    assert equal(source, target)
    assert checkpoint_metadata(path) == {"top1": "0.91"}
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_compiled_model_saves_and_loads_plain_names(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    save_checkpoint(torch.compile(source), tmp_path / "model.safetensors", {})
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == source.state_dict().keys()
    load_checkpoint(torch.compile(target), tmp_path / "model.safetensors")
    assert equal(source, target)


def test_tied_weights_save(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_checkpoint(model, tmp_path / "tied.safetensors", {})
    load_checkpoint(model, tmp_path / "tied.safetensors")


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    model, path, found = nn.Linear(3, 3), tmp_path / "model.safetensors", set()
    for _ in range(12):
        save_checkpoint(model, path, {"epoch": "1", "seed": "0", "recipe": "w2a8_n4"})
        found.add(path.read_bytes())
    assert len(found) == 1


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = build(), tmp_path / "model.safetensors"
    save_checkpoint(model, path, {"run": "old"})

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, path, {"run": "new"})
    assert checkpoint_metadata(path) == {"run": "old"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_mismatch_lists_missing_unexpected_and_shapes(tmp_path: Path) -> None:
    model = build()
    state = model.state_dict()
    del state["stage1.0.conv1.weight"]
    state["extra"] = torch.ones(1)
    state["conv1.weight"] = torch.ones(8, 1, 3, 3)
    torch.save(state, tmp_path / "other.pt")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "other.pt")
    text = str(caught.value)
    assert str(tmp_path / "other.pt") in text
    assert "1 missing in the checkpoint: stage1.0.conv1.weight" in text
    assert "1 unexpected in the checkpoint: extra" in text
    assert "1 of another shape: conv1.weight ((8, 1, 3, 3), model (4, 1, 3, 3))" in text
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    torch.save({f"layer{number}": torch.ones(1) for number in range(30)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"30 unexpected in the checkpoint: layer0, .*layer9, …"):
        load_checkpoint(build(), tmp_path / "other.pt")


def test_class_count_hint(tmp_path: Path) -> None:
    save_checkpoint(build(num_classes=10), tmp_path / "ten.safetensors", {})
    with pytest.raises(CheckpointError, match=r"classifier\.weight .* has 10 classes, the model has 7: .*num_classes"):
        load_checkpoint(build(num_classes=7), tmp_path / "ten.safetensors")


def test_other_lightning_names_are_not_dropped_elsewhere(tmp_path: Path) -> None:
    state = with_prefix(build().state_dict(), "module.") | {"other": torch.ones(1)}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="unexpected in the checkpoint: other"):
        load_checkpoint(build(), tmp_path / "other.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere\.pt"):
        load_checkpoint(build(), tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(build(), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "legacy.pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_checkpoint(build(), path, {})
    else:
        torch.save(build().state_dict(), path, _use_new_zipfile_serialization=name == "model.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged, truncated .*download it again"):
        load_checkpoint(build(), path)


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"hello world" * 100, b"PK\x03\x04junk"])
def test_no_checkpoint_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(build(), tmp_path / "page.pth")


def test_pickled_module_is_refused_with_a_remedy(tmp_path: Path) -> None:
    torch.save(build(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="CifarResNet") as caught:
        load_checkpoint(build(), tmp_path / "module.pt")
    assert "torch.save(content.state_dict(), 'weights.pt')" in str(caught.value)


def test_pickle_never_runs_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "pwned",)

    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"state_dict": Payload()}, file, protocol=2)
    with pytest.raises(CheckpointError):
        load_checkpoint(build(), tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], torch.ones(3)])
def test_file_without_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="holds"):
        load_checkpoint(build(), tmp_path / "odd.pt")


def test_new_head_keeps_the_models_own_classifier(tmp_path: Path) -> None:
    source, target = build(seed=1, num_classes=7), build(seed=2)
    torch.save(source.state_dict(), tmp_path / "seven.pt")
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has 7 classes, the model has 10: .* model\.head=new"):
        load_checkpoint(target, tmp_path / "seven.pt")
    load_checkpoint(target, tmp_path / "seven.pt", head="new")
    loaded = target.state_dict()
    classifier = [key for key in loaded if loaded[key].shape != source.state_dict()[key].shape]
    assert len(classifier) == 2  # weight and bias
    for key, tensor in loaded.items():
        assert torch.equal(tensor, before[key] if key in classifier else source.state_dict()[key])


def test_new_head_is_new_also_where_the_numbers_of_classes_agree(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    torch.save(source.state_dict(), tmp_path / "ten.pt")
    own = [parameter.clone() for parameter in list(target.parameters())[-2:]]
    load_checkpoint(target, tmp_path / "ten.pt", head="new")
    assert all(torch.equal(one, other) for one, other in zip(own, list(target.parameters())[-2:], strict=True))
    state = source.state_dict()
    del state["conv1.weight"]
    torch.save(state, tmp_path / "lacking.pt")
    with pytest.raises(CheckpointError, match=r"1 missing in the checkpoint: conv1\.weight"):
        load_checkpoint(target, tmp_path / "lacking.pt", head="new")


def test_published_weights_of_other_classes_need_a_new_head() -> None:
    model = create_model("timm:resnet18", num_classes=10)
    with pytest.raises(
        CheckpointError, match=r"published weights have 1000 classes, the data has 10: .*model\.head=new"
    ):
        check_published_head(model, 10, head="strict")
    check_published_head(model, 10, head="new")
    check_published_head(model, 1000, head="strict")
