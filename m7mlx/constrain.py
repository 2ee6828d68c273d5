"""Answers that follow a grammar: a JSON schema, by masks from llguidance (extra `server`).

Before each token the grammar says which ids may come next; the end token may where the answer is
complete. The model chooses among them, so that what comes out always fits, and the schema need not
be explained to it. An answer is complete and valid, cut off by a limit that it names, or an error.

Schemas are strangers': each is prepared, and its masks are made, in a process of its own
(`m7mlx.grammar`) that the operating system bounds in time and memory. It is remembered, so that
preparing is done once.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from m7mlx.errors import BusyError, InputError, WorkerDiedError, WorkerError, WorkerMemoryError, WorkerTimeError
from m7mlx.grammar import NUMBER, STEP, UNUSABLE, Grammar, schema_text
from m7mlx.worker import Worker

if TYPE_CHECKING:
    from m7mlx.tokens.tokenizer import Tokenizer

CUT = "a stop text came within the JSON and would have cut it; leave out stop, since an answer in JSON ends by itself"
_MEMORY = 512 << 20  # bytes for one schema's process, the vocabulary included
_PREPARE_SECONDS = 5.0  # of the processor
_BUSY = 4  # times as many of the clock, on a busy machine
_MASK_SECONDS = 1.0
_SPENT_SECONDS, _SPENT_EACH = 2.0, 0.05  # for all masks of an answer: so much, and so much a token
_AT_ONCE = 16  # schemas that have a process
_NONE = -1  # instead of a token
_REFUSED = 64  # schemas that could not be used, and are remembered as such
_REMEMBERED_SECONDS = 60.0  # for so long: it may have been the machine that was too busy


class Constraint:
    """Where one answer stands in its grammar.

    is_whole  whether the answer is of no use if a stop text cuts it
    """

    def __init__(self, grammars: _Grammars, schema: str, is_whole: bool) -> None:
        self.is_whole = is_whole
        self._grammars, self._schema = grammars, schema
        self._tokens: list[int] = []  # chosen so far
        self._known = 0  # how many of them the grammar has been told
        self._spent = 0.0
        self._error: InputError | None = None
        self._has_moved = False  # to a new process, which it does once
        self._begin()

    def mask(self, vocab_size: int) -> mx.array:
        """Mark the ids that may come next: bool [vocab_size]. Raises InputError if none may."""
        if self._error is None:
            try:
                return self._mask(vocab_size)
            except InputError as error:
                self._error = error
            except WorkerError as error:
                self._error = InputError(f"{UNUSABLE}: {_why(error, 'to follow')}")
            except ValueError as error:
                self._error = InputError(f"{UNUSABLE} for this answer: {error}")
        raise self._error

    def accept(self, token: int) -> None:
        """Go on with `token`; the next mask tells whether the answer may."""
        self._tokens.append(token)

    def close(self) -> None:
        """Give up its place, since the answer has ended: an error may hold this object for long."""
        self._forget()

    def _begin(self) -> None:
        self._grammar, self._number = self._grammars.begin(self._schema)
        self._known = 0
        self._forget = weakref.finalize(self, self._grammar.ended.append, (self._grammar, self._number))
        self._forget.atexit = False

    def _mask(self, vocab_size: int) -> mx.array:
        began = time.perf_counter()
        try:
            bits = self._follow()
        except WorkerDiedError:  # another answer's fault, or from outside
            if self._has_moved:
                raise
            self._has_moved = True
            self._forget()
            self._begin()
            bits = self._follow()
        self._spent += time.perf_counter() - began
        if self._spent > _SPENT_SECONDS + _SPENT_EACH * len(self._tokens):
            raise WorkerTimeError
        ids = min(vocab_size, self._grammars.vocab_size)
        allowed = np.zeros(vocab_size, bool)
        allowed[:ids] = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:ids]
        if not allowed.any():
            raise ValueError("no token can come next")
        return mx.array(allowed)

    def _follow(self) -> bytes:
        """Tell the grammar the tokens that it does not know, and ask what may come next."""
        while self._known < len(self._tokens) - 1:
            self._grammar.step(self._number, self._tokens[self._known])
            self._known += 1
        bits = self._grammar.step(self._number, self._tokens[-1] if self._known < len(self._tokens) else _NONE)
        self._known = len(self._tokens)
        return bits


class Unconstrained(Constraint):
    """Stands in for a grammar that another process enforces, whose tokens are taken here."""

    def __init__(self) -> None:
        self.is_whole = False

    def mask(self, vocab_size: int) -> mx.array:
        return mx.ones((vocab_size,), mx.bool_)

    def accept(self, token: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Grammar:
    """A schema that has a process, prepared by whoever asks first.

    text  the frame that prepares it (`m7mlx.grammar`)
    """

    def __init__(self, text: str, worker: Worker, ended: deque[tuple[_Grammar, int]]) -> None:
        self._text, self._worker, self.ended = text, worker, ended
        self._lock = threading.Lock()
        self._ready, self._failure = False, ""
        self.forgotten: deque[int] = deque()  # numbers of answers that are no more
        self.users = 0  # answers that are, and will be; the lock of `_Grammars`

    def begin(self) -> int:
        """The number of a new answer. Raises ValueError with the reason, or WorkerError."""
        with self._lock:
            if self._failure:
                raise ValueError(self._failure)
            if not self._ready:
                try:
                    self._ask(self._text.encode(), _PREPARE_SECONDS)
                except (WorkerError, ValueError) as error:
                    self._failure = _why(error, "to prepare") if isinstance(error, WorkerError) else str(error)
                    raise ValueError(self._failure) from None
                self._ready = True
        gone = [self.forgotten.popleft() for _ in range(len(self.forgotten))]
        found: int = NUMBER.unpack(self._ask(b"n" + b"".join(map(NUMBER.pack, gone)), _MASK_SECONDS))[0]
        return found

    def step(self, number: int, token: int) -> bytes:
        return self._ask(b"t" + STEP.pack(number, token), _MASK_SECONDS)

    def close(self) -> None:
        self._worker.close()

    def _ask(self, frame: bytes, seconds: float) -> bytes:
        reply = self._worker.ask(frame, seconds * _BUSY, seconds)
        if reply[:1] != b"+":
            raise ValueError(reply[1:].decode())
        return reply[1:]


class _Grammars:
    """The grammars of one vocabulary, the last ones used kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self._vocabulary = Worker("m7mlx.grammar", _described(tokenizer), memory=_MEMORY)
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Grammar] = OrderedDict()  # by schema, the last one used last
        self._refused: OrderedDict[str, tuple[float, str]] = OrderedDict()  # until when, and why
        self._ended: deque[tuple[_Grammar, int]] = deque()  # by finalizers, which may take no lock

    def begin(self, schema: str) -> tuple[_Grammar, int]:
        """Begin an answer that follows what a frame prepares (`m7mlx.grammar`); its number.

        Raises InputError for a schema that cannot be used, and BusyError.
        """
        try:
            return self._begin(schema)
        except WorkerDiedError:  # another answer's fault, or from outside: it is not the schema's
            pass
        try:
            return self._begin(schema)
        except WorkerError as error:
            raise InputError(f"{UNUSABLE}: {_why(error, 'to prepare')}") from None

    def _begin(self, schema: str) -> tuple[_Grammar, int]:
        grammar = self._grammar(schema)
        try:
            return grammar, grammar.begin()
        except (WorkerError, ValueError) as error:
            why = _why(error, "to follow") if isinstance(error, WorkerError) else str(error)
            is_lost = isinstance(error, WorkerDiedError)
            with self._lock:
                if not is_lost:
                    self._refused[schema] = time.monotonic() + _REMEMBERED_SECONDS, why
                if len(self._refused) > _REFUSED:
                    self._refused.popitem(last=False)
                if self._held.get(schema) is grammar:
                    del self._held[schema]
            grammar.close()
            if is_lost:
                raise
            raise InputError(f"{UNUSABLE}: {why}") from None

    def _grammar(self, schema: str) -> _Grammar:
        until = time.monotonic() + _PREPARE_SECONDS * _BUSY
        while True:
            with self._lock:
                refused_until, why = self._refused.get(schema, (0.0, ""))
                if time.monotonic() < refused_until:
                    raise InputError(f"{UNUSABLE}: {why}")
                self._let_go()
                found = self._held.get(schema)
                if found is None and len(self._held) < _AT_ONCE:
                    found = self._held[schema] = _Grammar(schema, self._vocabulary.copy(), self._ended)
                if found is not None:
                    self._held.move_to_end(schema)
                    found.users += 1
                    return found
            if time.monotonic() > until:
                raise BusyError(f"answers to {_AT_ONCE} other JSON schemas are under way; try again later")
            time.sleep(0.05)

    def _let_go(self) -> None:
        """Count answers that have ended; where there is no room left, end a process without any."""
        while self._ended:
            grammar, number = self._ended.popleft()
            grammar.users -= 1
            grammar.forgotten.append(number)
        if len(self._held) >= _AT_ONCE:
            idle = next((schema for schema, grammar in self._held.items() if not grammar.users), None)
            if idle is not None:
                self._held.pop(idle).close()

    def close(self) -> None:
        self._vocabulary.close()
        for grammar in list(self._held.values()):
            grammar.close()


_all: weakref.WeakKeyDictionary[Tokenizer, _Grammars] = weakref.WeakKeyDictionary()
_all_lock = threading.Lock()


def json_constraint(tokenizer: Tokenizer, schema: Mapping[str, Any] | None = None) -> Constraint:
    """The beginning of an answer that is one JSON value of a schema; without one, any object.

    Raises InputError for a schema that is none, asks for what cannot be enforced or takes too much
    to prepare, and without llguidance; BusyError where answers to too many others are under way.
    """
    return _begin(tokenizer, "c" + schema_text({"type": "object"} if schema is None else schema), True)


def grammar_constraint(tokenizer: Tokenizer, grammar: Grammar) -> Constraint:
    """The beginning of an answer that follows a grammar. Raises as `json_constraint`."""
    return _begin(tokenizer, "g" + grammar.text, grammar.is_whole)


def _begin(tokenizer: Tokenizer, frame: str, is_whole: bool) -> Constraint:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise InputError("answers in JSON need llguidance: pip install 'm7mlx[server]'") from None
    if not _ends(tokenizer):
        raise InputError("the model has no token that ends an answer, so no grammar can end one")
    with _all_lock:
        grammars = _all.get(tokenizer)
        if grammars is None:
            grammars = _all[tokenizer] = _Grammars(tokenizer)
            weakref.finalize(tokenizer, grammars.close).atexit = False
    return Constraint(grammars, frame, is_whole)


def close_grammars() -> None:
    """End the processes of all grammars; answers that follow one, and schemas at work, fail."""
    with _all_lock:
        for grammars in list(_all.values()):
            grammars.close()
        _all.clear()


def _why(error: WorkerError, what: str) -> str:
    if isinstance(error, WorkerTimeError):
        return f"it takes too long {what}; make it simpler"
    if isinstance(error, WorkerMemoryError):
        return f"it takes too much memory {what}; make it simpler"
    return f"it is too complex {what}; make it simpler"


def _ends(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer; a config may name some that the tokenizer does not have."""
    return sorted(i for i in tokenizer.eos_ids if 0 <= i < tokenizer.vocab_size)


def _described(tokenizer: Tokenizer) -> bytes:
    """A tokenizer as `m7mlx.grammar` reads it."""
    ids = range(tokenizer.vocab_size)
    special = [i for i in ids if tokenizer.is_control(i)]
    names = {i: name.encode() for name, i in tokenizer.control_ids().items()}
    tokens = [tokenizer.token_bytes(i) for i in ids]
    for i in special:
        tokens[i] = names.get(i, b"<control>")
    library, data = tokenizer.library()
    told = {
        "tokens": [token.hex() for token in tokens],
        "special": special,
        "eos": _ends(tokenizer),
        "bos": tokenizer.bos_id,
        "leading_space": tokenizer.adds_leading_space,
        "library": library,
        "data": base64.b85encode(data).decode(),
    }
    return json.dumps(told).encode()
