"""Fields that a body has at both endpoints.

A field that would change the answer and is not supported is refused, not ignored; one that only
describes the client (`user`, `metadata`, `store`) is let through.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from m7mlx_serve.endpoint import Body, Wanted
from m7mlx_serve.openai.shape import Shape
from m7mlx_serve.strict import Finite, Strict

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
MEANINGLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention"),
        # How Ollama is to load a model, which Open WebUI sends with its other settings.
        *("num_ctx", "num_batch", "num_gpu", "num_thread", "num_keep", "use_mmap", "use_mlock", "keep_alive"),
    }
)
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "min_tokens": [0],
    "prompt_logprobs": [False],
    "guardrails": [[]],
}
ADVICE: Mapping[str, str] = {
    "num_predict": "its name is max_tokens here",
    "repeat_penalty": "its name is repetition_penalty here",
    "format": "its name is response_format here",
    "options": "options of Ollama's API have their places beside the messages here",
}
_MOST_BIASED = 1024


class StreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    ignored = frozenset({"include_obfuscation"})


class Generation(Body):
    """How to answer, whatever the prompt."""

    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    random_seed: Seed | None = None  # Mistral's name for it
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream_options: StreamOptions | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=_MOST_BIASED)] | None
    ) = None
    ignored = MEANINGLESS
    neutral = NEUTRAL
    advice = ADVICE
    shape: ClassVar[Shape]

    def wanted(self) -> Wanted:
        """How the answers are wanted."""
        return Wanted(
            n=self.n,
            max_tokens=self.token_limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.random_seed if self.seed is None else self.seed,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            logprobs=self.logprob_count,
            prompt_logprobs=self.prompt_logprob_count,
        )

    @property
    def demanded_calls(self) -> Mapping[str, Any] | None:
        """The calls that are demanded (`m7mlx.constrain.calls_constraint`), if any."""
        return None

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens to tell the log probability of; None for none."""

    @property
    def prompt_logprob_count(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether each answer is told behind its prompt."""
        return False

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_few(cls, data: Any) -> Any:
        """Count the ids before each of them is looked at."""
        if isinstance(data, dict) and len(data) > _MOST_BIASED:
            raise ValueError(f"at most {_MOST_BIASED:,} ids can be biased")
        return data

    @model_validator(mode="after")
    def _says_one_thing(self) -> Generation:
        if self.stream_options and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options is for streams: set stream")
        if None not in (self.seed, self.random_seed) and self.seed != self.random_seed:
            raise ValueError("seed and random_seed are two names of one field; give one of them")
        return self
