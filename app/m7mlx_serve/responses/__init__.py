"""OpenAI's API of responses: what its clients send to /v1/responses, and what they are answered.

create   the endpoint: its body, and the conversation that a body makes
items    the items that conversations consist of, as clients send them
tools    tools and which of them may be called
output   pieces of an answer → items, and the events that tell of them
answers  a whole response, or the events of a stream
held     responses that are held for those that go on from them
routes   what is told of a response that is held
replies  the shapes of answers and events, for the OpenAPI document
"""
