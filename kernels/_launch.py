"""Device facts that every kernel shares: where Triton can run, and why not where it cannot."""

import os

import torch

TRITON_VERSIONS = ((3, 6), (3, 9))  # oldest and newest minor version
MIN_CAPABILITY = (8, 0)  # NVIDIA: Ampere is the first with bf16 tensor cores and asynchronous copies
HIP_TARGETS = ("gfx942",)  # AMD: MI300


def unsupported(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, in one clause, or None where they can.

    The interpreter (TRITON_INTERPRET=1) counts as able on a CPU. CUDA is initialised only when `device` is a GPU.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"Triton kernels need a GPU and the tensors are on {device.type!r}"
    return _triton_problem() or (None if interpreted else _gpu_problem(device))


def _triton_problem() -> str | None:
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
