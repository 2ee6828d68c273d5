"""A model for lm-evaluation-harness: likelihoods of continuations and of texts, and answers.

Numbers are those of its Hugging Face adapter: the same tokens, truncated on the left to the same
length. What differs is the work. A context is read once, from where it differs from the one before
it in order, so that few-shot examples and the choices of one question are not read again;
continuations share forward passes. A text longer than a model's window rolls through the cache.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache
from m7mlx.decode import default_chunk, read_chunk, reuse
from m7mlx.errors import InputError
from m7mlx.memory import positions_that_fit
from m7mlx.model import Mistral
from m7mlx.scheduler import Scheduler
from m7mlx.scoring import read_logits, score, scores_of, spans
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.units import counted
from m7mlx_eval.answers import generation_request
from m7mlx_eval.journal import Journal, key_of
from m7mlx_eval.progress import show_bar

# What stands around the messages of a chat where they go through the harness as a text.
_CHAT = ("\ufdd0", "\ufdd1")
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a context and of what continues it
Asked = tuple[tuple[Any, ...], int]  # arguments of a request, how often they were asked before
Compute = Callable[[list[Asked]], Iterator[tuple[int, Any]]]


class M7LM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """One model and tokenizer.

    batch_size  continuations in a forward pass, and answers at a time
    max_length  tokens that a request may have; longer ones lose their beginning. None takes the
                model's positions, and lets whole texts roll on beyond them if it has a window
    journal     where answers are kept as they come, and found again
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        kv_bits: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        """Raise InputError for a tokenizer without start or end token, or numbers out of range."""
        super().__init__()
        positions = model.config.max_position_embeddings
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        if max_length is not None and not 2 <= max_length <= positions:
            raise InputError(f"the context must lie between 2 and the model's {positions}, not {max_length}")
        if tokenizer.bos_id is None and not tokenizer.eos_ids:
            raise InputError("the tokenizer names neither a start nor an end token; texts cannot be scored from one")
        self._model, self._m7_tokenizer, self._batch_size = model, tokenizer, batch_size
        self._kv_bits, self._journal = kv_bits, journal
        self._new = model.new_cache(kv_bits=kv_bits)
        self._rolls = max_length is None and model.config.window is not None
        self.max_length = max_length or positions
        bits = self._new.format.stored_bits(model.dtype)
        self._fit = positions_that_fit(model.config, model.nbytes, bits)

    # --- tokens -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return min(self._m7_tokenizer.eos_ids, default=self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        bos = self._m7_tokenizer.bos_id
        return min(self._m7_tokenizer.eos_ids) if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return "m7mlx"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, which may begin with a chat as `apply_chat_template` writes it."""
        tokenizer = self._m7_tokenizer
        if string.startswith(_CHAT[0]):
            chat, _, rest = string[1:].partition(_CHAT[1])
            return tokenizer.chat.encode(json.loads(chat)) + tokenizer.encode(rest)
        add_bos = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        return tokenizer.encode(string, add_bos=add_bos)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages as a text that `tok_encode` understands.

        It is not what a template makes of them: in that, a task's data could not be told from
        control tokens.
        """
        history, begun = list(chat_history), ""
        if not add_generation_prompt:  # the last message is the beginning of the answer
            begun = history.pop()["content"]
        return _CHAT[0] + json.dumps(history, ensure_ascii=True) + _CHAT[1] + begun

    # --- likelihoods --------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log probability, and whether it is the greedy one."""
        found = self._answer("loglikelihood", requests, self._likelihoods)
        return [(logprob, greedy) for logprob, greedy in found]

    def _likelihoods(self, asked: list[Asked]) -> Iterator[tuple[int, Any]]:
        return self._scored([self._pair(context, continuation) for (context, continuation), _ in asked])

    def _pair(self, context: str, continuation: str) -> Pair:
        """Encode a context and what continues it, cut on the left to the longest that may be."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                before, after = after[:1], after[1:]
        if not 0 < len(after) <= self.max_length:
            raise InputError(
                f"a continuation has {counted(len(after), 'token')}, where 1 to {self.max_length} can be scored: "
                f"{continuation[:60]!r}"
            )
        before = before[-(self.max_length + 1 - len(after)) :]
        return tuple(before), tuple(after)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        found = dict(self._scored([(tuple(before), tuple(after)) for _, before, after in requests]))
        return [found[i] for i in range(len(requests))]

    def _scored(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield the number of each pair and its likelihood, batch by batch."""
        # What shares a context lies together; what shares all but the last token is one row.
        order = sorted(range(len(pairs)), key=lambda i: (pairs[i][0], len(pairs[i][1]), pairs[i][1]))
        rows: dict[Pair, list[int]] = {}
        for i in order:
            rows.setdefault((pairs[i][0], pairs[i][1][:-1]), []).append(i)
        cache = self._new.like()
        waiting = list(rows)
        while waiting:
            batch = waiting[: self._rows(waiting)]
            del waiting[: len(batch)]
            caches = []
            for n, (context, _) in enumerate(batch):
                if not n or context != batch[n - 1][0]:
                    cache = self._read(context, cache)
                caches.append(cache)
            wanted = [rows[row] for row in batch]
            yield from self._continued(
                batch, BatchCache(caches), [[(i, pairs[i][1]) for i in each] for each in wanted]
            )

    def _rows(self, waiting: Sequence[Pair]) -> int:
        """Return how many of the next rows fit into memory, as a cache and in the batch."""
        for n, (context, rest) in enumerate(waiting[: self._batch_size], 1):
            longest = max(len(context) + len(rest), self._new.window or 0)
            if 3 * n * min(longest, self.max_length) > self._fit:
                return max(1, n - 1)
        return min(self._batch_size, len(waiting))

    def _read(self, context: Sequence[int], last: RollingCache) -> RollingCache:
        """Read all but the last token of a context, from where it leaves the one before it."""
        cache = self._new.like()
        done = reuse(cache, context, [last.snapshot()])
        chunk = default_chunk(self._model)
        for start in range(done, len(context) - 1, chunk):
            read_chunk(self._model, list(context[start : min(start + chunk, len(context) - 1)]), cache)
        return cache

    def _continued(
        self,
        batch: Sequence[Pair],
        cache: BatchCache,
        wanted: Sequence[Sequence[tuple[int, Sequence[int]]]],
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield likelihoods of continuations, several a row: they differ in their last token."""
        inputs = [[context[-1], *rest] for context, rest in batch]
        length = max(map(len, inputs))
        padded = mx.array([row + [0] * (length - len(row)) for row in inputs])
        sums = {i: 0.0 for each in wanted for i, _ in each}
        greedy = dict.fromkeys(sums, True)
        start = 0
        for logits in read_logits(self._model, padded, cache):
            end = start + logits.shape[1]
            for row, each in enumerate(wanted):
                for i, following in each:
                    part = following[start:end]
                    if part:
                        found = scores_of(logits[row, : len(part)], mx.array(list(part)))
                        sums[i] += float(found.logprobs.sum(dtype=np.float64))
                        greedy[i] &= bool(found.greedy.all())
            start = end
        for i, total in sums.items():
            yield i, (total, greedy[i])

    # --- whole texts --------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each text as a whole."""
        return self._answer("loglikelihood_rolling", requests, self._whole)

    def _whole(self, asked: list[Asked]) -> Iterator[tuple[int, Any]]:
        for i, ((text,), _) in enumerate(asked):
            ids = [self.prefix_token_id, *self.tok_encode(text)]
            total = 0.0
            for start, first, end in spans(len(ids), None if self._rolls else self.max_length):
                found = score(self._model, ids[start:end], first - start, self._new.like())
                total += float(found.logprobs.sum(dtype=np.float64))
            yield i, total

    # --- answers ------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt, up to the first of its stop texts."""
        return self._answer("generate_until", requests, self._generated)

    def _generated(self, asked: list[Asked]) -> Iterator[tuple[int, Any]]:
        rows = self._batch_size
        scheduler = Scheduler(self._model, self._m7_tokenizer, rows=rows, kept=rows, kv_bits=self._kv_bits)
        requests = [
            generation_request(self.tok_encode(context), options, self.max_length, repeat)
            for (context, options), repeat in asked
        ]
        # In order, so that what begins alike is answered close together.
        order = sorted(range(len(requests)), key=lambda i: list(requests[i].ids))
        numbers = {scheduler.add(requests[i]): i for i in order}
        texts = dict.fromkeys(numbers, "")
        more = bool(numbers)
        while more:
            told, more = scheduler.step()
            for number, piece in told:
                texts[number] += piece.text
                if piece.error is not None:
                    raise piece.error
                if piece.finish_reason is not None:
                    yield numbers[number], texts[number]

    # --- what all have in common --------------------------------------------------------------

    def _answer(self, kind: str, requests: Sequence[Instance], compute: Compute) -> list[Any]:
        """Answer all requests; compute once what the journal holds, or is asked twice."""
        repeats: Counter[str] = Counter()
        asked: dict[str, Asked] = {}
        keys = []
        for request in requests:
            plain = key_of(kind, list(request.args), 0)
            repeat = repeats[plain]
            if kind == "generate_until":  # an answer that is drawn is another one each time
                repeats[plain] += 1
            keys.append(key_of(kind, list(request.args), repeat))
            asked[keys[-1]] = (request.args, repeat)
        known: dict[str, Any] = dict(self._journal.answers) if self._journal else {}
        missing = [key for key in asked if key not in known]
        with show_bar(kind, len(asked), "requests") as advance:
            advance(len(asked) - len(missing))
            for i, answer in compute([asked[key] for key in missing]):
                known[missing[i]] = answer
                if self._journal:
                    self._journal.add(missing[i], answer)
                advance(1)
        return [known[key] for key in keys]
