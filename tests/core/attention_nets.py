"""A small network with two layers of attention, and the masks that a selection makes of it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_mask.core import Context, MaskSet, Selection
from lightning_mask.core.selection import select


class Attention(nn.Module):
    def __init__(self, heads: int, shared: int, width: int, inputs: int, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, heads * width, bias=bias)
        self.k_proj = nn.Linear(inputs, shared * width, bias=bias)
        self.v_proj = nn.Linear(inputs, shared * width, bias=bias)
        self.o_proj = nn.Linear(heads * width, inputs, bias=False)


class Layer(nn.Module):
    def __init__(self, *numbers: Any) -> None:
        super().__init__()
        self.attention = Attention(*numbers)
        self.mlp = nn.Linear(numbers[3], 2)


class Net(nn.Module):
    """Two layers of attention, and something before and after them."""

    def __init__(self, heads: int, shared: int, width: int, inputs: int, bias: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=shared, head_dim=width)
        self.scale = nn.Parameter(torch.zeros(()))
        self.stem = nn.Conv2d(2, 3, 2)
        self.layers = nn.ModuleList([Layer(heads, shared, width, inputs, bias) for _ in range(2)])
        self.out = nn.Linear(inputs, 3)


def selected(selection: Selection, net: nn.Module) -> MaskSet:
    selection.check(net)
    return select(selection, net, Context(net))
