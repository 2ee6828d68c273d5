"""Figures for Prometheus: requests by path and status, tokens, and the times that clients feel."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m7mlx import Piece, Request
from m7mlx.embedding import Pooling
from m7mlx.errors import BusyError, InputError
from m7mlx_serve.engine import Engine
from m7mlx_serve.models import Models

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)

_NAMED = ("/v1/models/", "/v1/responses/")  # paths behind which a name or an id follows


class Metrics:
    """Counters of one server. They know counts and times, and nothing of what was asked.

    How much of a prompt was held already is not among them: clients may read the figures, and could
    find out how other clients' conversations begin.
    """

    def __init__(self, models: Models) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "m7mlx_requests", "Requests by path and status", ("path", "status"), registry=registry
        )
        tokens = Counter(
            "m7mlx_tokens",
            "Tokens of prompts, generated, and embedded",
            ("kind",),
            registry=registry,
        )
        self._prompt, self._generated, self._embedded = map(tokens.labels, ("prompt", "generated", "embedded"))
        reasons = ("stop", "length", "cancelled", "failed", "left", "refused")
        ended = Counter("m7mlx_answers", "Answers by how they ended", ("reason",), registry=registry)
        self._ended = {reason: ended.labels(reason) for reason in reasons}
        self._first = _histogram(registry, "time_to_first_token", "From the request to its first token", _SECONDS)
        self._each = _histogram(registry, "time_per_output_token", "Of an answer, without its first", _TOKEN_SECONDS)
        self._whole = _histogram(registry, "request_duration", "Of answers, from the request on", _SECONDS)
        for name, about, function in (
            ("open_requests", "Requests that have not ended", lambda: models.open_requests),
            ("requests_running", "Requests that are read or answered", lambda: models.running),
            (
                "requests_waiting",
                "Requests that wait for a place",
                lambda: max(0, models.open_requests - models.running),
            ),
            (
                "prefix_files",
                "Ended conversations on disk",
                lambda: max((f.files for f in models.prefixes), default=0),
            ),
            ("prefix_bytes", "Bytes of these", lambda: max((f.nbytes for f in models.prefixes), default=0)),
            ("prefixes_saved", "Conversations saved", lambda: sum(f.saved for f in models.prefixes)),
            ("prefix_hits", "Conversations that came back from disk", lambda: sum(f.hits for f in models.prefixes)),
            (
                "prefix_evictions",
                "Conversations that left a full folder",
                lambda: sum(f.evicted for f in models.prefixes),
            ),
            ("models_loaded", "Models that are loaded", lambda: len(models.loaded)),
        ):
            Gauge(f"m7mlx_{name}", about, registry=registry).set_function(function)

    def text(self) -> bytes:
        """The figures in Prometheus' format."""
        return generate_latest(self._registry)

    async def ask(
        self,
        engine: Engine,
        requests: Sequence[Request],
        seconds: float,
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield what `Engine.ask` yields, and measure it.

        An answer whose client leaves counts as far as it came.
        """
        answers = [_Measured(time.perf_counter(), len(request.ids)) for request in requests]
        try:
            async with aclosing(engine.ask(requests, seconds)) as pieces:
                async for index, piece in pieces:
                    self._seen(answers[index], piece)
                    yield index, piece
        except (BusyError, InputError):
            for answer in answers:
                answer.reason = "refused"
            raise
        finally:
            for answer in answers:
                self._ends(answer)

    async def embed(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        pooling: Pooling,
        normalize: bool,
        seconds: float,
    ) -> list[bytes]:
        """What `Engine.embed` gives, measured."""
        found = await engine.embed(prompts, pooling, normalize, seconds)
        self._embedded.inc(sum(map(len, prompts)))
        return found

    def _seen(self, answer: _Measured, piece: Piece) -> None:
        answer.generated += len(piece.ids)
        if piece.ids and not answer.first:
            answer.first = time.perf_counter()
            self._first.observe(answer.first - answer.began)
            self._prompt.inc(answer.prompt)
        if piece.finish_reason is not None:
            answer.reason = piece.finish_reason

    def _ends(self, answer: _Measured) -> None:
        now = time.perf_counter()
        self._generated.inc(answer.generated)
        self._ended[answer.reason].inc()
        if answer.first:
            self._whole.observe(now - answer.began)
        if answer.generated > 1:
            self._each.observe((now - answer.first) / (answer.generated - 1))


@dataclass
class _Measured:
    """One answer so far; times are those of time.perf_counter."""

    began: float
    prompt: int
    first: float = 0.0
    generated: int = 0
    reason: str = "left"


class Counted:
    """ASGI middleware that counts responses by path. Paths that are not `known` count as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known: Collection[str]) -> None:
        self._app, self._metrics, self._known = app, metrics, frozenset(known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        named = next((start for start in _NAMED if path.startswith(start)), None)
        label = path if path in self._known else f"{named}…" if named else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(label, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


def _histogram(registry: CollectorRegistry, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"m7mlx_{name}_seconds", f"Seconds. {about}", registry=registry, buckets=buckets)
