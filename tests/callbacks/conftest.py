from tests.quiet import quiet_and_apart

__all__ = ["quiet_and_apart"]
