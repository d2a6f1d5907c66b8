"""What every kernel shares: where Triton can run, the choice among measured configurations, and the refusals."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

Ask = TypeVar("Ask", bound=Callable[..., Any])
Plan = TypeVar("Plan", bound=Callable[..., Any])

TRITON_VERSIONS = ((3, 6), (3, 9))  # oldest and newest minor version
MIN_CAPABILITY = (8, 0)  # NVIDIA: Ampere is the first with bf16 tensor cores and asynchronous copies
HIP_TARGETS = ("gfx942",)  # AMD: MI300


def fact(ask: Ask) -> Ask:
    """A question about the machine: torch.compile takes the answer, instead of tracing how it is found (and warning of
    functools.lru_cache). It is torch.compiler.assume_constant_result, which imports the compiler."""
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


@fact
def unsupported(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, in one clause, or None where they can.

    The interpreter (TRITON_INTERPRET=1) counts as able on a CPU. CUDA is initialised only when `device` is a GPU.
    """
    return _unsupported(device, os.environ.get("TRITON_INTERPRET") == "1")


@functools.lru_cache  # asked before every launch
def _unsupported(device: torch.device, interpreted: bool) -> str | None:
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"Triton kernels need a GPU and the tensors are on {device.type!r}"
    return triton_problem() or (None if interpreted else _gpu_problem(device))


def triton_problem() -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install 'xlmr[triton]')"
    oldest, newest = TRITON_VERSIONS
    if oldest <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= newest:
        return None
    return f"Triton is {triton.__version__}, supported are {_dotted(oldest)} to {_dotted(newest)}"


def _gpu_problem(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU (torch.cuda.is_available() is False)"
    if torch.version.hip:
        target = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if target in HIP_TARGETS else f"the GPU is {target}, not one of {', '.join(HIP_TARGETS)}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    return f"the GPU has compute capability {_dotted(capability)}, at least {_dotted(MIN_CAPABILITY)} is needed"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its tile sizes by constexpr name, warps a program and pipeline stages."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    meta: dict[str, int] = field(init=False, repr=False, compare=False)  # keywords of a launch: kernel[grid](…, **meta)

    def __post_init__(self) -> None:
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        object.__setattr__(self, "meta", {**dict(self.tiles), **launch})


def config(num_warps: int, num_stages: int, **tiles: int) -> Config:
    return Config(tuple(tiles.items()), num_warps, num_stages)


# A kernel's table: target → bucket of the shape → Config. "portable" serves every target that has no table of its own.
Table = Mapping[str, Mapping[object, Config]]


def pick(table: Table, device: torch.device, bucket: object) -> Config:
    """The configuration of `bucket` in the table of the target that `device` is."""
    return table.get(target(device), table["portable"])[bucket]


@fact
def target(device: torch.device) -> str:
    """The key of `device` in a Table: "sm_80", "sm_90", …, "gfx942", …; "portable" in the interpreter."""
    return _target(device)


@functools.lru_cache
def _target(device: torch.device) -> str:
    if device.type != "cuda":
        return "portable"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, _ = torch.cuda.get_device_capability(device)
    return f"sm_{major}0"


@fact
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; 1 in the interpreter."""
    return _processors(device)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Kind(NamedTuple):
    """What checks, tiles and Triton's choice among compiled kernels read of a tensor: all but its values."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    aligned: bool  # begins at a multiple of 16 bytes; torch.compile knows no addresses, there it is taken to

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def kind(tensor: torch.Tensor) -> Kind:
    """That of one tensor."""
    (fields,) = kinds(tensor)
    return Kind(*fields)  # type: ignore[misc]


def kinds(*tensors: torch.Tensor | None) -> list[tuple[Any, ...] | None]:
    """The fields of each tensor's Kind, for a plan; None stays None. Plain tuples, no generator: each launch asks."""
    unknown = torch.compiler.is_compiling()
    return [
        None if t is None else (t.dtype, t.device, t.shape, t.stride(), unknown or t.data_ptr() % 16 == 0)
        for t in tensors
    ]


REMEMBERS = True  # set to False by tools that exchange what plans are made from, or watch Triton start kernels


def remembered(plan: Plan) -> Plan:
    """What is decided from kinds alone is decided once for all calls of those kinds: the checks of one launch take the
    host longer than the launch. The fields of a Kind reach the plan as one. Not inside torch.compile, whose graphs hold
    what was decided."""

    def decide(*args: Any) -> Any:
        return plan(*(Kind(*arg) if type(arg) is tuple else arg for arg in args))

    memory = functools.lru_cache(maxsize=4096)(decide)

    @functools.wraps(plan)
    def recall(*args: Any) -> Any:
        return (memory if REMEMBERS and not torch.compiler.is_compiling() else decide)(*args)

    return recall  # type: ignore[return-value]


class Launch:
    """A kernel with its grid and its constants, for arguments of always the same kinds.

    The first call leaves it to Triton to compile, or find, the kernel specialised for them; later ones start that
    kernel, without a search that takes the host longer than the start.
    """

    def __init__(self, kernel: Any, *grid: int, **constants: Any):
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self.start: Callable[..., None] | None = None
        self.trailing: list[Any] = []

    def __call__(self, *args: Any) -> None:
        if self.start is not None:
            self.start(*args, *self.trailing)
            return
        compiled = self.kernel[self.grid](*args, **self.constants)
        if compiled is not None and not torch.compiler.is_compiling():  # the interpreter compiles nothing
            self.trailing = [self.constants[name] for name in self.kernel.arg_names[len(args) :]]
            self.start = compiled[(*self.grid, 1, 1)[:3]]


def check(operation: str, *, mixed: bool = False, **tensors: torch.Tensor | None) -> None:
    """Refuses what no kernel takes: a device that cannot run them, a foreign dtype, tensors that do not fit together,
    and gradients (see check_kinds and refuse_gradients). Optional tensors may be None."""
    check_kinds(operation, mixed=mixed, **tensors)
    refuse_gradients(operation, *tensors.values())


def check_kinds(operation: str, *, mixed: bool = False, **tensors: torch.Tensor | Kind | None) -> None:
    """With `mixed` each tensor may have its own dtype: the kernel computes in fp32 whatever comes."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, *_ = given.values()
    why = unsupported(first.device)
    if why is not None:
        raise RuntimeError(f"{operation}: {why}; use backend='eager'")
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the first argument on {first.device}")
        if tensor.dtype not in DTYPES or not (mixed or tensor.dtype == first.dtype):
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype}, the first argument {first.dtype}; allowed is one of "
                f"{', '.join(map(str, DTYPES))}{'' if mixed else ' for all'}"
            )


def check_ids(operation: str, name: str, ids: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuses ids of another shape, on another device, or that are no integers."""
    if ids.shape != shape:
        raise ValueError(f"{operation}: {name} is {tuple(ids.shape)}, expected {list(shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operation}: {name} is {ids.dtype}, allowed are torch.int32 and torch.int64")
    if ids.device != device:
        raise ValueError(f"{operation}: {name} is on {ids.device}, the other tensors on {device}")


def check_range(operation: str, name: str, ids: torch.Tensor, size: int) -> None:
    """IndexError for an id outside [0, size), where asking needs no synchronisation: on a CPU."""
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise IndexError(
            f"{operation}: {name} go from {int(ids.min())} to {int(ids.max())}, allowed are 0 to {size - 1}"
        )


def refuse_gradients(operation: str, *tensors: torch.Tensor | None) -> None:
    """A launcher that needs gradients stands in an autograd.Function, whose forward sees none; elsewhere they are
    refused, for what the launcher returns would be detached."""
    if wants_gradients(*tensors):
        raise RuntimeError(f"{operation}: has no gradients; call under torch.no_grad(), or use backend='eager'")


def wants_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """tl.dot's input_precision: three TF32 products for fp32, one only where the user allows it; "ieee" otherwise, and
    on AMD, whose matrix cores multiply fp32 as it is."""
    if dtype != torch.float32 or target(device).startswith("gfx"):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch.compile traces only the older name; with both names in use, reading the older one is an error.
    allowed = matmul.allow_tf32 if torch.compiler.is_compiling() else matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def autocast(first: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, inside torch.autocast for their device; else as they are. For matrix products;
    as in torch, LayerNorm computes in fp32 whatever comes and float64 is left alone."""
    tensors, device = (first, *others), first.device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):  # check() refuses other devices
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def opaque(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that works where its first tensor is, whatever the current device: kernels start on the latter.

    In the interpreter torch.compile is kept out of it, which cannot trace NumPy.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.compiler.disable(launch)

    @functools.wraps(launch)
    def launched(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.cuda.device_count() < 2:
            return launch(*args, **kwargs)
        device = _first_tensor(args).device  # check() refuses what is on no GPU
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return launch(*args, **kwargs)

    return launched


def _first_tensor(args: Iterable[Any]) -> Any:
    flat = (a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,)))
    return next(a for a in flat if isinstance(a, torch.Tensor))


def in_chunks(operations: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """operations(x): a kernel's temporaries do not profit from a small number of rows."""
    return operations(x)
