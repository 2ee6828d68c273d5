"""Fields that a body has at both endpoints that answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from m7mlx_serve.endpoint import Body, Wanted
from m7mlx_serve.errors import ApiError
from m7mlx_serve.strict import Finite, Name, Strict

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Options(Strict):
    """How tokens are chosen. What tells Ollama how to load a model says nothing here."""

    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    reasoning_effort: Name | None = None  # as Open WebUI gives it
    num_predict: Annotated[int, Field(ge=-2)] | None = None  # below 1: as many as there is room for
    stop: Stop | Annotated[list[Stop], Field(max_length=64, fail_fast=True)] | None = None
    ignored = frozenset(
        {
            *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram"),
            *("use_mmap", "use_mlock", "vocab_only", "f16_kv", "repeat_last_n", "penalize_newline"),
            *("num_gqa", "mirostat_eta", "mirostat_tau"),
        }
    )
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {"mirostat": [0], "typical_p": [1], "tfs_z": [1]}


class Generation(Body):
    """How to answer, whatever the prompt. Answers are streamed unless that is declined.

    think  how much to think, in a word, for models that are told so; true and false say nothing
    """

    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] = ""
    think: bool | Name = False
    options: Options = Field(default_factory=Options)
    ignored = frozenset({"keep_alive", "context", "truncate", "shift"})
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {"images": [[]], "logprobs": [False]}
    advice: ClassVar[Mapping[str, str]] = {
        "images": "this model reads text alone; leave it out",
        "template": "the model's own chat format is used; with raw, the prompt is read as it is",
    }

    @property
    def schema_wanted(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer must fit."""
        return {"type": "object"} if self.format == "json" else self.format or None

    @property
    def effort(self) -> str | None:
        """How much the model shall think, if it can be told so."""
        return self.think if isinstance(self.think, str) else self.options.reasoning_effort

    def wanted(self) -> Wanted:
        """How the answer is wanted."""
        options = self.options
        limit = options.num_predict
        return Wanted(
            max_tokens=limit if limit is not None and limit > 0 else None,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            seed=options.seed,
            stop=[options.stop] if isinstance(options.stop, str) else options.stop or [],
        )


def error_body(error: ApiError) -> dict[str, Any]:
    """What is wrong, as Ollama's clients read it."""
    return {"error": str(error)}
