"""What the doctests of looptools find in their namespace."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _doctest_names(request: pytest.FixtureRequest) -> None:
    """Examples may say `lt`, `torch`, `State` and `folder` (an empty one) without importing them."""
    if "doctest_namespace" not in request.fixturenames and not request.node.__class__.__name__.startswith("Doctest"):
        return
    import torch

    import looptools as lt

    namespace = request.getfixturevalue("doctest_namespace")
    tmp_path: Path = request.getfixturevalue("tmp_path")
    namespace.update(lt=lt, torch=torch, State=lt.State, folder=tmp_path)
