"""Optional packages: the core reads, plans and audits without them; an extra installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from fedslm.errors import MissingPackage

EXTRAS = {
    "bitsandbytes": "train",
    "datasets": "train",
    "flwr": "train",
    "matplotlib": "plots",
    "opacus": "train",
    "peft": "train",
    "prometheus_client": "train",
    "pyarrow": "train",
    "sqlalchemy": "train",
    "torch": "train",
    "transformers": "train",
}
"""Package to the extra that installs it; ``train`` includes ``plots``."""


def is_installed(package: str) -> bool:
    """Whether a package is installed; it is not imported.

    >>> is_installed("numpy"), is_installed("no_such_package")
    (True, False)
    """
    return find_spec(package) is not None


def is_trainable() -> bool:
    """Whether everything that training and reading data need is installed."""
    return all(is_installed(package) for package, extra in EXTRAS.items() if extra == "train")


def missing(package: str, what: str = "this command") -> MissingPackage:
    """Returns the error that says which extra installs a package.

    >>> print(missing("torch"))
    this command needs fedslm[train] (torch is not installed): pip install "fedslm[train]"
    """
    extra = f"fedslm[{EXTRAS[package]}]"
    return MissingPackage(f'{what} needs {extra} ({package} is not installed): pip install "{extra}"')


@contextmanager
def explained() -> Iterator[None]:
    """Replaces the import error of an optional package that is not installed.

    Raises:
        MissingPackage: An import in the block failed because such a package is not installed. Import
            errors of installed packages, and of other packages, pass unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS or is_installed(package):
            raise
        raise missing(package) from error
