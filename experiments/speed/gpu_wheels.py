"""Prints the packages that gpu.py needs beside torch, with all they need, in the versions installed here.

pip download --no-deps -d wheels $(python experiments/speed/gpu_wheels.py [trl datasets])
pip install --no-deps wheels/*.whl    # there; its torch stays as it is
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NEEDED = ("transformers", "peft", "pillow", "jinja2")


def closure(names: Iterable[str]) -> dict[str, str]:
    """The version of each package that these need, themselves included; without torch, and what only it needs."""
    found: dict[str, str] = {}
    left = [*names]
    while left:
        name = canonicalize_name(left.pop())
        if name == "torch" or name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError as error:
            raise SystemExit(f"{name} is not installed here, so its version is not known") from error
        found[name] = package.version
        needed = [Requirement(line) for line in package.requires or ()]
        left += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in sorted(closure([*NEEDED, *sys.argv[1:]]).items())))
