"""Dense files: every entry of every tensor, zeros too; any program that reads safetensors can load them."""

from torch import nn

from lightning_mask.core.files import PathLike, whole_file
from lightning_mask.export.files import distinct, unlike


def save_dense(model: nn.Module, path: PathLike) -> None:
    """Write a model's state dict to ``path`` as safetensors, and check it by loading.

    Tied tensors are written once; ``safetensors.torch.load_model(model, path)`` reads the file into a model.

    Raises:
        OSError: If the folder cannot be written to.
        RuntimeError: If what was written does not load equal.
    """
    from safetensors.torch import load_file, save_file

    tensors, aliases = distinct(model.state_dict())
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=aliases)  # as safetensors.torch.save_model has it
        wrong = unlike(tensors, load_file(temporary))
        if wrong is not None:
            raise RuntimeError(f"{path}: {wrong} did not load equal to what was written.")
