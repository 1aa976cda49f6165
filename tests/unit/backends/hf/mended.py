"""Runs the command that an error names to mend an adapter's file."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from pathlib import Path


def run_command_in(error: BaseException, *, in_a_shell: bool = False) -> None:
    """Run the command at the end of an error's text.

    Args:
        error: The error.
        in_a_shell: Whether a shell runs it, with this Python and no packages. Otherwise it runs in this process, which
            takes no time.
    """
    command = r" Or (?:mend this file|make a mended safetensors file of it): python (-c .+)$"
    found = re.search(command, str(error), re.DOTALL)
    assert found is not None, f"there is no command in: {error}"
    if in_a_shell:
        subprocess.run(["/bin/sh", "-c", f"{shlex.quote(sys.executable)} -I -S {found[1]}"], check=True)
        return
    option, code, *args = shlex.split(found[1])
    with patch.object(sys, "argv", [option, *args]):
        exec(code, {})


def tensors_of(adapter: Path) -> dict[str, list[float]]:
    """Return the names and values of an adapter's tensors."""
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
