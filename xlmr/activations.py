"""The activation functions that a configuration may name, as modules, under transformers' names."""

import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of Hendrycks & Gimpel (2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class SquaredReLU(nn.Module):
    """relu(x)² (So et al., 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def _gelu_tanh() -> nn.Module:
    return nn.GELU(approximate="tanh")


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "linear": nn.Identity,
}
