"""The slim install: the group `predict` of pyproject.toml is all that `cxr predict` needs; the image is made of it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUP = [Requirement(line) for line in PROJECT["dependency-groups"]["predict"]]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
ABSENT = ("torch", "torchvision", "fastai", "scipy", "scikit-learn", "matplotlib", "pandas", "onnx")
USED = "cxr_fastai.cli, cxr_fastai.predict, cxr_fastai.inputs, cxr_fastai.engine, cxr_fastai.serving.app"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[Requirement]) -> set[str]:
    """Return the distributions that these requirements bring, as they are installed here."""
    found: set[str] = set()
    waiting = [(r.name, frozenset(r.extras)) for r in requirements]
    while waiting:
        name, extras = waiting.pop()
        found.add(canonical(name))
        for line in distribution(name).requires or ():
            need = Requirement(line)
            wanted = need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *extras))
            if wanted and canonical(need.name) not in found:
                waiting.append((need.name, frozenset(need.extras)))
    return found


def run_with_the_group_alone(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run Python code where nothing can be imported that the group does not bring, as in the slim environment."""
    brought = closure(GROUP) | {"cxr-fastai"}
    hidden = {name for name, owners in packages_distributions().items() if not {*map(canonical, owners)} & brought}
    assert {"torch", "fastai", "pandas"} <= hidden  # what is not hidden would prove nothing
    script = tmp_path / "alone.py"
    script.write_text(
        f"""import sys
hidden = {hidden!r}
for name in [n for n in sys.modules if n.partition(".")[0] in hidden]:
    del sys.modules[name]
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
{code}"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, cwd=tmp_path)


# --- the group ----------------------------------------------------------------------------------------------------


def test_the_group_asks_for_the_same_versions_as_the_project() -> None:
    full = {canonical(r.name): r for r in map(Requirement, PROJECT["project"]["dependencies"])}
    for requirement in GROUP:
        if (same := full.get(canonical(requirement.name))) is not None:
            assert requirement.specifier == same.specifier, requirement.name


def test_the_group_brings_neither_torch_nor_anything_as_large() -> None:
    assert closure(GROUP) & set(ABSENT) == set()


def test_every_room_of_the_receiver_can_be_entered_with_the_group_alone(tmp_path: Path) -> None:
    done = run_with_the_group_alone(f"import {USED}", tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_with_the_group_alone("import cxr_fastai.training", tmp_path)
    assert "ModuleNotFoundError: No module named" in done.stderr


def test_predicting_needs_the_group_alone(tmp_path: Path, finished: Path) -> None:
    from test_dicom import dicom

    (tmp_path / "film.dcm").write_bytes(dicom(syntax="jpeg 2000"))
    arguments = ["predict", "film.dcm", "--model", str(finished), "--json", "--no-abstain"]
    written = ["--evidence", "e", "--dicom", "d", "--out", "rows.parquet"]
    code = f"import sys\nsys.argv = ['cxr', *{arguments + written}]\nfrom cxr_fastai.cli import main\nmain()"
    done = run_with_the_group_alone(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] in ("normal", "abnormal")
    assert len(list(tmp_path.glob("d/*.dcm"))) == 2
    assert (tmp_path / "rows.parquet").stat().st_size > 0


def test_what_needs_more_says_so_in_one_line(tmp_path: Path) -> None:
    code = "import sys\nsys.argv = ['cxr', 'train', 'x']\nfrom cxr_fastai.cli import main\nmain()"
    done = run_with_the_group_alone(code, tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \w+ is not installed: this is the slim install, [^\n]*\n", done.stderr), done.stderr


def test_predicting_reports_nothing_to_anybody(tmp_path: Path, finished: Path) -> None:
    film = tmp_path / "film.png"
    Image.fromarray((np.random.default_rng(0).random((64, 64)) * 255).astype(np.uint8)).save(film)
    environment = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("ORT_")}
    subprocess.run(
        [sys.executable, "-m", "cxr_fastai", "predict", str(film), "--model", str(finished)],
        env={**environment, "HOME": str(tmp_path / "home")}, check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert not list(tmp_path.rglob("deviceid"))
    assert not list(tmp_path.rglob("*.db"))


# --- the image ----------------------------------------------------------------------------------------------------


def test_the_image_is_pinned_and_made_of_the_group() -> None:
    base = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert base == ["python:3.13-slim"]
    assert "latest" not in DOCKERFILE
    assert re.search(r"^RUN .*pip install --group predict$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^RUN .*pip install --no-deps \.", DOCKERFILE, re.MULTILINE)
    allowed = PROJECT["project"]["requires-python"]
    assert Requirement(f"python{allowed}").specifier.contains("3.13.0")


def test_the_image_runs_as_nobody_special() -> None:
    instructions = [line.split(None, 1) for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)]
    users = [rest for name, rest in instructions if name == "USER"]
    assert users == ["10001:10001"]
    order = [name for name, _ in instructions]
    assert "RUN" not in order[order.index("USER") :]
    assert "ORT_DISABLE_TELEMETRY=1" in [rest for name, rest in instructions if name == "ENV"]
    assert [rest for name, rest in instructions if name == "ENTRYPOINT"] == ['["cxr"]']


def test_only_what_the_image_is_made_of_reaches_the_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "./cxr_fastai".removeprefix("./")} == sent
    assert all((ROOT / name).exists() for name in copied)


# --- the environment itself ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder `bin` of an environment that was made with the commands of the README."""
    folder = tmp_path_factory.mktemp("slim")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cxr_fastai"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    bin_ = folder / "venv" / "bin"
    for words in (["pip>=25.1"], ["--group", "predict"], ["--no-deps", "."]):
        command = [bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
        if re.search("connection|Name or service|No matching distribution found for pip", done.stderr, re.IGNORECASE):
            pytest.skip("pip reaches no package index from here")
        assert done.returncode == 0, done.stderr
    return bin_


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_slim_install_predicts_as_the_full_one(slim: Path, finished: Path, films: Path) -> None:
    listed = subprocess.run([slim / "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    assert {canonical(row["name"]) for row in json.loads(listed.stdout)} & set(ABSENT) == set()
    for name in ("torch", "fastai"):
        tried = subprocess.run([slim / "python", "-c", f"import {name}"], capture_output=True, text=True)
        assert f"ModuleNotFoundError: No module named '{name}'" in tried.stderr
    film = next(films.rglob("*.png"))
    arguments = ["predict", film, "--model", finished, "--precision", "fp32", "--json"]
    bare = {"PATH": os.defpath}  # no HOME, nothing of this environment
    commands = {"slim": [slim / "cxr", *arguments], "full": [sys.executable, ROOT / "cli.py", *arguments]}
    rows = {}
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, text=True, env=bare if name == "slim" else None, cwd="/")
        assert done.returncode == 0, done.stderr
        rows[name] = json.loads(done.stdout)
    assert rows["slim"]["label"] == rows["full"]["label"]
    assert rows["slim"]["probability"] == pytest.approx(rows["full"]["probability"], abs=1e-6)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_slim_install_says_what_a_fastai_export_needs(slim: Path, tmp_path: Path) -> None:
    (tmp_path / "learner.pkl").write_bytes(b"")
    (tmp_path / "film.png").write_bytes(b"")
    command = [slim / "cxr", "predict", "film.png", "--model", "learner.pkl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: learner\.pkl is a fastai export, which needs torch; .*\n", done.stderr)
