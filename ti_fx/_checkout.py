"""A checkout needs two links: the folders ``passes/`` and ``export/`` are ``ti_fx.passes`` and ``ti_fx.export``.

In a checkout, two committed symbolic links (``ti_fx/passes -> ../passes``) make that so. An installed copy
needs none.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

LINKED_PACKAGES = ("passes", "export")


def check_checkout() -> None:
    """Say what to do where ti_fx is imported from a checkout whose links came out as small text files.

    Git writes them so with ``core.symlinks=false``, its default on Windows. Installing such a checkout works.

    Raises:
        ImportError: a link is a text file and nothing else provides the package.
    """
    folder = Path(__file__).parent
    for name in LINKED_PACKAGES:
        if (folder / name).is_file() and find_spec(f"ti_fx.{name}") is None:
            raise ImportError(
                f"{folder / name} is a text file where a symbolic link belongs (git's core.symlinks=false); "
                "install the checkout with `pip install -e .`, or, where links are allowed, run "
                "`git config core.symlinks true && rm ti_fx/passes ti_fx/export && git checkout -- ti_fx`"
            )
