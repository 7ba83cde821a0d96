"""What the integration tests share: what they try reaches no network, and tells nobody that it was used."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

os.environ |= {
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LANGSMITH_TRACING": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}

LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections to other machines, and fail where one was tried, even if its error was swallowed."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        away = self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL
        if away and self.type & socket.SOCK_STREAM:
            tried.append(address)
            raise ConnectionRefusedError(f"{address} is not this machine")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
    assert tried == []
