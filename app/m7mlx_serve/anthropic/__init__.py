"""Anthropic's API: what its clients send to /v1/messages, and what they are answered.

messages, count  the endpoints: their bodies, and the conversation that a body makes
blocks           the blocks that messages consist of
replies          the shapes of answers and events, for the OpenAPI document
answers          pieces of an answer → a message, or the events of a stream
errors           what is wrong, as these clients read it
"""
