"""Looking at the values of tensors: only where it costs no synchronisation and decides nothing that a graph keeps."""

import torch
from torch import Tensor


def tracing() -> bool:
    """Whether values must decide nothing: torch.jit.trace or torch.export records this call for other inputs, a
    transform of torch.func runs it for many at once, or its tensors are fake and have none."""
    if torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        # is_exporting() is True inside torch.compile as well, up to torch 2.11; the flag behind it is not.
        return torch.compiler._is_exporting_flag
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake is not None or torch._C._functorch.maybe_current_level() is not None


def recorded() -> bool:
    """Whether this call becomes part of a graph of torch.compile, or values must decide nothing (see `tracing`)."""
    return torch.compiler.is_compiling() or tracing()


def readable(values: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation and decides nothing that a graph would keep."""
    return values.device.type == "cpu" and not recorded()


def require(right: Tensor, what: str, **values: Tensor) -> None:
    """ValueError unless `right`, a bool on the device of the values: `what` says what they must be. A GPU is not waited
    for: it stops with the message, a device-side assertion, and the next synchronisation raises."""
    if not readable(right):
        torch._assert_async(right, what)
    elif not bool(right):
        given = ", ".join(f"{name} {value[:8].tolist()}" for name, value in values.items())
        raise ValueError(f"{what}; got {given}" + (" …" if any(len(value) > 8 for value in values.values()) else ""))
