"""Ollama's API, for the many clients that speak nothing else.

chat, generate, show  the endpoints that bodies are sent to
fields                what the first two have in common
models                what is asked without a body: which model there is
replies               the shapes of answers, for the OpenAPI document
answers               pieces of an answer → lines of JSON
"""
