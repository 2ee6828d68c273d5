"""POST /v1/messages/count_tokens: how many tokens a conversation has."""

from __future__ import annotations

from typing import Literal

from m7mlx_serve.anthropic.errors import error_body
from m7mlx_serve.anthropic.messages import MessageBody, MessageRequest
from m7mlx_serve.anthropic.replies import ErrorMessage, StreamEvent, TokenCount
from m7mlx_serve.endpoint import Endpoint, Wanted


class CountRequest(MessageBody):
    """The body of POST /v1/messages/count_tokens: that of /v1/messages, without its options."""

    stream: Literal[False] = False
    # Open WebUI asks with the whole body of a request.
    ignored = MessageBody.ignored | set(MessageRequest.model_fields) - set(MessageBody.model_fields)

    def wanted(self) -> Wanted:
        """Nothing is answered."""
        return Wanted()


ENDPOINT = Endpoint(
    "/v1/messages/count_tokens",
    "Count the tokens of a conversation, by Anthropic's API",
    CountRequest,
    TokenCount,
    StreamEvent,
    error_body,
    ErrorMessage,
)
