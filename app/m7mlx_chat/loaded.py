"""A model that is loaded, with its cache and drafter, and what one answer does to them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from m7mlx import Mistral, Piece, Request, RollingCache, Stats, Tokenizer
from m7mlx.answer_reader import AnswerReader
from m7mlx.decode import shared_start
from m7mlx.generation import stream_answer
from m7mlx.memory import budget, cache_bytes
from m7mlx.parallel.world import World
from m7mlx.request import prepare
from m7mlx.speculative import Drafter, PromptLookup, load_draft_model
from m7mlx.tools.calling import ToolUse
from m7mlx_chat.branches import Branches
from m7mlx_chat.events import Called, Done, Event, Prefill, Ready, Seen, Text, Thought
from m7mlx_chat.settings import Settings
from m7mlx_chat.steps import Call

_BRANCHES = 0.1  # of the machine's memory, for caches of branches that were left
_TOLD_SECONDS = 0.1  # between two looks at the cache
_CALLS = 8  # of tools, at once; what a model calls beyond is not heard
_REASONS: dict[str | None, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class LoadedModel:
    """Answers, one request after the other, over one cache.

    folder     where the model lies
    tokenizer  its tokenizer
    ready      what the app is told of the model and of its cache
    """

    def __init__(
        self,
        folder: Path,
        model: Mistral,
        tokenizer: Tokenizer,
        settings: Settings,
        world: World | None,
    ) -> None:
        """Set a model up; `world` is there where processes share it. Raises M7Error."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.ready: Ready
        self._model = model
        self._world = world
        self._branches = Branches(int(budget() * _BRANCHES))
        self._cache: RollingCache
        self._drafter: Drafter | None = None
        self._settings: Settings
        self.set_up(settings)

    def set_up(self, settings: Settings) -> None:
        """Begin anew with the cache and the drafter of `settings`.

        Raises M7Error, and changes nothing then.
        """
        drafter = _drafter(settings.speculate, self._model, self.tokenizer)
        cache = self._model.new_cache(**settings.cache)
        self._branches.clear()
        self._drafter, self._cache, self._settings = drafter, cache, settings
        self.ready = _described(self._model, cache, self.folder)

    def answer(
        self,
        request: Request,
        emit: Callable[[Event], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Answer a request in events, Done the last. Raises what the request fails with."""
        cache = self._cache
        tool_use: ToolUse = "allowed" if request.tools else "none"
        request = prepare(request, self._model, self.tokenizer, cache)
        if self._world is not None:
            request = self._world.share(request, self._settings.cache)
        if shared_start(cache.ids, request.ids) < len(cache.ids) - 1:
            # Of another branch, or of another conversation: the user may come back.
            self._branches.keep(cache)

        def on_prefill(done: int, total: int) -> None:
            emit(Prefill(done, total, len(request.ids) - total))
            if done == total and not can_roll_back(cache, request.max_tokens):
                # Another answer to the same question needs it as it is now.
                self._branches.keep(cache)

        pieces = stream_answer(
            self._model,
            self.tokenizer,
            request,
            cache,
            drafter=self._drafter,
            snapshots=self._branches.snapshots,
            on_prefill=on_prefill,
            is_cancelled=is_cancelled,
        )
        emit(self._tell(pieces, AnswerReader(self.tokenizer, tool_use), emit))

    def _tell(self, pieces: Iterator[Piece], reader: AnswerReader, emit: Callable[[Event], None]) -> Done | Called:
        """Tell an answer piece by piece; returns how it ended."""
        text, ids, looked, piece = "", list[int](), 0.0, Piece()
        for piece in pieces:
            if piece.finish_reason == "length":  # maybe within a character, of which there is only a part
                piece = replace(piece, text=piece.text.rstrip("\ufffd"))
            said = reader.read(piece).text
            text += said
            ids += piece.ids
            now = time.perf_counter()
            seen, looked = (self._seen(), now) if now - looked > _TOLD_SECONDS else (None, looked)
            if piece.thought:
                emit(Thought(piece.thought, len(ids)))
            if said:
                emit(Text(said, len(ids), seen))
        stats = piece.stats or Stats()
        if reader.reason == "tool_calls":
            return Called(text, _calls(reader), stats, self._seen())
        if ids and ids[-1] in self.tokenizer.eos_ids:
            ids = ids[:-1]
        elif piece.finish_reason == "stop" or reader.calls:
            # A stop text, or half a call: what the model wrote of it is not part of the answer.
            ids = self.tokenizer.encode(text)
        return Done(_REASONS.get(piece.finish_reason, "stopped"), text, ids, stats, self._seen())

    def _seen(self) -> Seen:
        return Seen(self._cache.offset, self._cache.nbytes, self._branches.nbytes)


def _calls(reader: AnswerReader) -> tuple[Call, ...]:
    calls = reader.calls[:_CALLS]
    return tuple(Call(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls)


def _described(model: Mistral, cache: RollingCache, folder: Path) -> Ready:
    config, bits = model.config, cache.format.stored_bits(model.dtype)
    rolling = [(ring.window, ring.capacity) for ring in cache.rings if ring.kind and ring.window is not None]
    return Ready(
        window=cache.max_kv_size or cache.window,
        capacity=cache.window + cache.slack if cache.window else None,
        context=config.max_position_embeddings,
        nbytes=model.nbytes,
        sinks=cache.n_sinks,
        vocabulary=vocabulary(folder),
        token_bytes=cache_bytes(config, 1, bits),
        most_bytes=cache_bytes(config, config.max_position_embeddings, bits),
        sliding=rolling[0] if rolling else None,
    )


def can_roll_back(cache: RollingCache, max_tokens: int | None) -> bool:
    """Whether the tokens of an answer could be undone one by one when it has ended."""
    if cache.turns_at is None:
        return True
    return max_tokens is not None and cache.offset + max_tokens <= cache.turns_at


def vocabulary(folder: Path) -> str:
    """A name for the meaning of ids: a hash of the tokenizer's files."""
    files = sorted([*folder.glob("tokenizer.json"), *folder.glob("tokenizer.model*"), *folder.glob("tekken.json")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _drafter(how: str, model: Mistral, tokenizer: Tokenizer) -> Drafter | None:
    if how == "off":
        return None
    return PromptLookup() if how == "lookup" else load_draft_model(how, model, tokenizer)
