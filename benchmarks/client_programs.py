"""Clients that pip installs, and the program that tries each; what npm installs is beside it.

Agents ask the model `long`: their prompts have more tokens than the context of a small model. It
knows nothing; it calls a tool, whichever it is, and says "Hello, here I am." to what that gave.
"""

from __future__ import annotations

from typing import NamedTuple

NAME = "devstral"  # the model that mistral-vibe asks for
LONG = "long"


class Client(NamedTuple):
    """A client: what is installed, and the program that tries it.

    In programs {url} stands for the address, {folder} for the model's folder and {place} for where
    the packages are.

    installer  "pip"; "npm"; "" for packages that must be here already
    is_script  whether the program is JavaScript, not Python
    left_out   packages that a client says it needs, which are large and not used here
    """

    packages: str
    program: str
    installer: str = "pip"
    is_script: bool = False
    left_out: str = ""


PIP_CLIENTS = {
    "huggingface_hub": Client(
        "huggingface_hub",
        """
from huggingface_hub import InferenceClient
api = InferenceClient(base_url="{url}/v1", api_key="none")
assert api.chat_completion([{"role": "user", "content": "Hi"}], max_tokens=4).choices[0].message
assert list(api.chat_completion([{"role": "user", "content": "Hi"}], max_tokens=4, stream=True))
""",
    ),
    "llm": Client(
        "llm llm-ollama",
        """
import pathlib, llm, os
folder = pathlib.Path(os.environ["LLM_USER_PATH"])
folder.mkdir(exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(
    "- {model_id: here, model_name: devstral, api_base: '{url}/v1', supports_tools: true, supports_schema: true}")
model = llm.get_model("here")
model.key = "none"
conversation = model.conversation()
assert conversation.prompt("Hi", max_tokens=4).text() is not None
assert conversation.prompt("And?", max_tokens=4, stream=False).text() is not None
found = model.prompt("?", schema={"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}).json()
os.environ["OLLAMA_HOST"] = "{url}"
def weather(day: str) -> str:
    return "sunny"
model = llm.get_model("ollama/long:latest")
conversation = model.conversation()
assert conversation.chain("Is it sunny?", tools=[weather]).text() == "Hello, here I am."
assert conversation.prompt("And now?").text() == "Hello, here I am."
assert len(llm.get_embedding_model("ollama/long:latest").embed("Hi")) > 1
""",
    ),
    "pydantic-ai": Client(
        "pydantic-ai-slim[openai]",
        """
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
class City(BaseModel):
    is_large: bool
provider = OpenAIProvider(base_url="{url}/v1", api_key="none")
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    agent = Agent(kind("devstral", provider=provider), output_type=City, model_settings={"max_tokens": 200})
    assert isinstance(agent.run_sync("Is Paris large?").output, City)
""",
    ),
    "instructor": Client(
        "instructor openai",
        """
import instructor, openai
from pydantic import BaseModel
class City(BaseModel):
    is_large: bool
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    api = instructor.from_openai(openai.OpenAI(base_url="{url}/v1", api_key="none"), mode=mode)
    question = [{"role": "user", "content": "Is Paris large?"}]
    found = api.chat.completions.create(model="devstral", response_model=City, messages=question, max_tokens=200)
    assert isinstance(found, City)
""",
    ),
    "smolagents": Client(
        "smolagents[openai]",
        """
from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool
@tool
def weather(day: str) -> str:
    \"""Tell the weather.

    Args:
        day: the day
    \"""
    return "sunny"
model = OpenAIServerModel("long", api_base="{url}/v1", api_key="none")
for kind in (ToolCallingAgent, CodeAgent):
    for stream_outputs in (False, True):
        agent = kind(tools=[weather], model=model, max_steps=2, verbosity_level=0, stream_outputs=stream_outputs)
        found = agent.run("Is it sunny?")  # one calls a tool, which may be the one that ends; the other writes code
        assert found is not None and (kind is ToolCallingAgent or "Hello, here I am." in found), found
""",
    ),
    "aider": Client(
        "aider-chat",
        """
import os, pathlib, subprocess, sys
os.environ |= {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "none", "OLLAMA_API_BASE": "{url}"}
subprocess.run(["git", "init", "-q"], check=True)
aider = pathlib.Path(sys.executable).with_name("aider")
options = ["--yes-always", "--no-analytics", "--no-check-update", "--no-show-model-warnings", "--no-auto-commits"]
for model in ("openai/long", "ollama_chat/long"):
    for more in ([], ["--restore-chat-history"]):
        command = [aider, "--model", model, *options, *more, "--message", "Say hello."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert not done.returncode and "Hello, here I am." in done.stdout, done.stdout[-500:]
""",
    ),
    "Open WebUI": Client(
        "open-webui",
        """
import os, pathlib, subprocess, sys, time
import httpx
os.environ |= {
    "DATA_DIR": "{place}/data", "WEBUI_SECRET_KEY": "x", "OPENAI_API_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none",
    "OLLAMA_BASE_URL": "{url}", "RAG_EMBEDDING_ENGINE": "ollama", "RAG_OLLAMA_BASE_URL": "{url}",
    "RAG_EMBEDDING_MODEL": "long:latest", "OFFLINE_MODE": "true", "ENABLE_VERSION_UPDATE_CHECK": "false",
    "DO_NOT_TRACK": "true", "SCARF_NO_ANALYTICS": "true", "ANONYMIZED_TELEMETRY": "false"}
pathlib.Path("{place}/data").mkdir(exist_ok=True)
command = [pathlib.Path(sys.executable).with_name("open-webui"), "serve", "--host", "127.0.0.1", "--port", "18092"]
def ask(path, **body):
    answer = api.post(path, json=body)
    assert answer.status_code == 200 and "Hello, here I am." in answer.text, (path, body, answer.text[:300])
    return answer
with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
    try:
        with httpx.Client(base_url="http://127.0.0.1:18092", timeout=300) as api:
            until = time.monotonic() + 500
            while time.monotonic() < until:
                try:
                    if api.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(1)
            me = {"name": "a", "email": "a@example.com", "password": "A-secret-of-1"}
            found = api.post("/api/v1/auths/signup", json=me)
            if found.status_code != 200:
                found = api.post("/api/v1/auths/signin", json=me)
            api.headers["Authorization"] = "Bearer " + found.json()["token"]
            models = {model["id"] for model in api.get("/api/models").json()["data"]}
            assert models >= {"long", "long:latest"}, models  # by OpenAI's API, and by Ollama's
            assert api.get("/ollama/api/version").json()["version"]
            parameters = {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}
            function = {"name": "weather", "parameters": parameters}
            settings = {"temperature": 0.5, "num_ctx": 4096, "use_mmap": True, "reasoning_effort": "low"}
            for model in ("long", "long:latest"):
                said = [{"role": "user", "content": "Say hello."}]
                answer = ask("/api/chat/completions", model=model, messages=said, stream=False).json()
                said += [answer["choices"][0]["message"], {"role": "user", "content": "And now?"}]
                answer = api.post("/api/chat/completions", json={
                    "model": model, "messages": said, "stream": True, "params": settings}).text
                assert "Hello" in answer and "error" not in answer, answer
                tools = [{"type": "function", "function": function}]
                answer = api.post("/api/chat/completions", json={
                    "model": model, "messages": said, "tools": tools, "stream": False}).json()
                assert answer["choices"][0]["message"]["tool_calls"], answer
                for task in ("title", "tags", "follow_up", "queries"):
                    ask(f"/api/v1/tasks/{task}/completions", model=model, messages=said, type="web_search")
            ask("/api/v1/messages", model="long", max_tokens=20, messages=said[:1])
            # A file is read by its vectors.
            upload = {"file": ("a.txt", b"The window is sixteen tokens long. " * 20, "text/plain")}
            file = api.post("/api/v1/files/", files=upload, params={"process_in_background": False}).json()["id"]
            files = [{"type": "file", "id": file}]
            ask("/api/chat/completions", model="long", messages=said, stream=False, files=files)
    finally:
        server.terminate()
""",
        left_out="torch onnxruntime faster-whisper ctranslate2 opencv-python opencv-python-headless playwright",
    ),
    "mistral-vibe": Client(
        "mistral-vibe",
        """
import os, pathlib, subprocess, sys
home = pathlib.Path(os.environ["VIBE_HOME"])
home.mkdir(exist_ok=True)
(home / "config.toml").write_text('''
active_model = "here"
[[providers]]
name = "here"
api_base = "{url}/v1"
api_key_env_var = ""
[[models]]
name = "long"
provider = "here"
alias = "here"
''')
vibe = pathlib.Path(sys.executable).with_name("vibe")
done = subprocess.run([vibe, "-p", "Say hello.", "--max-turns", "3"], capture_output=True, text=True, timeout=500,
                      stdin=subprocess.DEVNULL)
assert not done.returncode and "error" not in done.stderr.lower(), done.stderr[-500:]
""",
    ),
    "oterm": Client(
        "oterm",
        """
import fcntl, os, pathlib, pty, select, struct, sys, termios, time
from ollama import Client
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
# What its parts ask: a name from Ollama's list, for OpenAI's API.
names = [model.model for model in Client(host="{url}").list().models]
provider = OpenAIProvider(base_url="{url}/v1", api_key="none")
assert Agent(OpenAIChatModel(names[0], provider=provider)).run_sync("Hi").output is not None
# The program itself comes up in a terminal.
child, terminal = pty.fork()
if not child:
    os.environ |= {"OLLAMA_HOST": "{url}".removeprefix("http://"), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    os.execv(pathlib.Path(sys.executable).with_name("oterm"), ["oterm"])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 35, 110, 0, 0))
shown, until = b"", time.monotonic() + 120
while b"Welcome" not in shown and time.monotonic() < until:
    if select.select([terminal], [], [], 1)[0]:
        shown += os.read(terminal, 65536)
os.kill(child, 15)
assert b"Welcome" in shown, shown[-300:]
""",
    ),
    "lm-eval": Client(
        "lm_eval",
        """
import math, os, pathlib, sys, tempfile
sys.path.append("{support}")
from eval_tasks import write_tasks
from lm_eval.models.openai_completions import LocalCompletionsAPI
from m7mlx_eval.adapter import M7LM
from m7mlx_eval.tasks import Selection, prepare, run_tasks
from m7mlx import load
prepare()
tasks = pathlib.Path(tempfile.mkdtemp())
selection = Selection(write_tasks(tasks)[:3], tasks)
options = {"model": "devstral", "base_url": "{url}/v1/completions", "tokenizer": "{folder}"}
theirs = run_tasks(lambda: LocalCompletionsAPI(**options), selection)["results"]
ours = run_tasks(lambda: M7LM(*load("{folder}")), selection)["results"]
for task, figures in ours.items():
    for name, value in figures.items():
        if isinstance(value, float) and "stderr" not in name:
            assert math.isclose(value, theirs[task][name], rel_tol=1e-3), (task, name, value, theirs[task][name])
""",
        installer="",
    ),
}
