"""``train``, ``compare``, ``prune`` and ``export``: what takes Hydra's words, and how a shell completes them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

_DOES = {
    "train": "Train a network by mask.",
    "compare": "Compare ways of choosing a mask.",
    "packnet": "Train several tasks in one network, each in what the earlier ones left free.",
    "prune": "Prune a network without training.",
    "export": "Write the network of a run for use elsewhere.",
}


class _Words(click.Argument):
    """The words of a Hydra application: all that follows, its own --help, too."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the word that is being typed; bash cuts it at the sign, and wants what follows alone."""
        assert ctx.info_name is not None
        before = [*(ctx.params.get(self.name or "") or ()), incomplete]
        cut = before.index("=", -2) if "=" in before[-2:] and len(before) > 1 else None
        if cut is None:
            return [CompletionItem(word) for word in completions(ctx.info_name, incomplete)]
        group, value = before[cut - 1], "".join(before[cut + 1 :])
        return [CompletionItem(word.partition("=")[2]) for word in completions(ctx.info_name, f"{group}={value}")]


def completions(name: str, start: str) -> list[str]:
    """Return the words of a Hydra application that begin so: of one group its options, of one key its default.

    Args:
        name: Of the root config.
        start: What was typed of the word.

    Example:
        >>> completions("train", "trainer=ddp"), completions("train", "s"), completions("train", "see")
        (['trainer=ddp', 'trainer=ddp_cpu'], ['scheduler=', 'seed=', 'sweep='], ['seed=0'])
    """
    from importlib.resources import files

    import yaml

    configs = Path(str(files("lightning_mask.conf")))
    root: dict[str, Any] = yaml.safe_load((configs / f"{name}.yaml").read_text(encoding="utf-8"))
    parts = [group for entry in root.pop("defaults") if isinstance(entry, dict) for group in entry]
    groups = [group for group in parts if not group.startswith("optional ") and group not in ("hydra", "paths")]
    heads = [
        head for head in (f"{word}=" for word in (*groups, *root)) if head.startswith(start) or start.startswith(head)
    ]
    if len(heads) != 1:
        return sorted(heads)
    key = heads[0].removesuffix("=")
    if key in groups:
        words = [f"{key}={file.stem}" for file in (configs / key).glob("*.yaml")]
    else:
        words = (
            [f"{key}={'null' if root[key] is None else root[key]}"] if isinstance(root[key], int | str | None) else []
        )
    return sorted(word for word in words if word.startswith(start))


def _program(name: str, does: str) -> click.Command:
    def run(words: tuple[str, ...]) -> None:
        import_module(f"lightning_mask.app.{name}").main(words)

    run.__doc__ = does
    # --help is Hydra's: it lists the groups and their options.
    settings: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    return click.Command(
        name,
        callback=run,
        params=[_Words(["words"], nargs=-1, type=click.UNPROCESSED)],
        help=does,
        add_help_option=False,
        context_settings=settings,
    )


PROGRAMS = [_program(name, does) for name, does in _DOES.items()]
