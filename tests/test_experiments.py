"""Every shipped experiment composes, and takes images through all of its stages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import CONFIG_FOLDER, compose
from PIL import Image

from lowprec.models import create_model, save_checkpoint
from lowprec.run.stages import run

EXPERIMENTS = sorted(
    path.stem
    for path in (CONFIG_FOLDER / "experiment").glob("*.yaml")
    if path.stem != "custom"  # a blank sheet
)
SMALL = ("logger=none", "trainer.progress=none", "trainer.threads=1", "calibration.images=8")
FASHION_MNIST = [name for name in EXPERIMENTS if name.startswith("fashion_mnist")]
IMAGENET = [name for name in EXPERIMENTS if name.startswith("imagenet")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    config = compose(f"experiment={name}")
    assert config.experiment == config.run_id == name
    assert name.endswith(config.recipe.name) or name == "digits_smoke"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_diff_with_its_expected_result(name: str) -> None:
    text = (CONFIG_FOLDER / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert "\n# Expected: " in text
    assert "to be measured)" not in text


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (str(folder.relative_to(CONFIG_FOLDER)), sorted(path.stem for path in folder.glob("*.yaml")))
        for folder in CONFIG_FOLDER.rglob("*")
        if folder.is_dir() and list(folder.glob("*.yaml")) and folder.name != "wandb"
    ],
)
def test_every_choice_of_every_group_composes(group: str, names: list[str]) -> None:
    assert names
    for name in names:
        extra = ["data.root=/photographs"] if name in ("image_folder", "shards") else []
        compose(f"{group}={name}", *extra)


def test_the_issue_s_experiments_are_all_there() -> None:
    assert set(EXPERIMENTS) == {
        *("digits_smoke", "fashion_mnist_w2a8_n4", "fashion_mnist_w2a8_n64", "fashion_mnist_w4a8_n4"),
        *("imagenet_resnet50_w2a8_n4", "imagenet_resnet50_w2a8_n64"),
        *("imagenet_resnet101_w2a8_n4", "imagenet_resnet101_w4a8_n4"),
    }


def test_the_papers_own_settings() -> None:
    fine_tuned = compose("experiment=imagenet_resnet50_w2a8_n64")
    assert (fine_tuned.trainer.max_epochs, fine_tuned.model.pretrained) == (4, True)
    for name in ("imagenet_resnet101_w2a8_n4", "imagenet_resnet101_w4a8_n4"):
        assert compose(f"experiment={name}").trainer.max_epochs == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FASHION_MNIST)
def test_fashion_mnist_experiments_run(name: str, tmp_path: Path) -> None:
    few = ("data.limit_train=128", "data.limit_test=64", "baseline.max_epochs=2", "trainer.max_epochs=1")
    summary = run(compose(f"experiment={name}", f"runs_dir={tmp_path}", *SMALL, *few))
    assert summary["verify"]["mismatched_codes"] == 0
    assert summary["verify"]["images"] == 64
    assert summary["integer"] == summary["onnx"] == {"top1": summary["fine_tuned"]["top1"]}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images in folders laid out like ImageNet's: 3 classes, 4 images each to train on, 2 to test on."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("n01440764", "n01443537", "n01484850"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(root / split / label / f"{index}.JPEG")
    return root


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of random weights, for 3 classes: there is no network to fetch published ones from."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name in ("resnet50", "resnet101"):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.safetensors"
        save_checkpoint(create_model(name, num_classes=3), files[name], {})
    return files


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_experiments_run_on_tiny_random_photographs(
    name: str, photographs: Path, random_weights: dict[str, Path], tmp_path: Path
) -> None:
    config = compose(f"experiment={name}")
    model, epochs = config.model.name, min(1, config.trainer.max_epochs)
    summary = run(
        compose(
            f"experiment={name}",
            f"runs_dir={tmp_path}",
            f"data.root={photographs}",
            "model.pretrained=false",
            f"model.checkpoint={random_weights[model]}",
            *("data.num_classes=3", "data.image_size=32", "data.num_workers=0", "data.validation_share=0.25"),
            *("data.batch_size=4", "data.limit_test=2", f"trainer.max_epochs={epochs}"),
            "calibration.reconstruct=false",  # minutes for networks of this size; smaller ones are reconstructed in tests
            *SMALL,
        )
    )
    assert summary["verify"]["mismatched_codes"] == 0
    assert summary["verify"]["images"] == 2
    assert (summary["fine_tuned"] is None) == ("resnet101" in name)


@pytest.mark.parametrize(
    ("name", "share"), [("imagenet_resnet101_w2a8_n4", "84.7"), ("imagenet_resnet50_w2a8_n64", "96.2")]
)
def test_costs_are_known_from_shapes_alone(
    name: str, share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = run(compose(f"experiment={name}", "task=cost", f"runs_dir={tmp_path / 'runs'}", "data.root=/nowhere"))
    assert f"{costs['multiplications_replaced']:.1%}" == f"{share}%"
    assert re.search(rf"multiplications replaced +│ +{share}%", capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("model", "macs"), [("cifar_mobilenetv2", 1_097_456), ("vit_small_images", 3_541_120)])
def test_costs_of_the_small_networks(model: str, macs: int) -> None:
    """Depthwise convolutions, and attention: both are prepared as their configuration stands."""
    costs = run(compose("experiment=custom", "data=fashion_mnist", f"model={model}", "task=cost"))
    assert costs["macs"] == macs
    assert costs["integer_mac_share"] == 1.0


@pytest.mark.parametrize("model", ["cifar_mobilenetv2", "vit_small_images"])
def test_small_networks_go_through_all_stages(model: str, tmp_path: Path) -> None:
    """The transformer's softmax is in float, so its codes may differ; the other's may not."""
    small = ["data.limit_train=256", "data.limit_test=32", "baseline.max_epochs=1", "baseline.optim.warmup_epochs=0"]
    small += ["baseline.optim.name=adamw", "baseline.optim.learning_rate=1e-3", "trainer.max_epochs=0"]
    summary = run(
        compose("experiment=custom", "data=fashion_mnist", f"model={model}", f"runs_dir={tmp_path}", *small, *SMALL)
    )
    assert summary["integer"] == summary["post_training"]
    if model == "cifar_mobilenetv2":
        assert summary["verify"]["mismatched_codes"] == 0


def test_costs_need_the_number_of_classes() -> None:
    from lowprec.config import ConfigError

    with pytest.raises(ConfigError, match=r"data\.num_classes"):
        run(compose("data=image_folder", "task=cost", "model=resnet18"))
