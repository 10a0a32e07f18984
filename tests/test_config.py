"""The schema of a run: every mistake stops at once, with one message that names the key and the valid choices."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from lowprec.config import ConfigError, RunConfig, schema_keys
from lowprec.run.compose import check_sweep, compose_run, explain, run_name

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FOLDER = ROOT / "conf"


def mistake(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides, CONFIG_FOLDER)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_default_is_fashion_mnist_w2a8_n4() -> None:
    config = compose_run([], CONFIG_FOLDER)
    assert config.experiment == config.run_id == "fashion_mnist_w2a8_n4"
    assert config.model.name == "cifar_resnet8"
    assert config.recipe.name == "w2a8_n4"
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.max_epoch=3", ["trainer.max_epoch=3", "did you mean trainer.max_epochs?", "trainer.precision"]),
        ("trainr.max_epochs=3", ["trainr.max_epochs=3", "did you mean trainer.max_epochs?"]),
        ("max_epochs=3", ["max_epochs=3", "did you mean trainer.max_epochs?"]),
        ("+trainer.foo=2", ["unknown key trainer.foo=2", "the keys of trainer are"]),
        ("++optim.lr=2", ["unknown key optim.lr=2", "optim.learning_rate"]),
        ("optim.lr=0.1", ["unknown key optim.lr=0.1", "optim.learning_rate"]),
        ("quants=w2a8_n4", ["unknown key quants=w2a8_n4", "did you mean quant?"]),
        ("quant.weights.cluster=8", ["quant.weights.cluster=8", "did you mean quant.weights.cluster_size?"]),
        ("+quant.weights.cluster=8", ["quant.weights.cluster", "cluster_size"]),
        ("baseline.optim.momentun=0.5", ["baseline.optim.momentun=0.5", "did you mean baseline.optim.momentum?"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(override: str, parts: list[str]) -> None:
    message = mistake(override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data=fashion_mnst", ["data=fashion_mnst", "choose one of cifar10, cifar100, digits, fashion_mnist"]),
        ("experiment=digits", ["experiment=digits", "digits_smoke"]),
        ("quant=w2a8", ["quant=w2a8", "w2a8_n4, w2a8_n64, w4a8_n4, w8a8"]),
        ("optim=sdg", ["optim=sdg", "adamw, sgd", "did you mean sgd?"]),
        ("logger=tensorboard", ["logger=tensorboard", "csv, csv_wandb, none, wandb"]),
        ("task=trian", ["task=trian", "train, evaluate, verify, export, cost", "did you mean train?"]),
        ("trainer.precision=fp8", ["trainer.precision=fp8", "auto, 32, bf16"]),
        ("data.name=mnist", ["data.name=mnist", "digits", "did you mean fashion_mnist?"]),
        ("quant.weights.bits=3", ["quant.weights.bits=3", "2, 4, 8"]),
        ("quant.weights.solver=best", ["quant.weights.solver='best'", "exact, rms, paper, twn"]),
        ("quant.activations.calibrator=mean", ["quant.activations.calibrator='mean'", "mse, max, percentile"]),
    ],
)
def test_an_unknown_choice_is_named_with_the_valid_ones(override: str, parts: list[str]) -> None:
    message = mistake(override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.max_epochs=four", ["trainer.max_epochs=four: expected a whole number"]),
        ("seed=1.5", ["seed=1.5: expected a whole number"]),
        ("optim.nesterov=maybe", ["optim.nesterov=maybe", "bool"]),
        ("optim=3", ["optim=3"]),
        ("trainer.max_epochs", ["trainer.max_epochs", "KEY=VALUE"]),
        ("data.root=[", ["data.root=[", "KEY=VALUE"]),
        ("quant.weights.cluster_size=four", ["quant.weights.cluster_size='four'", "whole number"]),
        ("optim.learning_rate=fast", ["optim.learning_rate=fast: expected a number"]),
        ("lr=0.1", ["unknown key lr=0.1", "did you mean optim.learning_rate?"]),
        ("digits_smoke", ["digits_smoke: write KEY=VALUE, such as experiment=digits_smoke"]),
    ],
)
def test_a_wrong_type_is_named(override: str, parts: list[str]) -> None:
    message = mistake(override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "override",
    [
        "quant.weights.cluster_size=0",
        "quant.activations.bits=4",
        "optim.learning_rate=-1",
        "optim.learning_rate=0",
        "optim.learning_rate=inf",
        "trainer.distillation.temperature=inf",
        "optim.weight_decay=-0.1",
        "optim.momentum=1",
        "optim.betas=[0.9]",
        "optim.warmup_epochs=3",
        "baseline.optim.warmup_epochs=-1",
        "baseline.max_epochs=0",
        "trainer.max_epochs=-1",
        "trainer.label_smoothing=1",
        "trainer.distillation.weight=1.5",
        "trainer.distillation.temperature=0",
        "trainer.gradient_clip=0",
        "trainer.threads=0",
        "data.batch_size=0",
        "data.validation_share=1",
        "data.limit_test=0",
        "data.padding=-1",
        "data.num_workers=-1",
        "calibration.images=0",
        "seed=-1",
        "run_id=../elsewhere",
        "run_id=baselines",
        "model.name=''",
    ],
)
def test_an_impossible_value_is_named(override: str) -> None:
    key, value = override.split("=", 1)
    message = mistake(override)
    assert message.startswith(key), message
    assert value.strip("'[]") in message


def test_a_compiled_training_is_left_to_the_compiler() -> None:
    for option in ("keep_codes", "tensor_cores"):
        message = mistake(f"trainer.{option}=true", "trainer.compile=true")
        assert message == f"trainer.{option}=true: not with trainer.compile=true; choose one of the two"


def test_data_of_ones_own_needs_its_folder_but_not_for_costs() -> None:
    assert "data.root" in mistake("data=image_folder")
    assert compose_run(["data=image_folder", "task=cost", "data.num_classes=7"], CONFIG_FOLDER).data.num_classes == 7


@pytest.mark.parametrize(
    ("argument", "key"),
    [("in_chans", "data.in_channels"), ("num_classes", "data.num_classes"), ("pretrained", "model.pretrained")],
)
def test_what_another_key_says_is_no_argument_of_the_model(argument: str, key: str) -> None:
    message = mistake(f"+model.arguments.{argument}=1")
    assert message.startswith(f"model.arguments.{argument}=1: {key} "), message


def test_rules_come_through_and_are_checked() -> None:
    config = compose_run(["quant.rules=[{pattern: 'layer3.*', bits: 4}]"], CONFIG_FOLDER)
    assert config.recipe.rules[0].bits == 4
    assert "quant.rules[0].patern" in mistake("quant.rules=[{patern: 'layer3.*', bits: 4}]")


def test_planes_compose_in_the_weights_and_in_rules() -> None:
    config = compose_run(
        ["quant.weights.planes=2", "quant.rules=[{pattern: '@classifier', bits: 8}, {pattern: 'stage1.*', planes: 1}]"],
        CONFIG_FOLDER,
    )
    assert config.recipe.weights.planes == 2
    assert [rule.changes() for rule in config.recipe.rules] == [{"planes": 1, "bits": 8}, {"planes": 1}]
    assert compose_run([], CONFIG_FOLDER).recipe.weights.planes == 1
    assert "quant.weights.planes=2: only ternary" in mistake("quant=w4a8_n4", "quant.weights.planes=2")
    assert "quant.weights.planes=3" in mistake("quant.weights.planes=3")


def test_every_key_of_the_schema_is_known() -> None:
    keys = schema_keys()
    assert {"trainer.distillation.weight", "quant.weights.cluster_size", "baseline.optim.name"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_the_run_folder_is_named_by_experiment_and_overrides_alone() -> None:
    name = run_name("digits_smoke", ["experiment=digits_smoke", "trainer.max_epochs=0", "seed=1"])
    assert name == "digits_smoke-seed_1-trainer.max_epochs_0"
    assert name == run_name("digits_smoke", ["seed=1", "trainer.max_epochs=0"])


@pytest.mark.parametrize(
    "override",
    [
        "logger=wandb",
        "logger.mode=offline",
        "task=verify",
        "runs_dir=/tmp/x",
        "fresh=true",
        "data.root=/data",
        "data.num_workers=4",
        "trainer.progress=none",
        "hydra.verbose=true",
        "hydra/launcher=basic",
        "run_id=mine",
    ],
)
def test_what_does_not_change_a_result_is_not_in_the_name(override: str) -> None:
    assert run_name("digits_smoke", [override, "seed=2"]) == "digits_smoke-seed_2"


def test_long_and_odd_overrides_get_a_hash() -> None:
    odd = run_name("e", ["quant.rules=[{pattern: 'a', bits: 4}]"])
    assert odd != run_name("e", ["quant.rules=[{pattern; 'a', bits: 4}]"])
    long = run_name("e", [f"model.arguments.key{index}=value" for index in range(20)])
    assert len(long) < 120
    assert all(character.isalnum() or character in "._,+-" for character in odd + long)


def test_a_sweep_is_checked_by_its_first_run() -> None:
    assert compose_run(["seed=3,4"], CONFIG_FOLDER).seed == 3
    assert "trainer.max_epoch=1" in mistake("trainer.max_epoch=1,2")


def test_every_value_of_a_sweep_is_checked_before_the_first_run() -> None:
    check_sweep(["seed=3,4", "optim.learning_rate=0.01,0.1"], CONFIG_FOLDER)
    with pytest.raises(ConfigError, match=r"^optim.learning_rate=-1.0: expected above 0"):
        check_sweep(["seed=3,4", "optim.learning_rate=0.01,1e9,-1"], CONFIG_FOLDER)


@pytest.mark.parametrize("arguments", [["trainer.max_epoch=3"], ["-m", "seed=0,1", "quant.weights.bits=3"]])
def test_train_stops_within_seconds_and_says_it_once(arguments: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - started < 10  # some 2 s on an idle machine


def test_the_configuration_is_checked_before_torch_is_imported() -> None:
    code = (
        "import sys; from lowprec.run.command_line import check; from pathlib import Path\n"
        f"check(['seed=1'], Path({str(CONFIG_FOLDER)!r}))\n"
        "print([name for name in ('torch', 'lightning', 'timm', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_launcher_that_is_not_installed_says_how_to_get_it() -> None:
    error = MissingConfigException("not found", missing_cfg_file="hydra/launcher/submitit_slurm")
    assert explain(error, []).endswith('pip install "lowprec[slurm]"')
