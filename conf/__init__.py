"""The Hydra configs as a package, `lightning_mask.conf`, so that `hydra.searchpath=[pkg://lightning_mask.conf]` finds them."""
