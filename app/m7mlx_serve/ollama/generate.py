"""POST /api/generate: the answer to one prompt, or, raw, how it goes on."""

from __future__ import annotations

from array import array
from typing import Any, Self

from m7mlx.tokens.infill import infill_ids
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.conversation import Conversation
from m7mlx_serve.endpoint import Endpoint, Prompts
from m7mlx_serve.ollama.fields import Generation, error_body
from m7mlx_serve.ollama.replies import OllamaError, TextLine
from m7mlx_serve.strict import Text


class GenerateRequest(Generation):
    """The body of POST /api/generate. One without a prompt has the model loaded, no more.

    raw     read the prompt as it is, not as a message
    suffix  what stands behind the answer, for models that fill in the middle
    """

    prompt: Text = ""
    system: Text = ""
    raw: bool = False
    suffix: Text = ""

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of the prompt, and what the answer follows."""
        if not self.prompt:
            return Prompts([])
        if self.suffix:
            ids = infill_ids(tokenizer, self.prompt, self.suffix)
            return Prompts([array("i", ids)], self.schema_wanted)
        if self.raw:
            return Prompts([array("i", tokenizer.encode(self.prompt, tokenizer.add_bos))], self.schema_wanted)
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}]
        return Conversation(messages, schema=self.schema_wanted, effort=self.effort).prompts(tokenizer)

    def without_texts(self) -> Self:
        """Leave out the prompt and the schema."""
        nothing: dict[str, Any] = {"prompt": "", "system": "", "suffix": "", "format": ""}
        return self.model_copy(update=nothing)


ENDPOINT = Endpoint(
    "/api/generate", "Answer a prompt, by Ollama's API", GenerateRequest, TextLine, TextLine, error_body, OllamaError
)
