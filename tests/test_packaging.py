"""The four roots install as one package, with their data, and under no other name."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedlora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
ROOTS = {"fedlora": "fedlora"} | {folder: name for name, folder in SETUPTOOLS["package-dir"].items()}


def package_of(folder: Path) -> str:
    """experiments/conf is fedlora.experiments.conf."""
    root, *rest = folder.relative_to(ROOT).parts
    return ".".join([ROOTS[root], *rest])


FOLDERS = [file.parent for root in ROOTS for file in (ROOT / root).rglob("__init__.py")]
PACKAGES = {package_of(folder): folder for folder in FOLDERS}
CONFIGS = [
    path
    for folder in ("fedlora/config/conf", "experiments/conf")
    for path in sorted((ROOT / folder).rglob("*.yaml"))
]
TEMPLATES = sorted((ROOT / "fedlora" / "deploy" / "templates").iterdir())


def test_roots_are_the_four_folders() -> None:
    assert sorted(ROOTS) == ["clients", "experiments", "fedlora", "strategies"]


def test_every_package_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(PACKAGES)


def test_every_data_file_of_a_package_is_shipped() -> None:
    shipped = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in PACKAGES[package].glob(pattern)
    }
    aside = {".py", ".pyc", ".md"}
    beside_code = {file for folder in PACKAGES.values() for file in folder.iterdir() if file.is_file()}
    assert {file for file in beside_code if file.suffix not in aside} <= shipped
    assert CONFIGS
    assert TEMPLATES
    assert {*CONFIGS, *TEMPLATES} <= shipped


def test_versions_agree() -> None:
    assert fedlora.__version__ == PROJECT["project"]["version"]


def test_constraints_are_exact_and_admit_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pairs}
    assert not [name for name, version in pins.items() if "+" in version], "a pin must admit every build"
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]:
        needed = Requirement(text)
        pinned = pins.get(canonicalize_name(needed.name))
        assert pinned, f"{needed.name} is not in constraints.txt"
        assert pinned in needed.specifier, f"constraints.txt pins {pinned}, pyproject.toml asks for {needed}"


@pytest.mark.parametrize("folder", ["strategies", "clients"])
def test_a_folder_is_not_importable_by_its_bare_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ModuleNotFoundError, match=rf"import fedlora\.{folder}"):
        __import__(folder)


@pytest.mark.slow
def test_what_is_built_holds_all_and_only_fedlora(tmp_path: Path) -> None:
    copy, built = tmp_path / "copy", tmp_path / "built"  # setuptools writes beside its source
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for folder in [*ROOTS, "tests", ".ci"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    for kind in ("sdist", "wheel"):
        code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, built], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    (wheel,) = built.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"fedlora"}
    modules = {path for folder in PACKAGES.values() for path in folder.glob("*.py")}
    for path in [*modules, *CONFIGS, *TEMPLATES, ROOT / "fedlora" / "py.typed"]:
        inside = Path(*package_of(path.parent).split("."), path.name)
        assert inside.as_posix() in names, f"the wheel lacks {inside}"
    assert any(name.startswith("fedlora/config/conf/strategy/") for name in names), "no nested YAML"

    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for path in [*modules, *CONFIGS, *TEMPLATES, *(ROOT / "tests").rglob("*.py")]:
        assert path.relative_to(ROOT).as_posix() in packed, f"the sdist lacks {path.relative_to(ROOT)}"
    assert {"Makefile", "constraints.txt", "MANIFEST.in", "LICENSE", "CHANGELOG.md", ".ci/run"} <= packed
