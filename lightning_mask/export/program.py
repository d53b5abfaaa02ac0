"""Programs and ONNX: a network as a graph of operations, which runs without its Python code."""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core.channels import evaluating, flat
from lightning_mask.core.files import PathLike, whole_file
from lightning_mask.export.physical import apart


@dataclass(frozen=True)
class Inputs:
    """Real inputs of a network: what it is called with. As a function of a module, it runs that on them.

    Attributes:
        args: Arguments by position.
        kwargs: Arguments by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module) -> Any:
        """Run a module on these inputs."""
        return module(*self.args, **self.kwargs)

    def named(self, module: nn.Module) -> dict[str, Any]:
        """Return all arguments by the names that ``module`` has for them, but those that are None."""
        bound = inspect.signature(module.forward).bind(*self.args, **self.kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise ValueError(
                    f"{type(module).__name__} takes any number of arguments by position; give them by name."
                )
            named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return {name: value for name, value in named.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the inputs with each tensor changed."""
        args = tuple(change(a) if isinstance(a, Tensor) else a for a in self.args)
        return Inputs(args, {k: change(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()})


class Logits(nn.Module):
    """A network that takes tensors by name and returns one: its logits among what it returns by name, else its first.

    Args:
        net: The network.
        names: Of the tensors that it takes; they are those of ``forward``.
        constants: Arguments by name that every call is given, too.
    """

    def __init__(self, net: nn.Module, names: Iterable[str], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.net = net

        def forward(**given: Tensor) -> Tensor:
            return logits(net(**given, **constants))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD  # torch.export loses its way in arguments of any name
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward


def logits(outputs: Any) -> Tensor:
    """Return the logits among a network's outputs: the entry of that name, or the first tensor."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    return flat(outputs)[0]


def program(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Return ``model`` in eval mode as a program whose batch, and for texts whose length, may be any.

    The program takes the tensors among ``inputs``, by name; what else is there is part of it. It returns the logits
    (:class:`Logits`).

    Args:
        model: The module; it is not changed.
        inputs: Of at least two examples; token ids and the like are whole numbers of shape [batch, length].

    Raises:
        RuntimeError: If torch.export cannot follow the model's code.
    """
    named = inputs.named(model)
    constants = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
    given = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Logits(copy.deepcopy(model), given, constants).eval().requires_grad_(False)
        try:
            return torch.export.export(net, (), given, dynamic_shapes={k: _free(v) for k, v in given.items()})
        except Exception as error:
            said = " ".join(str(error).split())[:400]
            raise RuntimeError(f"torch.export cannot follow the code of {type(model).__name__}: {said}") from error


def save_program(model: nn.Module, inputs: Inputs, path: PathLike) -> None:
    """Write ``model`` as a program (``.pt2``), and check it by loading: on these inputs, on fewer and on shorter ones.

    ``torch.export.load(path).module()`` is called with the tensors by name, on any machine with PyTorch.

    Raises:
        RuntimeError: If torch.export cannot follow the model's code, or the program's outputs differ.
    """
    made = program(model, inputs)
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with temporary.open("wb") as file:
            torch.export.save(made, file)
        with temporary.open("rb") as file:
            back = torch.export.load(file).module()
        for each in variants(inputs):
            _compare(model, each, lambda given: back(**given), f"{path}")


def save_onnx(model: nn.Module, inputs: Inputs, path: PathLike) -> None:
    """Write ``model`` as ONNX, and check it with onnxruntime: on these inputs, on fewer and on shorter ones.

    Batch and, for texts, length may be any. Inputs have the names that the network gives them.

    Raises:
        ImportError: If onnx, onnxruntime or onnxscript is not installed.
        ValueError: If onnxruntime cannot run the model's precision.
        RuntimeError: If torch cannot write the model as ONNX, or onnxruntime's outputs differ.
    """
    require_onnx()
    made = program(model, inputs)
    with whole_file(path) as temporary:
        with _silent_onnx():
            written = torch.onnx.export(made, dynamo=True, verbose=False)
        assert written is not None
        written.save(temporary)
        run = load_onnx(temporary)
        for each in variants(inputs):
            _compare(model, each, run, f"{path}")


def load_onnx(path: PathLike) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return a function that runs an ONNX file on tensors by name, on the CPU, and returns the logits.

    Raises:
        ImportError: If onnxruntime is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If onnxruntime cannot run it: it is damaged, or in a precision that it has not.
    """
    require_onnx()
    import onnxruntime

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no ONNX file {str(path)!r}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no base of their own
        said = " ".join(str(error).split())
        raise ValueError(
            f"onnxruntime cannot run {str(path)!r} ({said}): it is damaged, or in a precision that it has not (of 16 bits it has "
            "float16)."
        ) from None
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        (out, *_) = session.run(None, {name: inputs[name].detach().cpu().numpy() for name in names})
        return torch.from_numpy(out)

    return run


def require_onnx() -> None:
    """Refuse an installation without what writes and checks ONNX.

    Raises:
        ImportError: Naming the extra.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX is written and checked with {error.name}, which is not installed: pip install 'lightning-mask[export]'."
        ) from None


@contextmanager
def _silent_onnx() -> Iterator[None]:
    """Say nothing of operators of packages that are not installed, nor of what is to come in torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def variants(inputs: Inputs) -> list[Inputs]:
    """Return the inputs, those of their first example alone, and, of texts, the first half of each."""
    made = [inputs, inputs.map(lambda t: t[:1])]
    tensors = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, Tensor)]
    length = max((t.shape[1] for t in tensors if _is_text(t)), default=0)
    if length > 3:
        made.append(inputs.map(lambda t: t[:, : length // 2] if _is_text(t) else t))
    return made


def _is_text(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _free(tensor: Tensor) -> dict[int, Any]:
    """Which sides of a tensor may be any: the batch, and of texts the length."""
    free = torch.export.Dim.DYNAMIC
    return {0: free, 1: free} if _is_text(tensor) else {0: free}


def _compare(model: nn.Module, inputs: Inputs, run: Callable[[dict[str, Tensor]], Tensor], path: str) -> None:
    given = {name: value for name, value in inputs.named(model).items() if isinstance(value, Tensor)}
    with evaluating(model), torch.no_grad():
        expected, found = logits(inputs(model)), run(given)
    difference = apart([expected], [found])
    if difference is not None:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise RuntimeError(f"{path}: the file's outputs differ from the model's on {shapes}: {difference}.")
