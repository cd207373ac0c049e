"""Counts of a server, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

_PATHS = frozenset({"/v1/chat/completions", "/v1/models", "/health", "/metrics"})


class Metrics:
    """What was asked and answered since the start. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0
        self._tokens: Counter[str] = Counter()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that ended.

        Args:
            path: Of its URL.
            status: Of its answer; 0 if the client left before one.
            seconds: That it took.
        """
        with self._lock:
            self._requests[path if path in _PATHS else "other", status] += 1
            self._seconds += seconds

    def count_tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens of a request."""
        with self._lock:
            self._tokens["prompt"] += prompt
            self._tokens["completion"] += completion

    def text(self, *, running: int, waiting: int) -> str:
        """Everything, with what is at work now.

        Args:
            running: Answers that are computed.
            waiting: Answers that wait.

        Returns:
            Prometheus' exposition format 0.0.4.
        """
        with self._lock:
            lines = ["# TYPE llavar_requests_total counter"]
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'llavar_requests_total{{path="{path}",status="{status}"}} {count}')
            lines += [
                "# TYPE llavar_request_seconds_total counter",
                f"llavar_request_seconds_total {self._seconds:.6f}",
            ]
            lines.append("# TYPE llavar_tokens_total counter")
            lines += [f'llavar_tokens_total{{kind="{kind}"}} {self._tokens[kind]}' for kind in ("prompt", "completion")]
        lines += ["# TYPE llavar_answers gauge"]
        lines += [
            f'llavar_answers{{state="{state}"}} {count}'
            for state, count in (("running", running), ("waiting", waiting))
        ]
        return "\n".join(lines) + "\n"
