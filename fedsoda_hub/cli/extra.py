"""Say which extra fedsoda-hub needs where only the edge was installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from fedsoda_edge.errors import UsageProblem, WayOut

NEEDS = ("starlette", "uvicorn", "matplotlib", "scipy")  # what the extra `hub` brings


class ExtraMissing(UsageProblem):
    """An installation without the packages of the extra `hub`."""

    def way_out(self) -> WayOut:
        from fedsoda_edge.ports.installer import found

        return WayOut("fix-machine", found().extra.format(extra="hub"))


def is_only_asked_about() -> bool:
    """Tell whether the command line asks what there is, which needs no package."""
    return len(sys.argv) < 2 or any(word in ("--help", "--schema") for word in sys.argv[1:])


def check_extra() -> None:
    """Do nothing where the extra `hub` is installed, or nothing is to be done.

    Raises:
        ExtraMissing: it is not.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing and not is_only_asked_about():
        from fedsoda_edge.ports.installer import found

        raise ExtraMissing(
            f"fedsoda-hub needs fedsoda[hub], and {', '.join(missing)} of it {'is' if len(missing) == 1 else 'are'} not "
            f"installed here; install it: {found().extra.format(extra='hub')}"
        )
