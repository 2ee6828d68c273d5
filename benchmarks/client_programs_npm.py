"""Clients that npm installs, and the program that tries each."""

from __future__ import annotations

from client_programs import Client

NPM_CLIENTS = {
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
    "Continue": Client(
        "@continuedev/cli",
        """
import json, os, pathlib, subprocess
place = pathlib.Path("{place}")
for provider, address in {"openai": "{url}/v1", "ollama": "{url}"}.items():
    model = {"name": "here", "provider": provider, "model": "long", "apiBase": address, "apiKey": "none"}
    config = place / (provider + ".yaml")
    config.write_text(json.dumps({"name": "here", "version": "0.0.1", "schema": "v1", "models": [model]}))
    command = [place / "node_modules" / ".bin" / "cn", "--config", config, "--exclude", "Exit", "-p"]
    for more in (["Say hello."], ["And now?", "--resume"]):
        asked = [*command, *more]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert not done.returncode and "Hello, here I am." in done.stdout, (done.stdout + done.stderr)[-500:]
""",
        installer="npm",
    ),
    "opencode": Client(
        "opencode-ai",
        """
import json, pathlib, subprocess
kinds = ("openai-compatible", "openai", "anthropic")  # chats, responses and messages
limits = {"long": {"name": "long", "limit": {"context": 32768, "output": 200}}}
options = {"baseURL": "{url}/v1", "apiKey": "none"}
providers = {f"by-{kind}": {"npm": f"@ai-sdk/{kind}", "options": options, "models": limits} for kind in kinds}
for kind in kinds:
    model = f"by-{kind}/long"
    told = {"provider": providers, "model": model, "small_model": model, "autoupdate": False, "share": "disabled"}
    pathlib.Path("opencode.json").write_text(json.dumps(told))
    for more in ([], ["--continue"]):
        command = ["{place}/node_modules/.bin/opencode", "run", "--format", "json", *more, "Say hello."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        kinds_told = [event["type"] for event in events]
        assert "error" not in kinds_told and "text" in kinds_told, (done.stdout + done.stderr)[-500:]
        assert more or "tool_use" in kinds_told, done.stdout[-500:]
""",
        installer="npm",
    ),
    "Qwen Code": Client(
        "@qwen-code/qwen-code",
        """
import os, subprocess
os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": "{url}/v1", "OPENAI_MODEL": "long"}
for more in ([], ["--continue"]):
    command = ["{place}/node_modules/.bin/qwen", "--auth-type", "openai", *more, "-p", "Say hello."]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert not done.returncode and "Hello, here I am." in done.stdout, (done.stdout + done.stderr)[-500:]
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
