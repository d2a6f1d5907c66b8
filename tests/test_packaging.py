"""What is built from the tree: an sdist that is complete, a wheel that needs no tree, and no second `kernels`."""

import email
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import ROOT, python, run

import xlmr


def wheel_of(source: Path, into: Path) -> Path:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", into, "."]
    run(*pip_wheel, cwd=source, PIP_NO_INDEX="1")
    return next(into.glob("xlmr-*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build leaves its files here."""
    copy = tmp_path_factory.mktemp("source") / "xlmr"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "bench")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist of the tree."""
    out = tmp_path_factory.mktemp("sdist")
    python(f"from setuptools import build_meta as b; b.build_sdist({str(out)!r})", cwd=tree)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        # Our own archive needs no filter, and Python 3.10.11 and older know none by name.
        archive.extraction_filter = lambda member, path: member
        archive.extractall(out)
    return wheel_of(next(out.glob("xlmr-*/")), out)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site-packages")
    pip_install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    run(*pip_install, cwd=target, PIP_NO_INDEX="1")
    return target


def test_the_sdist_and_the_tree_build_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    ours, theirs = zipfile.ZipFile(wheel_of(tree, tmp_path)), zipfile.ZipFile(wheel)
    assert {f.filename: f.CRC for f in ours.infolist() if not f.filename.endswith("RECORD")} == {
        f.filename: f.CRC for f in theirs.infolist() if not f.filename.endswith("RECORD")
    }


def test_the_wheel_holds_every_module_as_a_real_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        built = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    sources = {f"xlmr/kernels/{path.name}": path for path in (ROOT / "kernels").glob("*.py")}
    demo = [path for path in (ROOT / "xlmr/demo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    modules = [path for path in (ROOT / "xlmr").rglob("*.py") if path.parent.name != "kernels"]
    sources |= {path.relative_to(ROOT).as_posix(): path for path in [*modules, ROOT / "xlmr/py.typed", *demo]}
    assert built == {name: path.read_bytes() for name, path in sources.items()}


def test_an_installed_package_imports_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = "import xlmr, xlmr.kernels._launch as launch; print(xlmr.__file__, launch.__file__, xlmr.__version__)"
    expected = f"{installed / 'xlmr/__init__.py'} {installed / 'xlmr/kernels/_launch.py'} {xlmr.__version__}\n"
    assert python(code, cwd=tmp_path, path=(installed,)) == expected
    assert not (installed / "kernels").exists()


@pytest.mark.parametrize("where", ["tree", "installed"])
def test_the_package_named_kernels_stays_importable(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Ours may stand first on the path: `kernels` must still be the other project's regular package."""
    ours = request.getfixturevalue(where)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    code = "import kernels, xlmr.kernels._launch; print(kernels.__file__)"
    found = python(code, cwd=ours, path=(ours, tmp_path))
    assert found == f"{tmp_path / 'kernels/__init__.py'}\n"


def test_the_metadata_asks_for_what_is_used_and_the_constraints_pin_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        assert "xlmr = xlmr.__main__:main" in archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    required = {r.name for r in requirements if "extra" not in str(r.marker)}
    assert required == {"numpy", "safetensors", "sentencepiece", "torch", "tqdm"}
    assert set(metadata.get_all("Provides-Extra")) == {"bench", "hub", "peers", "test", "triton"}
    test, bench = (
        {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": e})} for e in ("test", "bench")
    )
    assert test < bench, "bench.round runs the tests on a GPU"
    assert metadata["License-Expression"] == "Apache-2.0"
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"==[\d.]+", str(pin.specifier)) for pin in pins)
    names = {pin.name.replace("-", "_") for pin in pins}
    assert {r.name.replace("-", "_") for r in requirements} - names == {"triton"}
