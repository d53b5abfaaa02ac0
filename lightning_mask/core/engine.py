"""MaskEngine: holds what the masks hold, exactly, in any PyTorch loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mask.core.ages import Ages, corrects_bias
from lightning_mask.core.compact import BREAK_EVEN, LINES_FROM, Compact, Lines, Slots, is_compact, servable, widen_state
from lightning_mask.core.holders import Holder, make_holder
from lightning_mask.core.maskset import MaskSet, active, indices
from lightning_mask.core.norms import HeldNorms
from lightning_mask.core.optimizers import (
    RateFactors,
    begin_state,
    innermost,
    moves_without_gradient,
    parameters_of,
    reset_all,
    reset_state,
    wrap_closure,
)
from lightning_mask.core.patterns import aliases
from lightning_mask.core.rows import supports, whole_lines
from lightning_mask.core.sharding import (
    check_layout,
    equal,
    is_sharded,
    local,
    offloaded,
    part,
    reshard,
    shard,
    totals,
)
from lightning_mask.core.straight_through import DenseBehind

ENGINES = ("auto", "compact", "dense")


@dataclass
class Row:
    """One line of the table of what is held: a tensor, its entries, and by what it is held."""

    name: str
    shape: tuple[int, ...]
    active: int
    density: float
    held_by: str


class MaskEngine:
    """Keeps every held entry of a model as it is, bit for bit, while an optimizer trains the rest.

    In the loop: ``loss.backward(); engine.after_backward(); optimizer.step()``. Held values are put back by a hook
    after each ``step``. A tensor that is held whole stops requiring a gradient, so it costs nothing; one that is active
    whole is left alone.

    Of a model that ``fully_shard`` dealt out over ranks (FSDP2), each rank holds its part; masks are whole tensors or DTensors
    like the parameters. Make the engine after ``fully_shard``, and call its methods on all ranks.

    Args:
        model: The module whose parameters are masked, by name.
        optimizers: The optimizer, or several, that hold the parameters; param groups keep number and order.
        masks: Name to boolean mask, True = may change. Parameters without a mask are left as they are.
        engine: How tensors are held of which some entries are active. ``"dense"``: held gradients are zeroed, and held
            values put back after the step. ``"compact"``: the optimizer gets the active entries alone; its state has their
            size, and ``.grad`` of such a tensor is None once its active entries are gathered, so clip, log and zero the
            gradients through the optimizer (``optimizer.zero_grad()``), not through the model. Tensors that are mostly
            active, and optimizers that do not update each entry by itself, are held dense. ``"auto"`` is ``"dense"`` here,
            since a plain loop may read ``.grad``; the callbacks choose by what they see.
        early: With ``"compact"``, gather each gradient as soon as backward has accumulated it, which frees the memory
            tensor by tensor; not for gradients that are still to be reduced over ranks.
        stored: Masks by which the optimizer's state, loaded from a checkpoint, is compact (:attr:`compact` when saved).
        ages: What :meth:`ages` returned when the optimizer's state was saved.
        guard: Whether somebody else writes to the weights too (weight averaging does). Then copies are also kept of the
            tensors that are held whole and of the statistics of held normalisation modules, for :meth:`restore`.

    Raises:
        ValueError: If a mask is of another shape or of no parameter, a tensor is to train that no optimizer holds, or a
            tensor is sharded in another way than by rows.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> engine = MaskEngine(model, optimizer, MaskSet({"weight": torch.tensor([[True, False]])}))
        >>> before = model.weight.detach().clone()
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     engine.after_backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        masks: Mapping[str, Tensor],
        *,
        engine: str = "auto",
        early: bool = False,
        guard: bool = False,
        stored: Mapping[str, Tensor] | None = None,
        ages: Mapping[str, Sequence[tuple[int, Tensor]]] | None = None,
    ) -> None:
        check_engine(engine)
        self._way, self._early, self._stored = engine, early, dict(stored or {})
        self.model, self._guard = model, guard
        several = optimizers if isinstance(optimizers, Sequence) else [optimizers]
        self.optimizers = [innermost(optimizer) for optimizer in several]
        self.masks = MaskSet({})
        reshard(model)
        self._aliases = aliases(model)
        self._parameters = dict(model.named_parameters())
        self._owners: dict[int, list[Optimizer]] = {}
        for optimizer in self.optimizers:
            for parameter in parameters_of(optimizer):
                self._owners.setdefault(id(parameter), []).append(optimizer)
        self._required = {name: p.requires_grad for name, p in self._parameters.items()}
        self._holders: dict[str, Holder] = {}
        self._compact: dict[str, Compact] = {}
        self._refused: dict[str, str] = {}
        for name, parameter in self._parameters.items():
            check_layout(name, parameter)
        self._ages: dict[str, Ages] = {name: Ages(each, self._parameters[name]) for name, each in (ages or {}).items()}
        self._held: set[str] = set()
        self._whole: dict[str, Holder] = {}
        self._norms = HeldNorms(model, keep=guard)
        self.behind = DenseBehind(self._parameters, self._owners)
        """Dense weights that the optimizer goes on updating behind masks; none by default."""
        self._rates: list[RateFactors] = []
        self._factors: dict[str, float] = {}
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in self.optimizers]
        self._handles += [optimizer.register_step_pre_hook(self._before_step) for optimizer in self.optimizers]
        try:
            self._set(masks)
        except Exception:
            self.release()
            raise

    @property
    def trainable(self) -> list[str]:
        """Names of the tensors that require a gradient, in the model's order."""
        return [name for name, p in self._parameters.items() if p.requires_grad]

    def after_backward(self) -> None:
        """Keep held gradients from the optimizer: gather the active ones, or write +0.0 over the held ones.

        Call it after the last backward of a step.

        Raises:
            ValueError: If a partly held tensor has a sparse gradient.
        """
        for name in self._held:
            parameter = self._parameters[name]
            if (
                parameter.requires_grad
            ):  # Lightning's untoggle_optimizer gives back what it saw before the masks changed
                parameter.requires_grad_(False)
                parameter.grad = None
        for compact in self._compact.values():
            compact.gather()
        for name, holder in self._holders.items():
            gradient = self._parameters[name].grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise ValueError(f"{name} is held in part and has a sparse gradient; make its layer with sparse=False.")
            holder.mask_gradient(local(gradient))

    def gradients(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield, after :meth:`after_backward`, what ``optimizer`` takes as the gradient of each tensor that has one.

        Returns:
            The parameter's name; this rank's part of the gradient, to be changed in place; and where the active entries
            stand in it, flat, in the order in which they stand in the parameter (None: everywhere).
        """
        for name, parameter in self._parameters.items():
            gradient = self._in_optimizer(name).grad
            if gradient is None or not any(owner is optimizer for owner in self._owners.get(id(parameter), [])):
                continue
            places = None
            if name in self._compact:
                slots = self._compact[name].slots
                places = slots.places() if isinstance(slots, Slots) else None
            elif name in self._holders:
                places = indices(part(self.masks[name], parameter))
            yield name, local(gradient), places

    def gradient(self, name: str) -> Tensor | None:
        """Return, after :meth:`after_backward`, this rank's part of what an optimizer takes as a parameter's gradient.

        Returns:
            Of the parameter's shape, zero at held entries; None without one.
        """
        taken = self._in_optimizer(name).grad
        if taken is None:
            return None
        return self._compact[name].slots.scatter(local(taken)) if name in self._compact else local(taken)

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of that name."""
        return self._parameters[name]

    @torch.no_grad()
    def update(self, masks: Mapping[str, Tensor], zero: Mapping[str, Tensor] | None = None) -> None:
        """Put new masks in force between two steps, or between backward and step.

        Entries that stay active keep their moments; entries that become active start from zero moments (a whole tensor
        that does, from a new state). Entries that become held are held at the value they have now.

        Args:
            masks: Name to boolean mask; a name that was masked before and is absent becomes active whole.
            zero: Name to boolean mask of entries that are held at +0.0.

        Raises:
            ValueError: As the constructor does.
        """
        before = self.masks
        restored = {name: torch.ones_like(m) for name, m in before.items() if name not in masks}
        masks = {**restored, **masks}
        self._check(masks)
        for name, entries in (zero or {}).items():
            local(self._parameters[name]).masked_fill_(part(entries, self._parameters[name]), 0)
        self._set(masks)

    def set_rates(self, factors: Mapping[str, float]) -> None:
        """Multiply the learning rate of the named tensors by their factor from the next step on; 1.0 for all others.

        Raises:
            ValueError: If an optimizer of a single param group is given different factors.
        """
        factors = {name: factor for name, factor in factors.items() if factor != 1.0}
        if factors == self._factors:
            return
        self._factors = factors
        self._apply_rates()

    def _apply_rates(self) -> None:
        by_tensor = {self._in_optimizer(name): factor for name, factor in self._factors.items()}
        if by_tensor and not self._rates:
            self._rates = [RateFactors(optimizer, by_tensor) for optimizer in self.optimizers]
        for rate in self._rates:
            rate.change(by_tensor) if by_tensor else rate.remove()
        self._rates = self._rates if by_tensor else []

    def _in_optimizer(self, name: str) -> Tensor:
        """The tensor that stands for a parameter in its optimizer."""
        return self._compact[name].values if name in self._compact else self._parameters[name]

    def names(self) -> list[list[str]]:
        """Return, for each optimizer, the names of the parameters it holds in the order of its groups; "" without one."""
        name_of = {id(self._in_optimizer(name)): name for name in self._parameters}
        own = {id(rate.optimizer): rate.groups for rate in self._rates}
        groups = [own.get(id(optimizer), optimizer.param_groups) for optimizer in self.optimizers]
        return [[name_of.get(id(p), "") for group in each for p in group["params"]] for each in groups]

    @property
    def compact(self) -> MaskSet:
        """The masks of the tensors of which the optimizer holds the active entries alone; save it beside its state."""
        return MaskSet({name: self.masks[name] for name in self._compact})

    def whole_state(self, name: str) -> dict[str, Any]:
        """Return the optimizer's state of a compact tensor's active entries, of all ranks; empty for any other tensor."""
        return self._compact[name].whole_state(self.masks[name]) if name in self._compact else {}

    def summary(self) -> list[Row]:
        """Return one row for each parameter of the model, in its order."""
        return [self._row(name, p) for name, p in self._parameters.items()]

    def active_entries(self) -> dict[Tensor, Tensor]:
        """Return the flat indices, sorted, of the active entries of each parameter that trains in small part.

        Those of a tensor that is mostly active would take more memory than they save.
        """
        entries: dict[Tensor, Tensor] = {}
        for name, mask in self.masks.items():
            parameter = self._parameters[name]
            if name in self._compact:
                entries[parameter] = self._compact[name].slots.entries()
            elif 0 < active(mask) <= BREAK_EVEN * mask.numel():
                entries[parameter] = Slots(mask.to(parameter.device)).index
        return entries

    def ages(self) -> dict[str, list[list[Any]]]:
        """Return, by tensor, the entries whose step count differs from the tensor's; save it beside the optimizer's state.

        Entries that become active start from zero moments and count their own steps, where the optimizer is Adam, AdamW
        or Adamax (NAdam and RAdam go by the tensor's count).
        """
        return {name: ages.state() for name, ages in self._ages.items() if ages.cohorts}

    def remarks(self) -> list[str]:
        """Return, one line each, why tensors of which some entries are active are not held as ``engine`` says."""
        by_reason: dict[str, list[str]] = {}
        for name in self._holders if self._way == "compact" else []:
            if active(self.masks[name]):
                by_reason.setdefault(self._refused.get(name, "most of its entries are active"), []).append(name)
        return [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: dense, as {reason}"
            for reason, names in by_reason.items()
        ]

    @torch.no_grad()
    def settle(self) -> None:
        """Make the model's own weights exact, in the middle of a step too, without ending the step."""
        for compact in self._compact.values():
            if compact.ahead:
                compact.write()
                compact.ahead = True  # the step is not over
        self._write_held(self._parameters)

    def correct(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Make the held entries of a ``state_dict`` exact, whatever the moment it was taken in.

        Entries are replaced, not written to, so that tensors shared with the live model stay untouched.
        """
        for name, compact in self._compact.items():
            for alias in self._aliases[name] if compact.ahead else []:
                if prefix + alias in state_dict:
                    value = state_dict[prefix + alias]
                    state_dict[prefix + alias] = compact.slots.scatter_(compact.values.detach(), value.detach().clone())
        for name, holder in (self._holders | self._whole).items():
            for alias in self._aliases[name]:
                value = state_dict.get(prefix + alias)
                if isinstance(value, Tensor) and value.shape == self._parameters[name].shape:
                    state_dict[prefix + alias] = self._exact(name, holder, value.detach())
        self.behind.correct(state_dict, prefix, self._aliases)

    @torch.no_grad()
    def rewind(self, weights: Mapping[str, Tensor]) -> None:
        """Set every active entry to its value in ``weights``, by parameter name, and start its moments afresh."""
        for name, value in weights.items():
            parameter = self._parameters[name]
            if name in self._held:
                continue
            mine, value = local(parameter), part(value, parameter)
            mask = part(self.masks[name], parameter) if name in self.masks else torch.ones_like(mine, dtype=torch.bool)
            mine.copy_(torch.where(mask, value, mine))
            for owner in self._owners.get(id(parameter), []):
                reset_state(owner, self._in_optimizer(name))
            self._ages.pop(name, None)

    @torch.no_grad()
    def restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers, by name, what is held too, and start the state of every optimizer afresh.

        The masks stay; what is held is held at its new value.
        """
        mine: dict[str, Tensor] = {**self._parameters, **dict(self.model.named_buffers())}
        for name, value in tensors.items():
            local(mine[name]).copy_(part(value, mine[name]))
        for optimizer in self.optimizers:
            reset_all(optimizer)
        self._ages.clear()
        self._norms.hold(set())  # with what it kept
        self._set(self.masks)

    @torch.no_grad()
    def restore(self) -> None:
        """Write every held value back, as is done after each step; with ``guard`` what is held whole and statistics too."""
        self.behind.close()
        self._write_held(self._parameters)
        self._norms.restore()

    @torch.no_grad()
    def write_held(self, model: nn.Module) -> None:
        """Write every held value into ``model``, which has parameters of the same names (an average, say)."""
        self._write_held(dict(model.named_parameters()))

    def _write_held(self, parameters: Mapping[str, Tensor]) -> None:
        for name, holder in (self._holders | self._whole).items():
            tensor = local(parameters[name])
            tensor.copy_(self._exact(name, holder, tensor))

    def release(self) -> None:
        """Take away every hook and give each parameter the ``requires_grad`` it came with."""
        for handle in self._handles:
            handle.remove()
        for rate in self._rates:
            rate.remove()
        for compact in self._compact.values():
            compact.remove()
        self.behind.drop()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(self._required[name])
        self._norms.hold(set())
        self._handles, self._rates, self._holders, self._whole, self._compact = [], [], {}, {}, {}

    def _exact(self, name: str, holder: Holder, value: Tensor) -> Tensor:
        """A copy of ``value`` with the held entries of the parameter of that name; of this rank's part."""
        parameter = local(self._parameters[name])
        exact = value.to(parameter.device, parameter.dtype, copy=True).contiguous()
        holder.restore(exact)
        if value.dtype != parameter.dtype:  # somebody keeps it in another precision
            mask = part(self.masks[name], self._parameters[name])
            exact = torch.where(mask, value.to(parameter.device), exact.to(value.dtype))
        return exact.to(value.device)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take over what others wrote to the weights, at the last moment: after the closure, where there is one."""

        def read() -> None:
            self.behind.open(optimizer)
            for compact in self._compact.values():
                if compact.optimizer is optimizer:
                    compact.read()
            for name, ages in self._ages_of(optimizer):
                ages.before_step(local(self._parameters[name]), self._step_of(optimizer, name))

        def wrap(closure: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                result = closure()
                read()
                return result

            return run

        wrapped = wrap_closure(args, kwargs, wrap)
        if wrapped is None:
            read()
        return wrapped

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for compact in self._compact.values():
            if compact.optimizer is optimizer:
                compact.write()
        for name, holder in self._holders.items():
            parameter = self._parameters[name]
            if any(owner is optimizer for owner in self._owners.get(id(parameter), [])):
                holder.restore(local(parameter))
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]} if self._ages else {}
        for name, ages in self._ages_of(optimizer):
            group, step = groups[id(self._in_optimizer(name))], self._step_of(optimizer, name)
            with torch.no_grad():
                ages.after_step(local(self._parameters[name]), step, group, optimizer)
        self.behind.close(optimizer)

    def _ages_of(self, optimizer: Optimizer) -> list[tuple[str, Ages]]:
        return [
            (name, ages)
            for name, ages in self._ages.items()
            if ages.cohorts and self._owners[id(self._parameters[name])][0] is optimizer
        ]

    def _step_of(self, optimizer: Optimizer, name: str) -> int:
        return int(optimizer.state.get(self._in_optimizer(name), {}).get("step", 0))

    @torch.no_grad()
    def _set(self, masks: Mapping[str, Tensor]) -> None:
        self._check(masks)
        changed = MaskSet({name: shard(mask, self._parameters[name]) for name, mask in masks.items()})
        for name, mask in changed.items():
            parameter, count = self._parameters[name], active(mask)
            then = self.masks.get(name)
            if then is not None and mask is not then and not equal(mask, then):
                if name in self._compact and not self._change(name, part(mask, parameter), count):
                    self._compact.pop(name).remove()
                self._start_afresh(name, then, mask)
            self._holders.pop(name, None)
            self._whole.pop(name, None)
            self._refused.pop(name, None)
            self._held.discard(name)
            owners = self._owners.get(id(parameter), [])
            trains = count > 0 or (parameter.numel() == 0 and self._required[name])
            if trains and not parameter.requires_grad:
                parameter.requires_grad_(True)
            elif not trains and parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
            mine = part(mask, parameter)
            if name in self._ages:
                self._ages[name].keep(mine)
            if not trains:
                self._held.add(name)
                for owner in owners:
                    reset_state(owner, parameter)
            partly = 0 < count < parameter.numel()
            if name in self._stored and not equal(mask, self._stored[name]):
                self._widen(name)
            if partly:
                self._hold(name, mine, count)
            elif not trains and any(moves_without_gradient(owner) for owner in owners):
                self._holders[name] = self._holder(parameter, mine, count)
            if self._guard and name not in self._holders and (partly or not trains):
                self._whole[name] = self._holder(parameter, mine, count)
            for owner in owners if trains else []:
                begin_state(owner, self._in_optimizer(name))
        self.masks = changed
        self._stored = {}
        self._norms.hold({name for name, mask in changed.items() if active(mask) == 0 and mask.numel()})
        if self._rates:
            self._apply_rates()

    def _holder(self, parameter: Tensor, mask: Tensor, count: int) -> Holder:
        """Hold this rank's part; ``count`` is of the whole tensor."""
        return make_holder(local(parameter), mask, active(mask) if is_sharded(parameter) else count)

    def _hold(self, name: str, mask: Tensor, count: int) -> None:
        """Hold a tensor of which some entries are active: ``count`` of all, ``mask`` of this rank's part."""
        if name in self._compact:  # its mask did not change, or it serves the new one
            return
        parameter, owners = self._parameters[name], self._owners[id(self._parameters[name])]
        if self._way == "compact" and count <= BREAK_EVEN * parameter.numel():
            reason = servable(owners[0], parameter) if len(owners) == 1 else "several optimizers hold it"
            if getattr(self.model.get_submodule(name.rpartition(".")[0]), "max_norm", None) is not None:
                reason = "its Embedding writes to it (max_norm)"
            early = self._early and not offloaded(parameter)  # a gradient on its way to the CPU is not there yet
            by_lines = reason is None and early and not is_sharded(parameter)
            module, lines = self._lines(name, mask) if by_lines else (None, None)
            slots = lines or Slots(mask) if reason is None else None
            if slots is not None and totals([slots.size], parameter)[0] <= BREAK_EVEN * parameter.numel():
                state = owners[0].state.get(parameter, {})
                if name in self._stored and not is_compact(state, parameter, slots):
                    self._widen(name)
                self._compact[name] = Compact(name, parameter, slots, owners[0], early, module)
                return
            self._refused[name] = reason or "it is too small to gain by anything else"
        if name in self._stored:
            self._widen(name)
        self._holders[name] = self._holder(parameter, mask, count)

    def _change(self, name: str, mask: Tensor, count: int) -> bool:
        """Let a compact tensor train other entries, where it is compact in the same way; return whether it is."""
        parameter = self._parameters[name]
        most = BREAK_EVEN * parameter.numel()
        if not 0 < count <= most:
            return False
        found = None if is_sharded(parameter) else whole_lines(mask)
        slots = Slots(mask) if found is None else Lines(mask.shape, *found)
        return totals([slots.size], parameter)[0] <= most and self._compact[name].change(slots)

    @contextmanager
    def whole_gradients(self) -> Iterator[None]:
        """For a criterion: in the meantime, backward makes the gradient of every entry, not of active ones alone."""
        taking: list[Any] = [each for c in self._compact.values() for each in (c, c.lines) if each is not None]
        for each in taking:
            each.paused = True
        try:
            yield
        finally:
            for each in taking:
                each.paused = False

    def _lines(self, name: str, mask: Tensor) -> tuple[nn.Module | None, Lines | None]:
        """The module of a weight of which backward can compute the active part alone, and the lines if it is lines."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        alone = len(self._aliases[name]) == 1 and mask.numel() >= LINES_FROM
        found = whole_lines(mask) if alone else None
        if found is not None and supports(module, attribute, found[0]):
            return module, Lines(mask.shape, *found)
        scattered = alone and isinstance(module, nn.Embedding) and supports(module, attribute, 0)
        return module if scattered else None, None

    def _widen(self, name: str) -> None:
        """Make an optimizer's state dense that a checkpoint brought for the active entries of a compact tensor."""
        parameter = self._parameters[name]
        mask = part(self._stored.pop(name), parameter)
        lines = whole_lines(mask)
        kinds: list[Slots | Lines] = [Slots(mask), *([] if lines is None else [Lines(mask.shape, *lines)])]
        for slots in kinds:
            for owner in self._owners.get(id(parameter), []):
                widen_state(owner, parameter, slots)

    def _check(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise ValueError(f"There is a mask for {name!r}, which is no parameter of {type(self.model).__name__}.")
            if mask.shape != parameter.shape:
                raise ValueError(
                    f"{name}: the mask has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}."
                )
            trains = active(mask) > 0
            if trains and id(parameter) not in self._owners:
                raise ValueError(
                    f"{name} is to train, and no optimizer holds it; hand it to the optimizer in configure_optimizers, "
                    "or leave it out of the selection."
                )
            if trains and not (parameter.is_floating_point() or parameter.is_complex()):
                raise ValueError(f"{name} is to train, and its dtype {parameter.dtype} has no gradient.")

    def _start_afresh(self, name: str, before: Tensor, after: Tensor) -> None:
        parameter = self._parameters[name]
        owners = self._owners.get(id(parameter), [])
        if not owners or active(before) == before.numel():
            return
        ages, mask = self._ages.get(name, Ages(like=parameter)), part(after, parameter)
        ages.keep(mask)
        new = None if active(before) == 0 else mask & ~part(before, parameter)
        joining = 0 if new is None else totals([int(new.count_nonzero())], parameter)[0]
        if new is None or (joining and name not in self._compact):  # a compact one has left out what joins
            for owner in owners:
                reset_state(owner, parameter, new)
        state = owners[0].state.get(self._in_optimizer(name), {})
        if new is None or not state or len(owners) > 1 or not corrects_bias(owners[0]):
            self._ages.pop(name, None)
            return
        if joining:
            step = ages.join(new, mask, int(state["step"]))
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), step)
        self._ages[name] = ages

    def _row(self, name: str, parameter: nn.Parameter) -> Row:
        n = parameter.numel()
        count = active(self.masks[name]) if name in self.masks else n * parameter.requires_grad
        whole = "requires_grad" if count == 0 and n else "-"
        compact = self._compact.get(name)
        part = "dense" if compact is None else "compact"
        if compact is not None and isinstance(compact.slots, Lines):
            part = "columns" if compact.slots.dim else "rows"
        held_by = part if 0 < count < n and name in self.masks else whole
        return Row(name, tuple(parameter.shape), count, count / n if n else 0.0, held_by)


def check_engine(engine: str) -> None:
    """Refuse a way of holding that does not exist.

    Raises:
        ValueError: Naming those that do.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; there are {', '.join(ENGINES)}.")
