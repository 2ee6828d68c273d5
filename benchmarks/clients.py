"""Clients that are slow to install, in their real packages, against a server: what works.

    python benchmarks/clients.py --model demo
    python benchmarks/clients.py --only llm,instructor --keep /tmp/clients

Each is installed into a virtual environment of its own, which is removed again, and runs a short
program there. The table says what came of it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

from common import serving

NAME = "devstral"  # the model that mistral-vibe asks for


class Client(NamedTuple):
    """A client: what is installed, and the program that tries it. {url} stands for the address."""

    packages: str
    program: str


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
name = "devstral"
provider = "here"
alias = "here"
''')
vibe = pathlib.Path(sys.executable).with_name("vibe")
done = subprocess.run([vibe, "-p", "Say hello.", "--max-turns", "1"], capture_output=True, text=True, timeout=500)
assert "error" not in done.stderr.lower(), done.stderr[-500:]
print(done.stdout[-200:], done.stderr[-300:])
""",
    ),
}


def main() -> None:
    """Try the clients and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub repository or an alias (%(default)s)")
    parser.add_argument("--only", help="some of them, with commas between: " + ", ".join(CLIENTS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the environments lie and stay")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(CLIENTS)
    print("| client | version | result |\n| --- | --- | --- |")
    options = ["--model", args.model, "--name", NAME, "--prefix-disk", "0"]
    with tempfile.TemporaryDirectory() as scratch, serving(*options) as (url, _):
        for name in names:
            version, result = _tried(CLIENTS[name], name, args.keep or Path(scratch), url)
            print(f"| {name} | {version} | {result} |", flush=True)


def _tried(client: Client, name: str, folder: Path, url: str) -> tuple[str, str]:
    """The version that was installed, and what came of its program."""
    place = folder / name
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        packages = client.packages.split()
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            return "–", f"not installed: {_last(done.stderr)}"
    package = re.split(r"[\[ ]", client.packages)[0]
    shown = subprocess.run([python, "-m", "pip", "show", package], capture_output=True, text=True).stdout
    version = re.search(r"^Version: (.+)$", shown, re.M)
    homes = {"HOME": str(place), "LLM_USER_PATH": str(place / "llm"), "VIBE_HOME": str(place / "vibe")}
    program = client.program.replace("{url}", url)
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, timeout=600, env=homes | {"PATH": "/usr/bin:/bin"}
    )
    return version[1] if version else "–", "works" if not done.returncode else f"fails: {_last(done.stderr)}"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200].replace("|", "/") if lines else "without a word"


if __name__ == "__main__":
    main()
