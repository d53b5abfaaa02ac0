"""The console command ``lightning-mask``: a thin face of the functions below; only what a subcommand needs is imported."""

from lightning_mask.app.cli.program import main

__all__ = ["main"]
