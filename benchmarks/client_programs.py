"""What is installed of each client, and the program that tries it.

Agents ask the model `long`, which has random weights: their prompts have more tokens than the
context of a small model.
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
    """

    packages: str
    program: str
    installer: str = "pip"
    is_script: bool = False


CLIENTS = {
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
        "llm",
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
done = subprocess.run([vibe, "-p", "Say hello.", "--max-turns", "1"], capture_output=True, text=True, timeout=500,
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
    "claude-code": Client(
        "@anthropic-ai/claude-code",
        """
import json, os, pathlib, subprocess
package = pathlib.Path("{place}/node_modules/@anthropic-ai/claude-code")
subprocess.run(["node", package / "install.cjs"], check=True, capture_output=True)
os.environ |= {"ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_MODEL": "long",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "long", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
command = [package.parents[1] / ".bin" / "claude", "-p", "Say hello.", "--output-format", "json"]
for more in ([], ["--continue"]):
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert not json.loads(done.stdout)["is_error"], done.stdout
""",
        installer="npm",
    ),
    "codex": Client(
        "@openai/codex",
        """
import os, pathlib, subprocess
home = pathlib.Path(os.environ["HOME"]) / ".codex"
home.mkdir(exist_ok=True)
(home / "config.toml").write_text('''
model = "long"
model_provider = "m7mlx"
[model_providers.m7mlx]
name = "m7mlx"
base_url = "{url}/v1"
wire_api = "responses"
''')
command = ["{place}/node_modules/.bin/codex", "exec", "--skip-git-repo-check", "--json"]
for more in (["Say hello."], ["resume", "--last", "And now?"]):
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert not done.returncode and "turn.completed" in done.stdout, done.stdout[-500:]
""",
        installer="npm",
    ),
    "ollama (JavaScript)": Client(
        "ollama",
        """
import { Ollama } from "ollama";
const api = new Ollama({ host: "{url}" }), model = (await api.list()).models[0].name;
const messages = [{ role: "user", content: "Hello" }], options = { num_predict: 4, num_ctx: 4096 };
const { message } = await api.chat({ model, messages, options });
const more = [...messages, message, { role: "user", content: "And?" }];
for await (const part of await api.chat({ model, messages: more, options, stream: true, think: false }));
await api.generate({ model, prompt: "Once", options, raw: true });
await api.show({ model });
await api.embeddings({ model, prompt: "a" });
await api.embed({ model, input: ["a", "b"] });
""",
        installer="npm",
        is_script=True,
    ),
    "Vercel AI SDK": Client(
        "ai @ai-sdk/openai-compatible @ai-sdk/openai @ai-sdk/anthropic zod",
        """
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
const baseURL = "{url}/v1", openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "m7mlx", baseURL, supportsStructuredOutputs: true });
const anthropic = createAnthropic({ baseURL, apiKey: "none" });
const inputSchema = z.object({ day: z.number().int().min(0).max(6) });
const tools = { weather: tool({ description: "Weather", inputSchema, execute: async () => "sunny" }) };
const output = Output.object({ schema: z.object({ ok: z.boolean() }) });
const prompt = "Is it sunny?", maxOutputTokens = 60;
for (const model of [compatible("devstral"), openai.chat("devstral"), openai("devstral"), anthropic("devstral")]) {
  await generateText({ model, prompt, maxOutputTokens: 4, presencePenalty: 0.1, frequencyPenalty: 0.1 });
  const found = await generateText({ model, prompt, maxOutputTokens, output });
  if (typeof found.output.ok != "boolean") throw new Error("no object");
  const prepareStep = ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {});
  const options = { model, prompt, maxOutputTokens, tools, toolChoice: "required", stopWhen: stepCountIs(2) };
  for await (const part of streamText({ ...options, prepareStep }).fullStream)
    if (part.type == "error") throw part.error;
}
""",
        installer="npm",
        is_script=True,
    ),
}
