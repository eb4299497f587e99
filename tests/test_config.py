import pytest

from cxr_fastai.config import GenerateConfig, SweepConfig, TrainConfig, batch_sizes_around, sizes_around
from cxr_fastai.errors import UsageError


def test_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.arch, config.size, config.batch_size, config.lr, config.epochs) == ("densenet121", 224, 16, 1e-3, 3)
    assert config.test == 0.2
    assert GenerateConfig().n == 750


def test_json_gives_the_same_config_back() -> None:
    config = TrainConfig(data="x", lr=None, name="a")
    assert TrainConfig.from_json(config.to_json()) == config
    planted = GenerateConfig(plant=("leak:0.1", "shortcut:0.9:border"))
    assert GenerateConfig.from_json(planted.to_json()) == planted


def test_unknown_setting_is_named() -> None:
    with pytest.raises(UsageError, match="unknown setting epoch; known are allow_leaks, arch, audit, augment"):
        TrainConfig.from_json('{"epoch": 3}')


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "--epochs is 0, but must be from 1 to 10000"),
        ({"lr": 0.0}, "--lr is 0.0, but must be a number above 0, or auto"),
        ({"lr": float("nan")}, "--lr is nan"),
        (
            {"arch": "hf-hub:a/b"},
            "--arch is hf-hub:a/b, but must be a name in torchvision or timm, such as densenet121",
        ),
        ({"size": 16}, "--size is 16, but must be from 32 to 1024"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"test": 0.6, "valid": 0.5}, "--test plus --valid is 1.1, but must be below 1"),
        ({"name": "a/b"}, "--name is a/b, but must be a plain folder name"),
        ({"name": "latest"}, "--name is latest"),
        ({"seed": -1}, "--seed is -1"),
        ({"precision": "fp8"}, "--precision is fp8, but must be one of auto, fp32, bf16, fp16"),
        ({"task": "guess"}, "--task is guess"),
    ],
)
def test_training_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 5000}, "--size is 5000"),
        ({"difficulty": "huge"}, "--difficulty is huge, but must be one of easy, medium, hard"),
    ],
)
def test_generate_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"trials": 0}, "--trials is 0, but must be from 1 to 100000"),
        ({"minutes": 0.0}, r"--minutes is 0.0, but must be above 0"),
        ({"workers": 0}, "--workers is 0, but must be from 1 to 256"),
        ({"rate_factor": 0.5}, "--rate-factor is 0.5, but must be from 1 to 100"),
        ({"storage": "trials"}, "--storage is 'trials', but must be a database URL, or journal:FILE"),
        ({"storage": "journal:"}, "--storage is 'journal:'"),
        ({"sizes": (64, 16)}, "--size is 16, but must be from 32 to 1024"),
        ({"archs": ("a b",)}, "--arch is a b, but must be a name in torchvision or timm"),
        ({"batch_sizes": (8, 8)}, r"--batch-size is \(8, 8\), but must be given, each once"),
        ({"train": TrainConfig(folds=3)}, "--folds is 3, but must be 0: a sweep chooses on one validation set"),
    ],
)
def test_sweep_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SweepConfig(**{"train": TrainConfig(), **setting})


def test_sizes_and_batch_sizes_to_try_lie_around_the_one_given() -> None:
    assert sizes_around(224) == (160, 224, 320)
    assert sizes_around(32) == (32,)
    assert sizes_around(1024) == (704, 1024)
    assert batch_sizes_around(16) == (8, 16, 32)
    assert batch_sizes_around(2) == (2, 4)
