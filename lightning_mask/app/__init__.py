"""The Hydra application: from a command line to a finished run."""
