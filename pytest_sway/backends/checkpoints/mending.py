"""The command that mends an adapter's file where only some of its tensors' names have a part too many."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__tracebackhide__ = True

_CODE: Final = (
    "import re, sys; from safetensors.torch import load_file, save_file; part, path = sys.argv[1:]; "
    'save_file({re.sub(part, "", name): tensor.clone() for name, tensor in load_file(path).items()}, path, '
    '{"format": "pt"})'
)
"""It copies the tensors, since `load_file` maps the file that is then written."""
_PREFIX: Final = "base_model."
"""How all names begin that PEFT gives to the tensors of modules."""


def mending(path: Path, names: Collection[str], part: str) -> str:
    """Return a clause with a command that takes a part out of the names in a file; empty if it would not mend the file.

    Args:
        path: The file.
        names: The names of its tensors.
        part: A regular expression that matches the part.
    """
    mended = {re.sub(part, "", name) for name in names}
    if path.suffix != ".safetensors" or len(mended) < len(names):
        return ""
    if not all(name.startswith(_PREFIX) for name in mended):
        return ""
    return f" Or mend this file: python -c {' '.join(map(shlex.quote, (_CODE, part, str(path))))}"
