"""A model that is loaded, with its cache and drafter, and what one answer does to them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from m7mlx import Mistral, Piece, Request, RollingCache, Stats, Tokenizer
from m7mlx.answer_reader import AnswerReader
from m7mlx.cache import Snapshot
from m7mlx.cache_folder import remove_space
from m7mlx.decode import reusable, shared_start
from m7mlx.generation import stream_answer
from m7mlx.memory import budget, cache_bytes
from m7mlx.parallel.world import World
from m7mlx.request import prepare
from m7mlx.speculative import Drafter, PromptLookup, load_draft_model
from m7mlx.tools.calling import ToolUse
from m7mlx_chat.branches import Branches
from m7mlx_chat.copies import LEAST, DiskCopies
from m7mlx_chat.events import Called, Done, Event, Prefill, Ready, Seen, Text, Thought
from m7mlx_chat.settings import Settings
from m7mlx_chat.steps import Call

_BRANCHES = 0.1  # of the machine's memory, for caches of branches that were left
_TOLD_SECONDS = 0.1  # between two looks at the cache
_SIDE_CHUNK = 32  # tokens of a title's prompt at a time: a question that comes waits for no more
_CALLS = 8  # of tools, at once; what a model calls beyond is not heard
_QUIET_SECONDS = 20.0  # without a command, after which the conversation is copied
_LAST_SECONDS = 3.0  # for copying it at the end
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
        emit: Callable[[Event], None],
        *,
        world: World | None = None,
        copies: Path | None = None,
    ) -> None:
        """Set a model up. Raises M7Error.

        emit    tells the app of an event
        world   is there where processes share the model
        copies  where conversations are copied to, on the disk
        """
        self.folder = folder
        self.tokenizer = tokenizer
        self.ready: Ready
        self._model = model
        self._world = world
        self._branches = Branches(int(budget() * _BRANCHES))
        self._cache: RollingCache
        self._drafter: Drafter | None = None
        self._settings: Settings
        self._emit = emit
        self._folder_of_copies = copies
        self._copies: DiskCopies | None = None
        self._space = ""  # the conversation that the cache holds
        self._copied: list[int] = []  # the ids that its copy on the disk holds
        self.set_up(settings)

    def set_up(self, settings: Settings) -> None:
        """Begin anew with the cache and the drafter of `settings`.

        Raises M7Error, and changes nothing then.
        """
        drafter = _drafter(settings.speculate, self._model, self.tokenizer)
        cache = self._model.new_cache(**settings.cache)
        self.copy()
        self._branches.clear()
        self._copied, self._copies = [], None
        if self._folder_of_copies is not None and settings.kv_disk:
            self._copies = DiskCopies(self._folder_of_copies, self._model, cache, settings, self._emit)
            self._emit(self._copies.figures)
        self._drafter, self._cache, self._settings = drafter, cache, settings
        self.ready = _described(self._model, cache, self.folder)

    def answer(
        self,
        request: Request,
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
        from_disk = self._begin(request)

        def on_prefill(done: int, total: int) -> None:
            self._emit(Prefill(done, total, len(request.ids) - total))
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
        ended = self._tell(pieces, AnswerReader(self.tokenizer, tool_use))
        self._emit(replace(ended, from_disk=from_disk) if isinstance(ended, Done) else ended)

    def write_title(self, request: Request, is_cancelled: Callable[[], bool]) -> str | None:
        """Answer a request in a cache of its own; that of the conversation stays as it is.

        Returns the lines that are whole, None if it was broken off.
        """
        cache = self._model.new_cache()
        request = prepare(request, self._model, self.tokenizer, cache)
        text, piece = "", Piece()
        for piece in stream_answer(
            self._model,
            self.tokenizer,
            request,
            cache,
            prefill_chunk=_SIDE_CHUNK,
            is_cancelled=is_cancelled,
        ):
            text += piece.text
        if piece.finish_reason not in _REASONS:
            return None
        return text if piece.finish_reason == "stop" else text.rpartition("\n")[0]

    # --- copies on the disk -----------------------------------------------------------------------

    @property
    def quiet_seconds(self) -> float | None:
        """How long to wait for a command before the conversation is copied; None for ever."""
        return _QUIET_SECONDS if self._copies is not None and self._uncopied >= LEAST else None

    @property
    def _uncopied(self) -> int:
        """How many tokens of the conversation have no copy on the disk."""
        return len(self._cache.ids) - shared_start(self._cache.ids, self._copied)

    def copy(self) -> None:
        """Copy the conversation to the disk, as far as it is not there."""
        if self._copies is None or not self._uncopied:
            return
        if self._copies.save(self._cache, self._space):
            self._copied = list(self._cache.ids)

    def forget(self, space: str) -> None:
        """Keep nothing on the disk of a conversation that was deleted."""
        if self._copies is not None:
            if space == self._space:
                self._copied = list(self._cache.ids)
            self._copies.forget(space)
        elif self._folder_of_copies is not None:
            remove_space(self._folder_of_copies, space)

    def close(self) -> None:
        """Copy what is not on the disk, for some seconds at most."""
        until = time.monotonic() + _LAST_SECONDS
        if self._copies is not None:
            self._copies.close(_LAST_SECONDS)  # what is being written has begun before
            self.copy()
            self._copies.close(max(0.0, until - time.monotonic()))

    def _begin(self, request: Request) -> bool:
        """Copy the conversation that is left, and bring back that of a request.

        Returns whether it came from the disk.
        """
        if self._copies is None:
            return False
        if request.space != self._space:
            self.copy()
            self._space, self._copied = request.space, []
        in_memory: list[RollingCache | Snapshot] = [self._cache, *self._branches.snapshots]
        held = max(_held(one, request.ids) for one in in_memory)
        back = self._copies.bring(request.ids, request.space, held)
        if back is not None:
            self._cache.take(back, self._model.dtype)
            self._copied = back.ids
        return back is not None

    # --- telling ----------------------------------------------------------------------------------

    def _tell(self, pieces: Iterator[Piece], reader: AnswerReader) -> Done | Called:
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
                self._emit(Thought(piece.thought, len(ids)))
            if said:
                self._emit(Text(said, len(ids), seen))
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


def _held(cache: RollingCache | Snapshot, ids: Sequence[int]) -> int:
    """How many tokens of the start of a prompt a cache holds."""
    if len(cache.ids) != cache.offset or not cache.positions.intact:
        return 0
    return reusable(shared_start(cache.ids, ids), cache.offset, cache.max_rollback, len(ids))


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
