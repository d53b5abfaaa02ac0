"""Whole rows or columns of a weight: backward computes the gradient of the active lines and nothing else of dW.

A line is a row (output unit, dimension 0) or a column (input unit, dimension 1) of the weight of a Linear, an Embedding
or a convolution. In its module's forward the weight is seen as a constant. A small leaf, ``values``, stands for its active
lines in the optimizer: a forward hook passes the module's output on unchanged and ties ``values`` to it, so that backward,
which comes by there with the output's gradient, leaves in ``values.grad`` what the dense backward would leave in those lines.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

_Keep = Callable[[Tensor], Tensor]
"""The module's input to what backward needs of it."""

_Gradient = Callable[[Tensor, Tensor], Tensor]
"""Gradient of the module's output, and what was kept, to the gradient of the active lines."""

_Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_HIDDEN = "_lightning_mask_weight"

_LINES_AT_ONCE = 16
"""A product is computed in multiples of this many lines. A BLAS rounds narrow products by other kernels than wide ones;
at this width they agree, which costs next to nothing (16 instead of 4 lines of 384 x 384, 256 tokens: 30 us)."""


def supports(module: nn.Module, name: str, dim: int) -> bool:
    """Whether :class:`RowGradients` serves lines along ``dim`` of the parameter ``name`` of ``module``.

    It serves the ``weight`` of a module whose class is exactly Linear, Embedding, Conv1d, Conv2d or Conv3d; not an
    Embedding with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``, nor a convolution that pads with anything but zeros
    or unevenly, nor the input channels of a grouped one; nor a module whose ``forward`` or whose weight's class was
    replaced. A weight that other modules use too is for the caller to notice.
    """
    weight = module._parameters.get("weight")
    if name != "weight" or dim not in (0, 1) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks or "forward" in vars(module):
        return False
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    if isinstance(module, _Convolution) and type(module) in get_args(_Convolution):
        return module.padding_mode == "zeros" and _padding(module) is not None and (dim == 0 or module.groups == 1)
    return type(module) is nn.Linear


def whole_lines(mask: Tensor) -> tuple[int, Tensor] | None:
    """Return the active lines of a mask that consists of whole rows, or else of whole columns.

    Args:
        mask: Boolean, True = active.

    Returns:
        Dimension (0: rows, 1: columns) and the sorted int64 indices of the active lines, on the mask's device; None if
        the mask has less than two dimensions, is all True or all False, or does not consist of whole lines.

    Example:
        >>> whole_lines(torch.tensor([[True, False, True], [True, False, True]]))
        (1, tensor([0, 2]))
    """
    if mask.dim() < 2 or mask.numel() == 0:
        return None
    others = mask.dim() - 1
    for dim in (0, 1):
        lines = mask.movedim(dim, -1)
        first, last = lines[(0,) * others], lines[(-1,) * others]
        if not torch.equal(first, last):  # tells most masks of scattered entries at once
            continue
        index = first.nonzero().view(-1)
        if not 0 < len(index) < len(first):
            continue
        chosen = mask.index_select(dim, index)
        if bool(chosen.all()) and int(mask.count_nonzero()) == chosen.numel():
            return dim, index
    return None


class RowGradients:
    """Fills ``values.grad`` with the gradient of the active lines of a module's weight, in every backward.

    The caller keeps the weight's lines equal to ``values``. The weight goes on requiring a gradient: one that comes past its
    module's forward (a penalty on the weights, a tied use) arrives in the weight's own ``.grad`` as always. The gradients of
    several backwards, and of several calls in one forward, add up as usual; the rest of dW is never computed. The product
    is made in the dtype of the output's gradient, as the dense backward makes it, and then cast to that of ``values``.
    For columns only the needed columns of the input are kept for backward.

    Args:
        module: One that :func:`supports` accepts.
        values: Leaf of the shape of ``module.weight.index_select(dim, index)``, on the same device; of any float dtype.
        index: Sorted int64 indices of the active lines, each once.
        dim: 0 for rows, 1 for columns.

    Attributes:
        values: As given.
        paused: While True, the module's forward uses its weight as always (for a criterion that wants all of its gradient).

    Raises:
        ValueError: If the module is not supported, or ``values`` has another shape.

    Example:
        >>> linear = torch.nn.Linear(2, 3).requires_grad_(False)
        >>> values = torch.nn.Parameter(linear.weight[[1]])
        >>> rows = RowGradients(linear, values, torch.tensor([1]), dim=0)
        >>> linear(torch.tensor([[5.0, 7.0]])).sum().backward()
        >>> values.grad
        tensor([[5., 7.]])
        >>> rows.remove()
    """

    def __init__(self, module: nn.Module, values: nn.Parameter, index: Tensor, dim: int) -> None:
        kind = type(module).__name__
        if not supports(module, "weight", dim):
            raise ValueError(f"Lines along dimension {dim} of this {kind} cannot be trained alone; hold them densely.")
        self._module = module
        self.change(values, index, dim)
        self._attach()

    def change(self, values: nn.Parameter, index: Tensor, dim: int) -> None:
        """Fill the gradient of other values, for other lines, from now on; arguments and error as of the constructor.

        The hooks stay, so code that was compiled with them need not be forgotten.
        """
        weight: Tensor = self._module.get_parameter("weight")
        shape = (*weight.shape[:dim], len(index), *weight.shape[dim + 1 :])
        if values.shape != shape:
            kind = type(self._module).__name__
            raise ValueError(f"The active lines of this {kind} have shape {shape}, the values {tuple(values.shape)}.")
        self.values = values
        self._keep, self._gradient = _way(self._module, index.to(weight.device), dim)

    def _attach(self) -> None:
        module, self.paused = self._module, False
        if not module._forward_hooks and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice the first hook of a module
        self._handles = [
            module.register_forward_pre_hook(_Hide(self)),
            module.register_forward_hook(_show, always_call=True, prepend=True),
            module.register_forward_hook(self, prepend=True, with_kwargs=True),
        ]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """The forward hook."""
        if _HIDDEN not in module.__dict__:
            return None
        x = args[0] if args else kwargs["input"]
        kept = self._keep(x)
        if kept is not x:
            kept = kept.to(output.dtype)  # autocast may have made the product in another precision
        return _Attach.apply(output, kept, self.values, self._gradient)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _hook_of_a_copy, ()  # a copy of the model trains nothing here

    def remove(self) -> None:
        """Take the hook away; a second time does nothing."""
        for handle in self._handles:
            handle.remove()


class _Hide:
    """The forward pre-hook: for the length of a forward the module sees its weight as a constant."""

    def __init__(self, rows: RowGradients) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, _: Any) -> None:
        weight = module._parameters["weight"]
        if torch.is_grad_enabled() and not self.rows.paused and type(weight) is nn.Parameter:
            module.__dict__[_HIDDEN] = weight
            module._parameters["weight"] = weight.detach()  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _hook_of_a_copy, ()


def _show(module: nn.Module, *_: Any) -> None:
    weight = module.__dict__.pop(_HIDDEN, None)
    if weight is not None:
        module._parameters["weight"] = weight


class EntryGradients(RowGradients):
    """The same for scattered entries of an Embedding's table: backward makes the rows of the tokens that it saw, no table.

    Args:
        module: An Embedding that :func:`supports` accepts.
        values: 1-D leaf of the active entries' values, on the table's device.
        index: Sorted flat indices of the active entries.
        place: int64, where in ``values`` each of them stands.

    Raises:
        ValueError: If the module is not a supported Embedding.

    Example:
        >>> table = torch.nn.Embedding(3, 2).requires_grad_(False)
        >>> values = torch.nn.Parameter(table.weight.view(-1)[[1, 4]])
        >>> entries = EntryGradients(table, values, torch.tensor([1, 4]), torch.tensor([0, 1]))
        >>> table(torch.tensor([0, 0])).sum().backward()
        >>> values.grad
        tensor([2., 0.])
    """

    def __init__(self, module: nn.Module, values: nn.Parameter, index: Tensor, place: Tensor) -> None:
        if not isinstance(module, nn.Embedding) or not supports(module, "weight", 0):
            raise ValueError(f"Entries of this {type(module).__name__} cannot be trained alone; hold them densely.")
        self._module = self._table = module
        self.change_entries(values, index, place)
        self._attach()

    def change_entries(self, values: nn.Parameter, index: Tensor, place: Tensor) -> None:
        """Fill the gradient of other values, for other entries, from now on; arguments as of the constructor."""
        self.values = values
        self._keep, self._gradient = _embedding_entries(self._table, index, place, len(values))


def _hook_of_a_copy() -> Callable[..., None]:
    return _leave_alone


def _leave_alone(*_: Any) -> None:
    return None


class _Attach(torch.autograd.Function):
    """The identity on ``output``, whose backward has a gradient for ``values`` as well.

    The result shares the output's memory and is no view to autograd, so that an activation may work in place on it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, kept: Tensor, values: Tensor, gradient: _Gradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        ctx.gradient, ctx.dtype = gradient, values.dtype
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None]:
        if grad_output is None or not ctx.needs_input_grad[2]:
            return grad_output, None, None, None
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A gradient of a gradient (create_graph=True) goes through a weight of which only some lines or entries "
                "train; hold it densely, with engine='dense'."
            )
        (kept,) = ctx.saved_tensors
        if kept.is_floating_point():
            kept = kept.to(grad_output.dtype)
        return grad_output, None, ctx.gradient(grad_output, kept).to(ctx.dtype), None


def _way(module: nn.Module, index: Tensor, dim: int) -> tuple[_Keep, _Gradient]:
    if isinstance(module, nn.Linear):
        return _linear_rows(module, index) if dim == 0 else _linear_columns(index)
    if isinstance(module, nn.Embedding):
        return _embedding_rows(module, index) if dim == 0 else _embedding_columns(module, index)
    convolution = cast(_Convolution, module)
    return _conv_rows(convolution, index) if dim == 0 else _conv_columns(convolution, index)


def _same(x: Tensor) -> Tensor:
    return x


def _widened(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Lines to compute instead of ``index``, a multiple of _LINES_AT_ONCE or all, and where those of ``index`` are in them."""
    missing = -len(index) % _LINES_AT_ONCE
    if len(index) + missing >= size:
        return torch.arange(size, device=index.device), index
    return torch.cat([index, index[-1:].expand(missing)]), torch.arange(len(index), device=index.device)


def _linear_rows(module: nn.Linear, index: Tensor) -> tuple[_Keep, _Gradient]:
    lines, mine = _widened(index, module.out_features)

    def gradient(grad: Tensor, x: Tensor) -> Tensor:
        grad = grad.index_select(-1, lines).reshape(-1, len(lines))
        return (grad.t() @ x.reshape(-1, x.shape[-1])).index_select(0, mine)

    return _same, gradient


def _linear_columns(index: Tensor) -> tuple[_Keep, _Gradient]:
    places, mine = _widened(torch.arange(len(index), device=index.device), sys.maxsize)

    def gradient(grad: Tensor, x: Tensor) -> Tensor:
        x = x.reshape(-1, len(mine)).index_select(1, places)
        return (grad.reshape(-1, grad.shape[-1]).t() @ x).index_select(1, mine)

    return lambda x: x.index_select(-1, index), gradient


def _embedding_rows(module: nn.Embedding, index: Tensor) -> tuple[_Keep, _Gradient]:
    none = len(index)  # stands for every row that is not active; the kernel leaves it out as padding
    place = torch.full((module.num_embeddings,), none, dtype=torch.int32, device=index.device)
    place[index] = torch.arange(none, dtype=torch.int32, device=index.device)
    if module.padding_idx is not None:
        place[module.padding_idx] = none

    def gradient(grad: Tensor, tokens: Tensor) -> Tensor:
        places = place.index_select(0, tokens.reshape(-1))
        grad = grad.reshape(-1, grad.shape[-1])
        return torch.ops.aten.embedding_dense_backward(grad, places, none + 1, none, False)[:none]

    return _same, gradient


def _embedding_entries(module: nn.Embedding, index: Tensor, place: Tensor, size: int) -> tuple[_Keep, _Gradient]:
    width = module.embedding_dim
    counts = torch.bincount(index.long() // width, minlength=module.num_embeddings)
    first = counts.cumsum(0) - counts
    if module.padding_idx is not None:
        counts[module.padding_idx] = 0

    def gradient(grad: Tensor, tokens: Tensor) -> Tensor:
        seen, which = tokens.reshape(-1).unique(return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(grad.reshape(-1, width), which, len(seen), -1, False)
        many = counts.index_select(0, seen)
        row = torch.repeat_interleave(many)  # of the tokens seen, for each of their active entries
        start = first.index_select(0, seen) - (many.cumsum(0) - many)
        entry = start.index_select(0, row) + torch.arange(len(row), device=row.device)
        found = rows[row, index.index_select(0, entry).long() % width]
        return found.new_zeros(size).index_copy(0, place.index_select(0, entry), found)

    return _same, gradient


def _embedding_columns(module: nn.Embedding, index: Tensor) -> tuple[_Keep, _Gradient]:
    rows, padding = module.num_embeddings, -1 if module.padding_idx is None else module.padding_idx

    def gradient(grad: Tensor, tokens: Tensor) -> Tensor:
        grad = grad.index_select(-1, index)
        return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, padding, False)

    return _same, gradient


def _padding(module: _Convolution) -> list[int] | None:
    """Zeros on either side of each dimension; None where ``padding="same"`` needs more on one side than on the other."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else [t // 2 for t in total]
    return [int(p) for p in module.padding]


_WeightGradient = Callable[[Tensor, Tensor, int], Tensor]


def _conv_weight_gradient(module: _Convolution) -> _WeightGradient:
    """Gradient of the output and input, each with some of the channels, and groups, to the gradient of that weight."""
    stride, padding, dilation, kernel = module.stride, _padding(module), module.dilation, module.kernel_size

    def weight_gradient(grad: Tensor, x: Tensor, groups: int) -> Tensor:
        if grad.dim() == len(kernel) + 1:
            grad, x = grad.unsqueeze(0), x.unsqueeze(0)
        weight = grad.new_empty(1).expand(grad.shape[1], x.shape[1] // groups, *kernel)
        mask = (False, True, False)
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0] * len(kernel), groups, mask
        )[1]

    return weight_gradient


def _conv_rows(module: _Convolution, index: Tensor) -> tuple[_Keep, _Gradient]:
    weight_gradient, channel = _conv_weight_gradient(module), -len(module.kernel_size) - 1
    if module.groups > 1:
        return _grouped_rows(module, index, weight_gradient)
    return _same, lambda grad, x: weight_gradient(grad.index_select(channel, index), x, 1)


def _conv_columns(module: _Convolution, index: Tensor) -> tuple[_Keep, _Gradient]:
    weight_gradient, channel = _conv_weight_gradient(module), -len(module.kernel_size) - 1
    return lambda x: x.index_select(channel, index), lambda grad, x: weight_gradient(grad, x, 1)


def _grouped_rows(module: _Convolution, index: Tensor, weight_gradient: _WeightGradient) -> tuple[_Keep, _Gradient]:
    """Groups that have equally many active rows are one grouped convolution; groups without any are left out."""
    channel, wide = -len(module.kernel_size) - 1, module.in_channels // module.groups
    group = index // (module.out_channels // module.groups)
    counts = torch.bincount(group, minlength=module.groups)
    parts, places, kept = [], [], []
    for count in sorted(set(counts.tolist()) - {0}):
        members = (counts == count).nonzero().view(-1)
        place = (counts[group] == count).nonzero().view(-1)
        places.append(place)
        kept.append((members[:, None] * wide + torch.arange(wide, device=index.device)).view(-1))
        parts.append((index[place], len(members)))
    inputs, order = torch.cat(kept), torch.cat(places).argsort()
    sizes = [groups * wide for _, groups in parts]

    def gradient(grad: Tensor, x: Tensor) -> Tensor:
        pieces = zip(parts, x.split(sizes, channel), strict=True)
        found = [weight_gradient(grad.index_select(channel, rows), piece, groups) for (rows, groups), piece in pieces]
        return torch.cat(found).index_select(0, order) if len(found) > 1 else found[0]

    return lambda x: x.index_select(channel, inputs), gradient
