"""Talking to a vLLM server in its own words: JSON over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


class Lost(ConnectionError):
    """The server does not answer, or says that it cannot."""


def call(url: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
    """One request; POST with a body, else GET.

    Args:
        url: of the server, `http://host:port`.
        path: on it.
        body: sent as JSON.
        timeout_s: for each wait.

    Returns:
        The JSON that it answers, or None if it answers something else, or nothing.

    Raises:
        Lost: no connection, no answer in time, or a status of 500 and above.
        ValueError: the server refuses the request.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Lost(f"{url}{path}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status >= 400:
        told = f"{url}{path}: {answer.status} {content[:300].decode(errors='replace')}"
        raise Lost(told) if answer.status >= 500 else ValueError(f"rollout: {told}")
    kind = answer.getheader("Content-Type") or ""
    return json.loads(content) if content and kind.startswith("application/json") else None
