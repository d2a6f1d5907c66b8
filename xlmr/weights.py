"""The weight files of a checkpoint directory: safetensors or pickles of torch.save, whole or in shards with an index.

Files are mapped into memory, so reading them costs nothing until their values are used. A directory may hold several
sets: the one that counts is the first of WEIGHTS, the reference's order.
"""

import functools
import io
import json
import pickle
import pickletools
import re
import secrets
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import MAX_JSON_BYTES, check_bare_name, read_json, write_atomically

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What pickles of tensors name. torch.load allows more, such as bytearray(2**40) and encodings that take hours.
TENSOR_PARTS = re.compile(
    r"collections OrderedDict|torch(\.cuda|\.storage)? \w+Storage"
    r"|torch (Tensor|Size|device|bool|[a-z]*(int|float|complex)\d\w*)"
    r"|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)


# Reading


def read_weights(
    find: Callable[[str], Path | None],
    where: str,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    names: Sequence[str] = WEIGHTS,
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in the files; `find` gives the path of a file, or None if there is none.

    use_safetensors: whether safetensors alone are read, or pickles alone; None takes either.  variant: such as "fp16",
    which stands in the names of the files then, before what follows their last dot.  names: of the files.
    FileNotFoundError if there are no weights or a shard is missing, ValueError for damaged or hostile files.
    """
    names = [name for name in names if use_safetensors in (None, "safetensors" in name)]
    names = [_name(name, variant) for name in names]
    for name in names:
        path = find(name)
        if path is not None:
            read = _read_safetensors if ".safetensors" in name else _read_file
            return _read_shards(find, path, read) if name.endswith(".json") else read(path)
    raise FileNotFoundError(f"there are no weights in {where}; looked for {', '.join(names)}")


def _name(name: str, variant: str | None) -> str:
    """What the file `name` is called in a variant: "fp16" stands before what follows the last dot."""
    stem, _, suffix = name.rpartition(".")
    return check_bare_name(f"{stem}.{variant}.{suffix}", f"variant {variant!r}") if variant else name


def is_shard(name: str, variant: str | None = None) -> bool:
    """Whether a file of this name is a part of weights, those of `variant`."""
    own = re.escape(f".{variant}") if variant else ""
    return bool(re.fullmatch(rf"(pytorch_)?model{own}-([0-9a-f]{{8}}-)?\d{{5}}-of-\d{{5}}\.(safetensors|bin)", name))


def _read_shards(
    find: Callable[[str], Path | None], index: Path, read: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, the names of weights and their files")
    names = sorted({check_bare_name(name, str(index)) for name in weight_map.values()})
    weights: dict[str, Tensor] = {}
    for name in names:
        path = find(name)
        if path is None:
            raise FileNotFoundError(f"{index} names {name}, which is not there")
        shard = read(path)
        for key in shard:
            if weight_map.get(key, name) != name or key in weights:
                raise ValueError(f"{key!r} is in {name}, not only in {weight_map.get(key)} as {index} says")
        weights |= shard
    for key, name in weight_map.items():
        if key not in weights:
            raise ValueError(f"{index} says that {key!r} is in {name}, which does not hold it")
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.name.endswith(".safetensors") else read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # The library checks the header, and that the tensors fill the rest of the file with neither gap nor overlap; but of
    # a name that is there twice it takes the last, and what looked at the file before may have taken the first.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"{path} is refused: its header claims {length} bytes, more than {MAX_JSON_BYTES}")
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=_once)
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
            return {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, RuntimeError, ValueError) as error:  # RuntimeError: RecursionError, too
        raise ValueError(f"{path} is refused: damaged or no safetensors file: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return dict(pairs)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors, by name, of a file written by torch.save; ValueError if it holds anything else, or code."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # since torch 1.6; the older format cannot be mapped
            file.seek(0)
            if zipped:
                _check_archive(path)
            else:
                _check_old_format(file)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # a hostile pickle can provoke any
        reason = "it is damaged or asks to run code" if isinstance(error, pickle.UnpicklingError) else str(error)
        raise ValueError(f"{path} is refused: {reason}; only tensors written by torch.save are read") from error
    if not isinstance(weights, dict) or not all(_is_weight(*item) for item in weights.items()):
        raise ValueError(f"{path} is refused: it is no state dict, that is names and tensors; save model.state_dict()")
    claimed, size = sum(weight.nbytes for weight in weights.values()), path.stat().st_size
    if claimed > 2 * size:  # tied weights are there once and count twice; a view may claim any size
        raise ValueError(f"{path} is refused: its weights claim {claimed} bytes, and the file has {size}")
    return {name: weight.detach() for name, weight in weights.items()}


def _is_weight(name: Any, weight: Any) -> bool:
    tensor = isinstance(name, str) and type(weight) in (Tensor, torch.nn.Parameter)
    return tensor and weight.layout is torch.strided and weight.device.type == "cpu"


def _check_archive(path: Path) -> None:
    """Refuse what torch.save never writes and could fill memory: compressed entries, more bytes than the file has."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its archive is compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its archive claims more bytes than the file has")
    _check_calls(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))  # as torch.load finds it


def _check_old_format(file: IO[bytes]) -> None:
    if tarfile.is_tarfile(file):
        raise ValueError("it is a tar archive")
    file.seek(0)
    for _ in range(5):  # magic number, protocol, platform, the state dict, the names of its storages; then their bytes
        _check_calls(file)


def _check_calls(pickled: IO[bytes]) -> None:
    """Refuse a pickle that calls anything but what tensors are made by."""
    for opcode, name, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and not TENSOR_PARTS.fullmatch(str(name)):
            raise ValueError(f"it asks to run code, {name!r:.80}")


# Writing


def write_weights(
    directory: Path,
    state: Mapping[str, Tensor],
    config: str,
    max_shard_size: int | str,
    safe_serialization: bool,
    variant: str | None = None,
) -> None:
    """Replace the weights (those of `variant`) and config.json (its text `config`) in `directory`; save_model says what
    a break does.

    Of each checkpoint one file is looked for first. One rename turns the old checkpoint into the new one: that of the
    new one's first file into its place, or, where the old one's comes before it in WEIGHTS, of that one away. Until
    then new shards lie beside the old ones, under other names.
    """
    standing = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    shards = _split(state, _parse_size(max_shard_size))
    names = [_name(name, variant) for name in WEIGHTS]
    files, main = _files(shards, names[:2] if safe_serialization else names[2:], standing)
    if "config.json" not in standing or (directory / "config.json").read_bytes() != config.encode():
        files["config.json"] = config
    old = [name for name in names if name in standing]
    hidden = bool(old) and names.index(old[0]) < names.index(main)
    late = {main: 1, "config.json": 2} if hidden else {"config.json": 1, main: 2}
    ordered = {name: files[name] for name in sorted(files, key=lambda name: late.get(name, 0))}
    stale = [*reversed(old), *(name for name in sorted(standing) if is_shard(name, variant))]
    write_atomically(directory, ordered, [name for name in stale if name not in files])


def _split(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Consecutive weights of up to `limit` bytes together, a larger one alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in state.items():
        if shards[-1] and size + weight.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)?", str(size).strip().upper())
    number = int(float(match[1]) * 1000 ** ("KMGT".index(match[2][0]) + 1 if match[2] else 0)) if match else 0
    if number <= 0:
        raise ValueError(
            f"max_shard_size is {size!r}; it must be a positive number of bytes, or a string such as '5GB'"
        )
    return number


def _files(shards: list[dict[str, Tensor]], names: list[str], standing: set[str]) -> tuple[dict[str, Any], str]:
    """What to write, by file name, and which of these files is looked for first. `names`: what a single file is called,
    and what the index of several."""
    whole, index = names
    if len(shards) == 1:
        return {whole: functools.partial(_write_file, shards[0])}, whole
    stem, _, suffix = whole.rpartition(".")
    for tag in ("", f"-{secrets.token_hex(4)}"):
        parts = [f"{stem}{tag}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
        if not standing.intersection(parts):
            break
    named = dict(zip(parts, shards, strict=True))
    sizes = {
        "total_parameters": sum(weight.numel() for shard in shards for weight in shard.values()),
        "total_size": sum(weight.nbytes for shard in shards for weight in shard.values()),
    }
    listed = {"metadata": sizes, "weight_map": {key: name for name, shard in named.items() for key in shard}}
    files: dict[str, Any] = {name: functools.partial(_write_file, shard) for name, shard in named.items()}
    return {**files, index: json.dumps(listed, indent=2, sort_keys=True) + "\n"}, index


def _write_file(weights: Mapping[str, Tensor], path: Path) -> None:
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        weight = weight.detach().contiguous()
        # safetensors refuses two weights in one place, and torch.save writes all of a storage for a part of it
        if weight.data_ptr() in seen or weight.nbytes != weight.untyped_storage().nbytes():
            weight = weight.clone()
        seen.add(weight.data_ptr())
        whole[name] = weight
    try:
        if path.name.endswith(".bin"):
            torch.save(whole, path)
        else:
            save_file(whole, path, metadata={"format": "pt"})
    except (SafetensorError, RuntimeError) as error:  # what a full disk is to the one library and the other
        raise OSError(f"{path.name} cannot be written: {error}") from error
