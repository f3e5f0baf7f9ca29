"""Shared by all tests: one real 2-rank mesh per session, since a start costs eight seconds."""

import os

import pytest

# Ranks and test processes share two cores: more threads than cores make everything slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def mesh():
    """A Generator over two ranks with the demo model."""
    from framemesh import Generator

    with Generator.from_pretrained("demo", num_gpus=2) as generator:
        yield generator
