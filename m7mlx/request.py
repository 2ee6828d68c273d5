"""What is asked for: a prompt in any of its forms, and how to answer it.

A `Request` says it once, for the library, the chat, the server and processes that share a model.
`prepare` makes of it what one model can answer: its prompt as ids, a JSON schema as a grammar, and
a limit that its cache has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from m7mlx.cache import RollingCache
from m7mlx.constrain import Constraint, Unconstrained, grammar_constraint, json_constraint
from m7mlx.errors import InputError, TokenizerError
from m7mlx.grammar import Grammar
from m7mlx.model import Mistral
from m7mlx.prompt import Prompt, check_ids, check_known, check_prompt, encode_prompt, is_messages
from m7mlx.sampling import LogitsProcessor, Sampling
from m7mlx.tokens.messages import Message
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import Rules, call_form

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it.

    prompt      a text to go on with, ids (a list, or an array of MLX or NumPy), or chat messages
                (`m7mlx.tokens.messages`), whose contents may be lists of text parts. A last message
                of the assistant with "prefix": True is continued
    sampling    how each token is chosen
    max_tokens  tokens to generate at most; None goes on until the model ends or its context is full
    stop        texts that end the answer; they are not part of it
    at_start    whether the answer to ids or messages begins a message, not amid a text
    begun       how many of the prompt's last ids begin the answer, their text shown already;
                `prepare` counts those of a message that is continued
    continues   the ids, or the text, of an answer that was broken off. It goes on after them, with
                the same seed as if it had never been broken off
    logit_bias  numbers added to the logits of some ids
    logprobs    tell the log probability of each token, and of this many of the likeliest in its
                place; None for neither
    prompt_logprobs
                the same for the tokens of the prompt, which a `Scheduler` tells; then max_tokens
                may be 0
    logits_processors
                functions f(ids, logits) → logits (`m7mlx.sampling.LogitsProcessor`)
    constraint  a grammar that the answer follows (`m7mlx.constrain`)
    schema      a JSON schema that the answer fits, or a grammar: `prepare` makes a constraint of it
    prediction  a text, or ids, that the answer may be made of to a large part: a `Scheduler` that
                drafts tries them, and the answer comes sooner; it is the same without
    suffix      what stands behind the answer to a text, for models that fill in the middle
    effort      how much the model shall think about messages, if it can be told so ("high"); None
                takes its default
    tools       functions that the model may call in its answer to messages, each with a name, a
                description and parameters (a JSON schema). `m7mlx.answer_reader` finds the calls
    space       whose request it is: a `Scheduler` goes on from what it holds of the same space
                alone, so that nobody can find out how others' conversations begin

    Raises InputError for what can be used with no model at all.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: Sequence[str] = ()
    at_start: bool = True
    begun: int = 0
    continues: Sequence[int] | str = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    constraint: Constraint | None = None
    schema: Mapping[str, Any] | Grammar | None = None
    prediction: Sequence[int] | str = ()
    suffix: str = ""
    effort: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    space: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling must be a Sampling, not {kind_of(self.sampling)}")
        for name in ("max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise InputError(f"{name} must be a whole number that is not negative, or None, not {value!r:.100}")
        if not _is_list_of(self.stop, str) or not all(self.stop):
            raise InputError("stop must be a list of texts, none of them empty")
        if not _is_list_of(self.logits_processors, Callable):
            raise InputError("logits_processors must be a list of functions f(ids, logits) that return logits")
        if not isinstance(self.suffix, str) or (self.suffix and not isinstance(self.prompt, str)):
            raise InputError("a suffix is a text, and goes with a prompt that is one, not ids or messages")
        if self.tools and not (is_messages(self.prompt) and all(map(_is_function, self.tools))):
            raise InputError("tools go with messages; each is {'name': …, 'description': …, 'parameters': {…}}")
        if self.has_grammar and len(self.continues):
            raise InputError("an answer that follows a grammar cannot go on where it was broken off; ask for it anew")
        if self.has_grammar and _continued(self.prompt) is not None:
            raise InputError("an answer that follows a grammar cannot continue a message; leave out its prefix")

    @property
    def has_grammar(self) -> bool:
        """Whether the answer follows a grammar."""
        return self.constraint is not None or self.needs_grammar

    @property
    def needs_grammar(self) -> bool:
        """Whether a grammar is still to be made (`with_grammar`)."""
        return self.schema is not None

    @property
    def ids(self) -> Sequence[int]:
        """All that is read before the first token; of a request that is prepared."""
        prompt, continues = cast("Sequence[int]", self.prompt), cast("Sequence[int]", self.continues)
        return [*prompt, *continues] if len(continues) else prompt

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON, for `from_dict`.

        A grammar and logits processors stay in this process; only that there are some is told.
        Another process that shares the model takes the tokens that are chosen here.
        """
        return {
            "prompt": self.prompt if isinstance(self.prompt, str) else _plain(self.prompt),
            "sampling": asdict(self.sampling),
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "at_start": self.at_start,
            "begun": self.begun,
            "continues": self.continues if isinstance(self.continues, str) else _listed(self.continues),
            "logit_bias": list(self.logit_bias.items()),
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "is_processed": bool(self.logits_processors),
            "is_constrained": self.constraint is not None,
            "schema": asdict(self.schema) if isinstance(self.schema, Grammar) else self.schema,
            "is_grammar": isinstance(self.schema, Grammar),
            "prediction": self.prediction if isinstance(self.prediction, str) else _listed(self.prediction),
            "suffix": self.suffix,
            "effort": self.effort,
            "tools": [dict(tool) for tool in self.tools],
            "space": self.space,
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Request:
        """The request that `to_dict` has told. Raises InputError for anything else."""
        try:
            values = dict(told)
            is_processed, is_constrained = values.pop("is_processed", False), values.pop("is_constrained", False)
            values["sampling"] = Sampling(**values.get("sampling", {}))
            if values.pop("is_grammar", False):
                values["schema"] = Grammar(**values["schema"])
            values["logit_bias"] = dict(values.get("logit_bias", ()))
            return cls(
                **values,
                logits_processors=[_unprocessed] if is_processed else (),
                constraint=Unconstrained() if is_constrained else None,
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"this is no request: {error}") from None


def _unprocessed(ids: mx.array, logits: mx.array) -> mx.array:
    """Stand for logits processors of another process."""
    return logits


def prepare(request: Request, model: Mistral, tokenizer: Tokenizer, cache: RollingCache) -> Request:
    """Make of a request what `model` can answer with `cache`: ids, a grammar, a limit with room.

    Raises TokenizerError (ids outside the vocabulary), ChatFormatError, PromptTooLongError,
    InputError, BusyError.
    """
    continues, prediction, message = request.continues, request.prediction, _continued(request.prompt)
    schema = request.schema
    if request.tools and message is None and not len(continues):
        rules = Rules(request.tools, is_required=False, parallel=True, answer=_json_schema(schema))
        schema = call_form(tokenizer).schema(rules)
    ready = replace(
        request,
        prompt=encode_prompt(tokenizer, request.prompt, request.suffix, request.effort, request.tools),
        suffix="",
        tools=(),
        schema=schema,
        at_start=request.at_start and message is None and not isinstance(request.prompt, str),
        begun=request.begun if message is None else len(message.get("ids") or ()),
        continues=tokenizer.encode(continues) if isinstance(continues, str) else check_ids(continues),
        prediction=tokenizer.encode(prediction) if isinstance(prediction, str) else check_ids(prediction),
    )
    for token in request.logit_bias:
        if not 0 <= token < min(model.config.vocab_size, tokenizer.vocab_size):
            raise TokenizerError(f"logit_bias: token id {token} is outside the model's vocabulary")
    check_known(model, cast("Sequence[int]", ready.prediction))
    room = check_prompt(model, ready.ids, cache)
    limit = min((n for n in (room, request.max_tokens) if n is not None), default=None)
    return with_grammar(replace(ready, max_tokens=limit), tokenizer)


def with_grammar(request: Request, tokenizer: Tokenizer) -> Request:
    """Put a grammar in the place of a request's JSON schema, which may take seconds.

    Raises InputError for a schema that cannot be used, and BusyError.
    """
    if request.schema is None:
        return request
    if isinstance(request.schema, Grammar):
        return replace(request, schema=None, constraint=grammar_constraint(tokenizer, request.schema))
    return replace(request, schema=None, constraint=json_constraint(tokenizer, request.schema))


def _is_function(tool: Any) -> bool:
    is_named = isinstance(tool, Mapping) and isinstance(tool.get("name"), str)
    return is_named and isinstance(tool.get("parameters"), Mapping)


def _json_schema(schema: Mapping[str, Any] | Grammar | None) -> Mapping[str, Any] | None:
    """The schema of an answer that calls no tool. Raises InputError for a grammar."""
    if isinstance(schema, Grammar):
        raise InputError("tools go with a JSON schema, not with a grammar")
    return schema


def _continued(prompt: Prompt) -> Message | None:
    """The message of a prompt that the answer continues, if there is one."""
    last = prompt[-1] if isinstance(prompt, Sequence) and len(prompt) else None
    return last if isinstance(last, Mapping) and last.get("prefix") else None


def kind_of(value: object) -> str:
    """The kind of a value, for messages."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _plain(prompt: Any) -> list[Any]:
    return list(prompt) if is_messages(prompt) else _listed(prompt)


def _listed(ids: Any) -> list[int]:
    return list(check_ids(ids))


def _is_list_of(values: Any, kind: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(v, kind) for v in values)
