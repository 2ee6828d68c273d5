"""POST /v1/embeddings: texts, or ids, as vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Body, Endpoint, Prompts, Wanted
from m7mlx_serve.errors import ApiError
from m7mlx_serve.openai.inputs import Inputs, encode_inputs
from m7mlx_serve.openai.replies import EmbeddingList, ErrorReply


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings.

    pooling    the mean of all tokens' last hidden states, or that of the last token
    normalize  whether each vector has length 1
    """

    input: Inputs
    stream: Literal[False] = False
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    ignored = frozenset({"user"})
    advice: ClassVar[Mapping[str, str]] = {
        "input_type": "this model reads all texts alike; put what it shall know of one into the text"
    }

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of all texts."""
        return Prompts(encode_inputs(tokenizer, self.input, "input"))

    def wanted(self) -> Wanted:
        """Nothing is answered."""
        return Wanted()

    def without_texts(self) -> Self:
        """Leave out the texts."""
        return self.model_copy(update={"input": ""})


ENDPOINT = Endpoint(
    "/v1/embeddings",
    "Make vectors of texts",
    EmbeddingRequest,
    EmbeddingList,
    EmbeddingList,
    ApiError.body,
    ErrorReply,
)
