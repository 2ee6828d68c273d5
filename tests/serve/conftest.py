"""The server that the files of this folder ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import serving


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    """The address of a server with four rows, one for each file of tests."""
    with serving(model_folder, "--rows", "4") as (found, _):
        yield found
