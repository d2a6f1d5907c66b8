"""Finding, reading and writing files: the hub's cache, hostile names and JSON, interrupted writes."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xlmr import XLMRobertaConfig
from xlmr.files import check_bare_name, read_json, resolve, to_dtype, write_atomically


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtypes_by_name(value: Any) -> None:
    assert to_dtype(value) is torch.bfloat16


@pytest.mark.parametrize("value", ["int8", torch.int8, torch.float8_e4m3fn, "nn", "", None, 16])
def test_other_dtypes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="allowed: float32, float16, bfloat16, float64"):
        to_dtype(value)


# Finding


def make_cache(cache: Path, name: str, files: dict[str, str], revision: str = "main", commit: str = "c0ffee") -> None:
    """A repository as huggingface_hub leaves it: blobs, symbolic links to them, and what a revision means."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for i, (path, text) in enumerate(files.items()):
        blob, link = repository / "blobs" / f"{commit}{i}", repository / "snapshots" / commit / path
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text, encoding="utf-8")
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit, encoding="utf-8")


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_text("x")
    (tmp_path / "b").symlink_to("sub/a")
    assert resolve(tmp_path, "b") == tmp_path / "b"
    assert resolve(str(tmp_path), "a", subfolder="sub") == tmp_path / "sub/a"
    assert resolve(tmp_path, "a") is resolve(tmp_path, "sub") is resolve(tmp_path, "a", subfolder="none") is None


@pytest.mark.parametrize("local_files_only", [True, False])  # the tests run offline in any case
def test_the_hubs_cache_serves_offline(tmp_path: Path, local_files_only: bool) -> None:
    make_cache(tmp_path, "org/model", {"config.json": "{}", "sub/config.json": '{"vocab_size": 9}', "sub/a": "new"})
    make_cache(tmp_path, "org/model", {"config.json": "{}", "a": "old"}, "v1", "facade")
    there: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": local_files_only}
    found = resolve("org/model", "a", subfolder="sub", **there)
    assert found is not None
    assert (found.read_text(), found.is_symlink()) == ("new", True)
    assert resolve("org/model", "a", **there) is None
    assert resolve("org/model", "a", revision="v1", **there).read_text() == "old"  # type: ignore[union-attr]
    config = XLMRobertaConfig.from_pretrained("org/model", subfolder="sub", **there)
    assert (config.vocab_size, config.name_or_path) == (9, "org/model")
    for name, options in (("org/other", {}), ("org/model", {"revision": "v2"})):
        with pytest.raises(OSError, match="is no directory here, not in the hub's cache"):
            resolve(name, "a", **options, **there)


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match=r"no directory 'org/model'.*pip install xlmr\[hub\]"):
        resolve("org/model", "config.json")
    (tmp_path / "config.json").touch()
    assert resolve(tmp_path, "config.json")


@pytest.mark.parametrize("name", ["", "./missing", "/missing", "a/b/c", "../a", "a\\b", "-a", "a/.."])
def test_neither_a_directory_nor_a_name(name: str) -> None:
    with pytest.raises(OSError, match="neither a"):
        resolve(name, "config.json", local_files_only=True)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(TypeError, match=r"^the checkpoint is None \(NoneType\): give its directory"):
        resolve(None, "config.json")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="neither a checkpoint directory"):
        resolve(tmp_path / "a", "config.json")


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/tmp", "a\\..\\b", "a\0"])
def test_a_subfolder_stays_inside(tmp_path: Path, subfolder: str) -> None:
    with pytest.raises(ValueError, match="it must be a relative path without"):
        resolve(tmp_path, "a", subfolder=subfolder)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a\0", None, 1, ["a"]])
def test_only_bare_names(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=r"index gives .* as a file name; it must be a bare name"):
        check_bare_name(name, "index")
    with pytest.raises(ValueError, match="it must be a bare name"):
        resolve(tmp_path, name)


# Reading


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"a": "' + b"x" * 200_000 + b'"}', "larger than 150000 bytes"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "a.json", max_bytes=150_000)
    assert str(tmp_path / "a.json") in str(caught.value)


def test_json_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "a.json") == {"a": "é"}


# Writing


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_files_are_written_replaced_and_removed(tmp_path: Path) -> None:
    new = tmp_path / "deep/er"
    write_atomically(new, {"a": "é", "b": b"\xff", "c": lambda path: path.write_text("c", encoding="utf-8")})
    assert contents(new) == {"a": "é".encode(), "b": b"\xff", "c": b"c"}
    mode = (tmp_path / "plain").touch() or (tmp_path / "plain").stat().st_mode
    assert (new / "a").stat().st_mode == mode
    (new / "d").symlink_to("a")
    write_atomically(new, {"d": "d", "b": "b"}, obsolete=["c"])
    assert contents(new) == {"a": "é".encode(), "b": b"b", "d": b"d"}


def failing(
    function: Callable[..., Any], at: int, error: type[BaseException] = KeyboardInterrupt
) -> Callable[..., Any]:
    """`function`, the call number `at` of which fails before it does anything."""
    calls = itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("step", range(9))
def test_a_failure_at_any_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, links: bool
) -> None:
    """Steps: writing three files, then a rename for each of them and for what is removed; then there is no more."""
    old = {"a": b"old a", "b": b"old b", "c": b"old c", "d": b"old d", "other": b"other"}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    if not links:
        monkeypatch.setattr(os, "link", failing(os.link, 0, OSError))
    if step < 3:
        monkeypatch.setattr(os, "fsync", failing(os.fsync, step))
    else:
        monkeypatch.setattr(os, "replace", failing(os.replace, step - 3))
    new = {"a": "new a", "new": "new", "b": "new b"}
    if step < 8:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path, new, obsolete=["c", "d"])
        assert contents(tmp_path) == old
    else:
        write_atomically(tmp_path, new, obsolete=["c", "d"])
        assert contents(tmp_path) == {"a": b"new a", "new": b"new", "b": b"new b", "other": b"other"}


def test_an_obsolete_file_that_is_gone_undoes_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path, {"a": "new", "b": "new"}, obsolete=["missing"])
    assert contents(tmp_path) == {"a": b"old"}


def test_a_target_that_is_no_directory_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="a directory is needed"):
        write_atomically(tmp_path / "file", {"a": "a"})
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError, match=rf"Is a directory: '{tmp_path}'$"):
        write_atomically(tmp_path, {"file": "new", "b": "b"})
    with pytest.raises(NotADirectoryError, match=rf"Not a directory: '{tmp_path}/file/x'$"):
        write_atomically(tmp_path / "file/x", {"a": "a"})
    assert (tmp_path / "file").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "file"]
