"""Copying: to the system's clipboard where a tool for it is here, and by the terminal's own way."""

from __future__ import annotations

import re
import shutil
import subprocess

_TOOLS = (["pbcopy"], ["wl-copy"], ["xclip", "-selection", "clipboard"])
_SECONDS = 2.0
# Nothing is given back once it is taken (`+` behind a quantity): a line of 100,000 marks would take
# minutes.
_FENCED = re.compile(r"^ {0,3}(`{3,}+|~{3,}+)[^\n]*+\n(.*?)(?:^ {0,3}\1[`~]*+[ \t]*+$|\Z)", re.MULTILINE | re.DOTALL)


def copy_with_tool(text: str) -> bool:
    """Copy with the first of pbcopy, wl-copy and xclip that works; return whether one did."""
    for command in _TOOLS:
        if shutil.which(command[0]):
            try:
                done = subprocess.run(
                    command,
                    input=text.encode("utf-8", "replace"),
                    timeout=_SECONDS,
                    check=False,
                    # xclip stays in the background with whatever it was given
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                return True
    return False


def code_blocks(text: str) -> list[str]:
    """The fenced code blocks of an answer, in order; one that was broken off counts."""
    return [match[2].removesuffix("\n") for match in _FENCED.finditer(text)]
