"""OpenAI's API: what its clients send and what they are answered, one module for each endpoint.

chat, text      the endpoints: their bodies, and the prompt that a body makes
messages        messages as clients send them, and put answers back
fields          what both bodies have in common
replies         the shapes of answers, for the OpenAPI document
answers         a body → requests of the engine, and pieces of answers → replies and events
choices         one of several answers on its way to the client

A further API is a package like this one, with its endpoints in `m7mlx_serve.endpoints` and what
answers them in `m7mlx_serve.app`.
"""
