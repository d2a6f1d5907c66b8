"""Weight files: every format, hostile files, and what an interrupted save leaves."""

import codecs
import functools
import itertools
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from xlmr.weights import WEIGHTS, read_weights, write_weights

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5, -2.0]).bfloat16(), "c": torch.tensor(3.0)}
KINDS: dict[str, dict[str, Any]] = {  # the file that is looked for, and how to write it
    "model.safetensors": {"max_shard_size": "5GB", "safe_serialization": True},
    "model.safetensors.index.json": {"max_shard_size": 10, "safe_serialization": True},
    "pytorch_model.bin": {"max_shard_size": "1 kB", "safe_serialization": False},
    "pytorch_model.bin.index.json": {"max_shard_size": "10", "safe_serialization": False},
}


def find(directory: Path, name: str) -> Path | None:
    return directory / name if (directory / name).is_file() else None


def read(directory: Path) -> dict[str, Tensor]:
    return read_weights(functools.partial(find, directory), str(directory))


def write(directory: Path, kind: str, state: dict[str, Tensor] = STATE, config: str = "{}") -> None:
    write_weights(directory, state, config, **KINDS[kind])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Formats


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    """safetensors' own files can be read by their owner alone."""
    before = os.umask(0o022)
    try:
        write(tmp_path, "model.safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    assert equal(read(tmp_path), STATE)
    stem, suffix = kind.removesuffix(".index.json").split(".")
    shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)] if kind.endswith("json") else []
    assert names(tmp_path) == sorted({"config.json", kind, *shards})
    if shards:
        index = json.loads((tmp_path / kind).read_text(encoding="utf-8"))
        assert index["metadata"] == {"total_size": 32, "total_parameters": 9}
        assert index["weight_map"] == {"a": shards[0], "b": shards[1], "c": shards[1]}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_the_first_of_several_kinds_counts(tmp_path: Path) -> None:
    for i, kind in enumerate(KINDS):
        write(tmp_path / kind, kind, {"a": torch.full((9,), i), "b": torch.zeros(9)})
        shutil.copytree(tmp_path / kind, tmp_path / "all", dirs_exist_ok=True)
    for i, kind in enumerate(WEIGHTS):
        assert read(tmp_path / "all")["a"][0] == i
        (tmp_path / "all" / kind).unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*; looked for model\.safetensors, "):
        read(tmp_path / "all")


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert equal(read(tmp_path), STATE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "uint16", "complex64"])
def test_tensors_and_parameters_of_every_kind_are_read_from_a_pickle(tmp_path: Path, dtype: str) -> None:
    tensor = torch.zeros(2, dtype=getattr(torch, dtype))
    state = {"a": tensor, "b": torch.nn.Parameter(tensor, requires_grad=False), "c": tensor.clone(), "d": tensor[1:]}
    state["b"].attribute = state["c"].attribute = 1  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert {name: weight.dtype for name, weight in read(tmp_path).items()} == dict.fromkeys("abcd", tensor.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_views_are_written_alone_and_once_each(tmp_path: Path, kind: str) -> None:
    buffer = torch.randn(100, 100)
    state = {"row": buffer[3], "column": buffer[:, 3], "same": buffer[3], "rest": buffer[4:6].T}
    write(tmp_path, kind, state)
    assert equal(read(tmp_path), state)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000  # of 40,000 in the buffer


@pytest.mark.parametrize("size", [0, -1, "0", "5XB", "GB", "1.5.2GB", "", None, True])
def test_a_wrong_shard_size(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size is"):
        write_weights(tmp_path / "new", STATE, "{}", size, True)
    assert not (tmp_path / "new").exists()


# Interruptions


def snapshots(patch: pytest.MonkeyPatch, directory: Path, into: Path, action: Callable[[], None]) -> list[Path]:
    """Copies of `directory` as a kill would leave it: before each sync and rename of `action`, and at the end."""
    taken: list[Path] = []

    def snap() -> None:
        taken.append(into / str(len(taken)))
        shutil.copytree(directory, taken[-1])

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (snap(), function(*args, **kwargs))[1]

    with patch.context() as context:
        context.setattr(os, "replace", before(os.replace))
        context.setattr(os, "fsync", before(os.fsync))
        action()
    snap()
    return taken


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_a_kill_leaves_the_old_weights_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    directory, changed = tmp_path / "model", {name: weight + 1 for name, weight in STATE.items()}
    write(directory, old)
    taken = snapshots(monkeypatch, directory, tmp_path, lambda: write(directory, new, changed))
    is_new = [equal(read(snapshot), changed) for snapshot in taken]
    assert all(n or equal(read(snapshot), STATE) for n, snapshot in zip(is_new, taken, strict=True))
    assert is_new == sorted(is_new)  # no way back
    assert (is_new[0], is_new[-1]) == (False, True)
    assert not [name for name in names(directory) if name.startswith(".")]
    fresh = tmp_path / "fresh"
    write(fresh, new, changed)
    assert len(names(directory)) == len(names(fresh))  # nothing of the old one is left


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_a_new_config_meets_the_old_weights_for_one_rename_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    directory, changed = tmp_path / "model", {"z": torch.ones(9), "y": torch.ones(9)}
    write(directory, old)
    taken = snapshots(monkeypatch, directory, tmp_path, lambda: write(directory, new, changed, '{"new": 1}'))
    states = [((s / "config.json").read_text(encoding="utf-8") != "{}", equal(read(s), changed)) for s in taken]
    assert states == sorted(states)
    assert states.count((True, False)) == 1
    assert (states[0], states[-1]) == ((False, False), (True, True))


@pytest.mark.parametrize("new", KINDS)
def test_whatever_stood_there_only_the_new_weights_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    directory, changed = tmp_path / "model", {"a": torch.ones(9), "b": torch.ones(9)}
    other = {"optimizer.pt", "pytorch_model-notes.bin", "model-00001-of-00002.txt", "tokenizer.json"}
    for i, kind in enumerate(KINDS):  # every kind of weights at once; the first is the old checkpoint
        write(tmp_path / kind, kind, {name: weight + i for name, weight in STATE.items()})
        shutil.copytree(tmp_path / kind, directory, dirs_exist_ok=True)
    for name in other:
        (directory / name).touch()
    taken = snapshots(monkeypatch, directory, tmp_path, lambda: write(directory, new, changed))
    assert all(equal(read(snapshot), STATE) or equal(read(snapshot), changed) for snapshot in taken)
    assert equal(read(directory), changed)
    index = json.loads((directory / new).read_text(encoding="utf-8")) if new.endswith("json") else {"weight_map": {}}
    assert set(names(directory)) == {"config.json", new, *index["weight_map"].values(), *other}


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_an_exception_at_any_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    write(tmp_path, old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {name: weight + 1 for name, weight in STATE.items()}
    for function in (os.fsync, os.replace):
        for step in itertools.count():
            calls = itertools.count()

            def failing(*args: Any, function: Any = function, calls: Any = calls, step: int = step) -> Any:
                if next(calls) == step:
                    raise OSError("disk full")
                return function(*args)

            with monkeypatch.context() as context:
                context.setattr(os, function.__name__, failing)
                try:
                    write(tmp_path, new, changed, '{"new": 1}')
                except OSError:
                    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
                else:
                    break
        assert step >= 2
        assert equal(read(tmp_path), changed)
        for path in tmp_path.iterdir():
            path.unlink()
        for name, data in before.items():
            (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "writer", "error"),
    [
        ("model.safetensors", "xlmr.weights.save_file", SafetensorError("I/O error: No space left on device")),
        ("pytorch_model.bin", "torch.save", RuntimeError("enforce fail at inline_container.cc")),
    ],
)
def test_a_full_disk_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, writer: str, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(writer, fail)
    with pytest.raises(OSError, match=f"{kind} cannot be written: {error}"):
        write(tmp_path, kind)
    assert names(tmp_path) == []


# Hostile files


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.safetensors", "a/b", "..", "", "a\\b", None, 3])
def test_an_index_names_files_beside_it_only(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    opened: list[str] = []
    index = {"weight_map": {"a": name, "b": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="must be a bare name"):
        read_weights(lambda name: opened.append(name) or find(directory, name), "x")
    assert opened == list(WEIGHTS[:2])


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "1", "b": "2"}, FileNotFoundError, "names 2, which is not there"),
        ({"a": "1", "b": "1"}, ValueError, "says that 'b' is in 1, which does not hold it"),
        ({"a": "3", "c": "1"}, ValueError, "'a' is in 1, not only in 3"),
        ({"c": "3"}, ValueError, "says that 'c' is in 3, which does not hold it"),
        ({}, ValueError, "has no weight_map"),
        (["1"], ValueError, "has no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: Any, error: type[Exception], message: str) -> None:
    for name in "13":
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(error, match=message):
        read(tmp_path)


def test_an_index_of_safetensors_leads_to_no_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.bin")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.bin"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.bin is refused: its header claims"):
        read(tmp_path)


def safetensors(header: Any, size: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def entry(start: int, stop: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "no header": b"\x08\0\0",
        "header past the end": safetensors({}, 0, 99),
        "huge header": safetensors({}, 0, 2**40),
        "large header": safetensors(b"{" + b" " * 2**24 + b"}", 0),
        "no JSON": safetensors(b"{a", 0),
        "no object": safetensors([], 0),
        "truncated": safetensors({"a": entry(0, 8)}, 7),
        "trailing": safetensors({"a": entry(0, 8)}, 9),
        "gap": safetensors({"a": entry(0, 8), "b": entry(16, 24)}, 24),
        "overlap": safetensors({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        "the same place": safetensors({"a": entry(0, 8), "b": entry(0, 8)}, 8),
        "backwards": safetensors({"a": entry(8, 0)}, 8),
        "shape and size": safetensors({"a": entry(0, 8, [3])}, 8),
        "overflow": safetensors({"a": entry(0, 8, [2**62, 2**62])}, 8),
        "negative": safetensors({"a": entry(0, 8, [-2])}, 8),
        "unknown dtype": safetensors({"a": entry(0, 8, [2], "F99")}, 8),
        "a name twice": safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), 8),
        "a field twice": safetensors(
            b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', 8
        ),
        "nested too deeply": safetensors(b'{"a": ' + b"[" * 100_000, 8),
        "pickle": pickle.dumps({}),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, data: tuple[str, bytes]) -> None:
    (tmp_path / "model.safetensors").write_bytes(data[1])
    with pytest.raises(ValueError, match=r"model\.safetensors is refused"):
        read(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (Evil.target,)

    target = ""


class Call:
    """What torch.load allows in a pickle of tensors, though no tensor needs it: memory and time without bound."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def bin_of(value: Any, path: Path) -> None:
    torch.save(value, path)


def legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def tar_of(value: Any, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("tensors"))


def compressed(value: Any, path: Path) -> None:
    torch.save(value, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def pickled(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, of a sparse tensor
@pytest.mark.parametrize(
    ("write_file", "value", "message"),
    [
        (bin_of, {"a": Evil()}, "asks to run code"),
        (pickled, {"a": Evil()}, "asks to run code"),
        (bin_of, {"a": Call(bytearray, 10**12)}, "asks to run code, '.* bytearray'"),
        (legacy, {"a": Call(bytearray, 10**12)}, "asks to run code, '.* bytearray'"),
        (bin_of, [Call(codecs.encode, "é" * 10**6, "punycode")], "asks to run code, '_codecs encode'"),
        (bin_of, {"a": Call(torch.Tensor, 10**6)}, "its weights claim 4000000 bytes"),
        (tar_of, {}, "it is a tar archive"),
        (compressed, {"a": torch.zeros(2)}, "its archive is compressed"),
        (bin_of, {"state_dict": {"a": torch.zeros(2)}}, "no state dict"),
        (bin_of, [torch.zeros(2)], "no state dict"),
        (bin_of, {1: torch.zeros(2)}, "no state dict"),
        (bin_of, {"a": torch.zeros(2).to_sparse()}, "no state dict"),
        (bin_of, {"a": torch.zeros(2, device="meta")}, "no state dict"),
        (bin_of, {"a": torch.zeros(1).expand(10**12)}, "its weights claim 4000000000000 bytes"),
        (bin_of, dict.fromkeys("abcdef", torch.zeros(1000)), "its weights claim 24000 bytes"),
        (pickled, {"a": 1}, "is refused"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused(
    tmp_path: Path, write_file: Callable[[Any, Path], None], value: Any, message: str
) -> None:
    Evil.target = str(tmp_path / "code was run")
    write_file(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_an_archive_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    sizes = struct.pack("<LL", entry.compress_size, entry.file_size)
    at = data.rindex(sizes, 0, data.rindex(entry.filename.encode()))  # in the central directory
    path.write_bytes(data[:at] + struct.pack("<LL", 2**31, 2**31) + data[at + 8 :])
    with pytest.raises(ValueError, match="is refused: its archive claims more bytes than the file has"):
        read(tmp_path)


def saved(tmp: Path, legacy: bool) -> bytes:
    torch.save(STATE, tmp, _use_new_zipfile_serialization=not legacy)
    return tmp.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damage_anywhere_is_a_value_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    directory = tmp_path_factory.mktemp(kind)
    data = save(STATE) if kind == "safetensors" else saved(directory / "good", kind == "legacy")
    path = directory / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")

    @given(st.integers(0, len(data)), st.integers(0, 16), st.binary(max_size=9))
    def check(at: int, dropped: int, put: bytes) -> None:
        path.write_bytes(data[:at] + put + data[at + dropped :])
        try:
            weights = read(directory)
        except ValueError:
            return
        for weight in weights.values():
            weight.clone()  # every value can be read

    check()
