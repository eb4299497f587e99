"""The README's commands exist as they are written, and its tree is the tree."""

import re
import shlex
from pathlib import Path

import pytest

from cxr_fastai.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python cli\.py ([a-z-]+(?: [^`\n|]*)?)", README)))


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_readme_parses(command: str) -> None:
    words = [w for w in shlex.split(command) if not w.startswith("[") and w not in ("...", "IMAGE...")]
    verb, *rest = words
    if verb.startswith("-"):
        pytest.skip("not a verb")
    import typer

    click_command = typer.main.get_command(app)
    found = click_command.commands[verb]
    options = {name for parameter in found.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_set_up_commands_stand_on_one_line() -> None:
    for name in ("train", "test"):
        block = re.search(rf"<!-- {name} command -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert block is not None
        assert block[1].count("\n") == 1
        assert block[1].startswith("python3 -m venv .venv && ")


def test_files_named_in_the_tree_are_there() -> None:
    tree = README.split("## The tree")[1]
    names = re.findall(r"^ {4}((?:  )?[\w./ ]+?)(?:  +[A-Z`a-z].*)?$", tree, re.MULTILINE)
    files = [word for line in names for word in line.split() if re.search(r"\.py$|/$", word)]
    assert len(files) > 15
    for file in files:
        assert (ROOT / file).exists() or (ROOT / "cxr_fastai" / file).exists(), file


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_figures_on_real_films_are_those_of_the_bench() -> None:
    section = README.split("## What phantoms alone teach")[1].split("\n## ")[0]
    figures = re.findall(r"[+-]?0\.\d{3} \([+-]?0\.\d{3} to [+-]?0\.\d{3}\)", section)
    measured = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
    assert len(figures) > 10
    assert [figure for figure in figures if figure not in measured] == []
