"""A network namespace of its own for a test, entered by the test itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rstguard.lab.namespace import own_network


@pytest.fixture
def own_namespace() -> Iterator[None]:
    """Run the test in an empty network namespace, which ends with it and all it holds."""
    with own_network():
        yield
