"""structure="channel": which tensors are pruned together is read from a forward pass on a training batch."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_mask.callbacks import calibration
from lightning_mask.core.channels import channel_groups
from lightning_mask.core.structures import Group, Structure

if TYPE_CHECKING:
    from lightning_mask.callbacks.session import Session

Parts = Sequence[tuple[list[str], float]]


def coupled(session: "Session", parts: Parts, named: bool) -> tuple[Structure, list[tuple[list[str], float]]]:
    """Return the structure whose units are the model's channels, and the tensors that they are made of.

    Args:
        session: Whose training data is set up.
        parts: Weights in scope, and the sparsity that they share.
        named: Whether the user named them: then one that has no channels is an error, else it is left out.

    Returns:
        The structure; and ``parts`` with the biases and the entries of BatchNorms that belong to the weights' channels.

    Raises:
        ValueError: If the model is sharded, nothing in scope has channels, or coupled weights have different sparsities.
    """
    if session.sharded:
        raise ValueError(
            "PruneMask: structure='channel' traces the model, which cannot be done while it is dealt out over ranks (FSDP2); "
            "use DDP, or structure='row'."
        )
    groups, left_out = channel_groups(session.module, _forward(session))
    weights = {name for names, _ in parts for name in names}
    parameters = dict(session.module.named_parameters())
    inside = [group for group in groups if _weights(group, parameters) <= weights]
    owner = {name: i for i, group in enumerate(inside) for name in group}
    for name in weights - owner.keys():
        torn = next((g for g in groups if name in g), None)
        if torn is not None:
            reason = (
                f"its channels are those of {', '.join(sorted(_weights(torn, parameters) - weights))}, not in scope"
            )
        else:
            reason = left_out.get(name.rpartition(".")[0], "it has none")
        if named:
            raise ValueError(f"PruneMask: structure='channel': {name} has no channels to prune: {reason}.")
    if not inside:
        raise ValueError("PruneMask: structure='channel': nothing in scope has channels that can be removed.")
    wider: list[tuple[list[str], float]] = []
    taken: dict[int, float] = {}
    for names, sparsity in parts:
        mine = dict.fromkeys(owner[name] for name in names if name in owner)
        both = next((i for i in mine if i in taken), None)
        if both is not None:
            raise ValueError(
                f"PruneMask: {', '.join(sorted(_weights(inside[both], parameters)))} have channels in common and different "
                "sparsities; put them under one pattern."
            )
        taken |= dict.fromkeys(mine, sparsity)
        if mine:
            wider.append(([name for i in mine for name in inside[i]], sparsity))

    def structure(shapes: object, model: nn.Module | None) -> list[Group]:
        return inside

    return structure, wider


def _forward(session: "Session") -> Callable[[nn.Module], Tensor | None]:
    batch = next(iter(calibration.training_batches(session.trainer, 1)))
    return lambda _: calibration.batch_loss(session.trainer, session.module, batch)


def _weights(group: Group, parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name in group if parameters[name].dim() > 1}
