"""The command ``lightning-mask``: its subcommands, version, shell completion, and what becomes of an error."""

import os
from typing import Any

import click
from click.shell_completion import get_completion_class

import lightning_mask
from lightning_mask.app.cli.deltas import delta
from lightning_mask.app.cli.masks import mask
from lightning_mask.app.cli.reports import report
from lightning_mask.app.cli.words import PROGRAMS

NAME = "lightning-mask"
_COMPLETE = "_LIGHTNING_MASK_COMPLETE"


class _Program(click.Group):
    """A group whose commands tell bad input in one line: exit code 2; 1 where the program failed at work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of the work."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            from lightning_mask.app import errors

            if os.environ.get(errors.FULL) == "1" or not errors.is_about_input(error):
                raise
            errors.stop(error)


def _show_version(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        click.echo(f"{NAME} {lightning_mask.__version__}")
        ctx.exit()


def _show_completion(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell is not None:
        kind = get_completion_class(shell)
        assert kind is not None
        click.echo(kind(program, {}, NAME, _COMPLETE).source())
        ctx.exit()


@click.group(NAME, cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, callback=_show_version, expose_value=False, is_eager=True, help="Print the version."
)
@click.option(
    "--show-completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    callback=_show_completion,
    expose_value=False,
    is_eager=True,
    help="Print what makes the shell complete commands, options, files and Hydra's words.",
)
def program() -> None:
    """Fine-tune, prune and unfreeze a network by mask, and work with what a run leaves behind.

    \b
    From a model to a page and a small file:
      lightning-mask train mask=fisher mask.density=0.01     train 1 % of the entries
      lightning-mask report logs/train/runs/<run>            what was held, and what came of it
      lightning-mask mask show logs/train/runs/<run>/masks.safetensors
      lightning-mask delta apply base/ delta.safetensors     the tuned model, from the entries that changed

    train, compare, prune and export take Hydra's words: group=name chooses, key=value sets.

    \b
    Exit codes: 0 well; 1 the program failed; 2 bad input, which one line on standard error names.
    HYDRA_FULL_ERROR=1 shows the traceback of an error.

    \b
    Completion, once for all shells to come:
      bash   echo 'eval "$(lightning-mask --show-completion bash)"' >> ~/.bashrc
      zsh    echo 'eval "$(lightning-mask --show-completion zsh)"' >> ~/.zshrc
      fish   lightning-mask --show-completion fish > ~/.config/fish/completions/lightning-mask.fish
    """


for command in (*PROGRAMS, report, delta, mask):
    program.add_command(command)


def main() -> None:
    """Run the command line."""
    program(prog_name=NAME, complete_var=_COMPLETE)
