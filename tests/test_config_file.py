"""Settings in a file: what they may be, and that the command line goes before them."""

from pathlib import Path

import pytest
import typer

from cxr_fastai.cli import app
from cxr_fastai.config import TrainConfig
from cxr_fastai.config_file import read_settings, to_toml
from cxr_fastai.errors import UsageError


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = TrainConfig(
        data='C:\\films "of" Zürich\x7f\n',
        lr=1e-5,
        size=160,
        skip_bad=True,
        prevalence=(0.05, 0.2),
        name="a",
        augment=0.0,
    )
    (tmp_path / "a.toml").write_text(to_toml(config), encoding="utf-8")
    assert TrainConfig(**read_settings(tmp_path / "a.toml")) == config
    text = to_toml(TrainConfig(lr=None, name="a"), leave_out=("name",))
    assert 'lr = "auto"\n' in text
    assert "name" not in text
    assert "positive" not in text  # None
    (tmp_path / "b.toml").write_text(text)
    assert TrainConfig(**read_settings(tmp_path / "b.toml")) == TrainConfig(lr=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown setting epoch; known are allow_leaks, arch, audit, augment"),
        ('epochs = "3"', "epochs is '3', but must be a whole number"),
        ("epochs = true", "epochs is True, but must be a whole number"),
        ("epochs = 3.0", "epochs is 3.0, but must be a whole number"),
        ("skip_bad = 1", "skip_bad is 1, but must be true or false"),
        ('lr = "fast"', "lr is 'fast', but must be a number"),
        ("prevalence = 0.1", "prevalence is 0.1, but must be a list of numbers"),
        ("prevalence = [true]", r"prevalence is \[True\], but must be a list of numbers"),
        ("name = 3", "name is 3, but must be text"),
        ("epochs = ", "not a TOML file"),
    ],
)
def test_what_is_no_setting_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"--config {file}: {message}"):
        read_settings(file)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*/no\.toml: cannot be read \(No such file or directory\)"):
        read_settings(tmp_path / "no.toml")
    (tmp_path / "latin.toml").write_bytes(b'data = "Z\xfcrich"')
    with pytest.raises(UsageError, match=r"latin\.toml: not a TOML file"):
        read_settings(tmp_path / "latin.toml")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Return a function that gives the config that `train` with some arguments would use."""

    def config_of(*arguments: str) -> TrainConfig:
        class Stop(Exception):
            pass

        kept = []

        def stop(data, config, console):
            kept.append(config)
            raise Stop

        monkeypatch.setattr("cxr_fastai.cli.ensure_phantoms", stop)
        with pytest.raises(Stop):
            typer.main.get_command(app)(["train", *arguments], standalone_mode=False)
        return kept[0]

    return config_of


def test_the_command_line_goes_before_the_file(asked, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('data = "films"\nsize = 160\nepochs = 7\nlr = "auto"\nprevalence = [0.1]\nskip_bad = true\n')
    config = asked("--config", str(file))
    assert (config.data, config.size, config.epochs, config.lr) == ("films", 160, 7, None)
    assert (config.prevalence, config.skip_bad) == ((0.1,), True)
    # Also where the command line gives what is the default anyway.
    config = asked("others", "--config", str(file), "--size", "224", "--lr", "0.01", "--prevalence", "0.3")
    assert (config.data, config.size, config.epochs, config.lr) == ("others", 224, 7, 0.01)
    assert config.prevalence == (0.3,)


def test_a_value_out_of_range_names_the_flag(asked, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("size = 5")
    with pytest.raises(UsageError, match="--size is 5, but must be from 32 to 1024"):
        typer.main.get_command(app)(["train", "--config", str(tmp_path / "a.toml")], standalone_mode=False)
