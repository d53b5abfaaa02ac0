"""2:4 sparsity on a GPU's sparse tensor cores, through torch's semi-structured tensors."""

import copy
import json

import torch
from torch import nn

from lightning_mask.core.files import PathLike
from lightning_mask.export.sparse import load_sparse, read_sparse, save_sparse

_ROWS, _COLUMNS = 32, 64
"""What the rows and columns of a 16-bit weight have to be multiples of for the kernels."""
_LAYERS = "semi_structured"


def layers_2to4(model: nn.Module) -> list[str]:
    """Return the Linear layers whose weights have two zeros in each four neighbours of a row, and a shape that kernels take.

    Raises:
        ValueError: If there is none, with what comes nearest.
    """
    found: list[str] = []
    nearest: tuple[float, str] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        if columns % 4:
            continue
        full = (module.weight.detach().reshape(-1, 4) != 0).sum(1) > 2
        share = float(full.float().mean())
        if share == 0 and rows % _ROWS == 0 and columns % _COLUMNS == 0:
            found.append(name)
        odd = f"{int(full.count_nonzero()):,} of {full.numel():,} fours of {name}.weight have more than two"
        if share == 0:
            odd = f"{name}.weight of {rows} x {columns} fits, but the kernels take multiples of {_ROWS} x {_COLUMNS}"
        if nearest is None or share < nearest[0]:
            nearest = (share, odd)
    if not found:
        what = "it has none whose rows are divisible by 4" if nearest is None else f"the nearest: {nearest[1]}"
        raise ValueError(
            f"No Linear layer has at most two entries that are not zero in each four neighbours of a row ({what}). "
            "Prune with sparsity='2:4' first."
        )
    return found


def semi_structured(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """Return a copy of ``model`` on the GPU whose 2:4 Linear weights are torch's semi-structured tensors.

    Args:
        model: The module; zeros are read from its weights (:func:`layers_2to4`).
        dtype: Of the copy: torch.float16 or torch.bfloat16, which the kernels take.

    Raises:
        ValueError: If no layer fits.
        RuntimeError: If there is no CUDA device.
    """
    names = layers_2to4(model)
    require_cuda()
    made = copy.deepcopy(model).eval().to(device="cuda", dtype=dtype)
    for name in names:
        layer = made.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        packed = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(packed, requires_grad=False)
    return made


def require_cuda() -> None:
    """Refuse a machine without a GPU.

    Raises:
        RuntimeError: If there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "2:4 weights run on the sparse tensor cores of a CUDA device, and there is none here: use a machine with one, or "
            "export the zeros as format=sparse."
        )


def save_semi_structured(model: nn.Module, path: PathLike, dtype: torch.dtype = torch.float16) -> list[str]:
    """Write a 2:4 model to ``path`` in ``dtype``, compressed as by :func:`~lightning_mask.export.sparse.save_sparse`.

    Returns:
        The names of the Linear layers that are 2:4; kept in the file's header.

    Raises:
        ValueError: If no layer fits; nothing is written then.
    """
    names = layers_2to4(model)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    save_sparse(state, path, {_LAYERS: json.dumps(names)})
    return names


def load_semi_structured(path: PathLike, model: nn.Module) -> nn.Module:
    """Read a file of :func:`save_semi_structured` into a copy of ``model`` on the GPU, as :func:`semi_structured` returns.

    Args:
        path: The file.
        model: A module of the same architecture.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of another kind.
        RuntimeError: If there is no CUDA device.
    """
    header = read_sparse(path)[1]
    if _LAYERS not in header:
        raise ValueError(f"{str(path)!r} is a sparse file without 2:4 layers; read it with load_sparse.")
    state = load_sparse(path)
    made = copy.deepcopy(model)
    made.load_state_dict(state)
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    return semi_structured(made, dtype)
