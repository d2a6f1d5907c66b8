"""Finding, reading and writing the files of a checkpoint directory. No torch, no model.

Whatever is read is taken for hostile until checked; whatever is written is switched in at the end, so that an
interrupted save leaves the old files whole.
"""

import contextlib
import errno
import json
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_JSON_BYTES = 16 * 2**20
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Keywords of transformers' from_pretrained, save_pretrained, decode and pipeline that say how it works, not what comes
# out: they are passed over.
WITHOUT_EFFECT = {
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_name", "allow_all_kernels",
    "attn_implementation", "disable_mmap", "experts_implementation", "finetuning_task", "fix_mistral_regex",
    "framework", "from_slow", "legacy", "legacy_format", "low_cpu_mem_usage", "max_memory", "mirror", "num_workers",
    "offload_buffers", "offload_folder", "offload_state_dict", "resume_download", "save_function",
    "save_original_format", "save_peft_format", "spaces_between_special_tokens", "tqdm_class", "trust_remote_code",
    "use_fast", "use_kernels", "use_safetensors", "use_source_tokenizer", "use_temp_dir", "verbose", "weights_only",
}  # fmt: skip
# Those that change what comes out, and are not offered here: allowed as None, False or {} only, their defaults there.
NOT_OFFERED = {
    "adapter_kwargs", "device_mesh", "distributed_checkpoint", "distributed_config", "force_download", "from_flax",
    "from_tf", "fusion_config", "generation_config", "gguf_file", "kernel_config", "key_mapping", "proxies",
    "quantization_config", "sp_model_kwargs", "state_dict", "tags", "tp_plan", "tp_size", "use_auth_token", "variant",
}  # fmt: skip


def to_dtype(value: Any) -> "torch.dtype":
    """The floating dtype that "bfloat16", "torch.bfloat16" or torch.bfloat16 means; ValueError for anything else."""
    import torch

    name = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
    if name not in DTYPES:
        raise ValueError(f"dtype is {reprlib.repr(value)}; allowed: {', '.join(DTYPES)}, as a name or a torch.dtype")
    return getattr(torch, name)


def own_keywords(given: dict[str, Any]) -> dict[str, Any]:
    """`given` without keywords that are transformers' alone; TypeError for one that would change what comes out."""
    for name in sorted(NOT_OFFERED & given.keys()):
        if given[name]:
            raise TypeError(f"{name} is {reprlib.repr(given[name])}: this is not offered here, leave it out")
    return {name: value for name, value in given.items() if name not in WITHOUT_EFFECT | NOT_OFFERED}


def refuse_unknown(function: str, given: dict[str, Any]) -> None:
    """TypeError, like Python's own, for a keyword that `own_keywords` does not drop."""
    for name in own_keywords(given):
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_bare_name(name: Any, source: str) -> str:
    """Return `name` if it names a file directly inside a directory; ValueError if it could lead anywhere else."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(f"{source} gives {reprlib.repr(name)} as a file name; it must be a bare name, without / \\ :")
    return name


def resolve(
    name_or_dir: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Path | None:
    """The path of one file of a checkpoint, fetched if `name_or_dir` names a hub repository; None if it has none.

    revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.hf_hub_download.  subfolder: of
    the directory or repository.

    A directory always wins over a hub name. `filename` must be a bare name and `subfolder` a relative path without
    "..". Symbolic links are followed: the hub's cache is made of them. OSError if there is neither such a directory
    nor such a repository, or if it cannot be reached and is not in the cache; TypeError for what is no name.
    """
    check_bare_name(filename, "the caller")
    parts = Path(subfolder).parts
    if Path(subfolder).is_absolute() or ".." in parts or "\\" in subfolder or "\0" in subfolder:
        raise ValueError(f"subfolder is {subfolder!r}; it must be a relative path without '..'")
    try:
        name, directory = os.fspath(name_or_dir), Path(name_or_dir)
    except TypeError:
        given = f"{reprlib.repr(name_or_dir)} ({type(name_or_dir).__name__})"
        raise TypeError(f"the checkpoint is {given}: give its directory, or its name on the hub") from None
    if name and directory.is_dir():
        path = directory.joinpath(*parts, filename)
        return path if path.is_file() else None
    if directory.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise OSError(f"{name!r} is neither a checkpoint directory nor a name on the Hugging Face hub")
    options = {
        "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only,
        "force_download": force_download,
    }  # fmt: skip
    return _resolve_on_hub(name, "/".join((*parts, filename)), options)


def _resolve_on_hub(name: str, filename: str, options: dict[str, Any]) -> Path | None:
    try:
        import huggingface_hub
        from huggingface_hub import utils as hub
    except ImportError as error:
        raise OSError(
            f"there is no directory {name!r}; to fetch that name from the Hugging Face hub: pip install xlmr[hub]"
        ) from error
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, **options))
    except hub.LocalEntryNotFoundError as error:  # offline: absent from the repository, or only from the cache?
        config = str(PurePosixPath(filename).with_name("config.json"))
        keys = {key: options[key] for key in ("revision", "cache_dir")}
        if isinstance(huggingface_hub.try_to_load_from_cache(name, config, **keys), str):
            return None
        raise OSError(
            f"{name!r} is no directory here, not in the hub's cache, and the hub is not to be asked or out of reach"
        ) from error
    except hub.EntryNotFoundError:
        return None
    except (hub.HFValidationError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise OSError(
            f"{name!r} is neither a directory here nor a repository you can read on the hub: {error}"
        ) from error


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES, kind: type = dict) -> Any:
    """The JSON object (or, with kind=list, array) in a UTF-8 file of at most `max_bytes`; ValueError for anything else,
    NaN included."""
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes} bytes: refused")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        needed = "an object {…}" if kind is dict else "an array […]"
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; {needed} is needed")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def write_atomically(
    directory: str | os.PathLike[str],
    files: Mapping[str, bytes | str | Callable[[Path], None]],
    obsolete: Iterable[str] = (),
) -> None:
    """Write `files` (name → contents, or a function that writes to the path it is given), then remove `obsolete` ones.

    Every file is first written in full, and synced, in a hidden directory inside `directory` (made if missing). Only
    then are they renamed into place one after the other, in the order given, and the obsolete ones moved away. If
    anything raises on the way, what was done is undone and the old files stand as before. A process killed while it
    writes leaves the old files untouched; one killed during the renames, each of them atomic, leaves some done.
    An OSError names `directory`.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"cannot save to {directory}: it is a file, a directory is needed")
    with hidden_directory(directory, ".saving-") as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        old.mkdir()
        for name, contents in files.items():
            _write_synced(new / name, contents)
        with contextlib.ExitStack() as undo:
            for name in files:
                target, kept = directory / name, old / name
                undo.callback(_put_back, kept, target, existed=_keep(target, kept))
                os.replace(new / name, target)
            for name in obsolete:
                target, kept = directory / name, old / name
                undo.callback(_put_back, kept, target, existed=True)
                os.replace(target, kept)
            undo.pop_all()


@contextlib.contextmanager
def hidden_directory(directory: Path, prefix: str) -> Iterator[Path]:
    """A new directory inside `directory` (made if missing), which is removed in the end. An OSError on the way names
    `directory`: nobody has heard of the other."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=directory) as hidden:
            yield Path(hidden)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(directory)) from error


def _write_synced(path: Path, contents: bytes | str | Callable[[Path], None]) -> None:
    path.touch()
    mode = path.stat().st_mode  # the umask's; safetensors makes files that only their owner can read
    if callable(contents):
        contents(path)
    else:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    path.chmod(mode)
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _keep(target: Path, kept: Path) -> bool:
    """Give `target` the second name `kept`; False if there is no such file."""
    if not os.path.lexists(target):
        return False
    try:
        os.link(target, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(target, kept, follow_symlinks=False)
    return True


def _put_back(kept: Path, target: Path, existed: bool) -> None:
    if os.path.lexists(kept):
        os.replace(kept, target)
    elif not existed:
        target.unlink(missing_ok=True)
