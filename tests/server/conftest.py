"""Servers to ask: the real command in processes of their own, on the tiny random bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from server_process import Serve, Served, served


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that do not change it, with the defaults and no keys."""
    folder = tmp_path_factory.mktemp("server")
    with served(bundle, folder) as it:
        yield it


@pytest.fixture
def serve(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A factory: `serve("--running", 1)` is a server of its own that is ready."""
    with ExitStack() as servers:

        def start(*flags: object, env: dict[str, str] | None = None, key: str = "") -> Served:
            folder = tmp_path_factory.mktemp("serve")
            return servers.enter_context(served(bundle, folder, *flags, env=env, key=key))

        yield start
