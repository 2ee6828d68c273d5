"use strict";
// A chat over this server's own API. Everything a model says is put in as text, never as markup.
const byId = (id) => document.getElementById(id);
const messages = [];
let model = "", key = "", running = null;

function show(role, text) {
  const box = document.createElement("p");
  box.className = `message ${role}`;
  box.textContent = text;
  byId("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function call(path, options = {}) {
  let answer = await fetch(path, { ...options, headers: headers() });
  if (answer.status === 401) {
    key = prompt("This server wants a key:") ?? "";
    answer = await fetch(path, { ...options, headers: headers() });
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(question) {
  messages.push({ role: "user", content: question });
  show("user", question);
  const box = show("assistant", "");
  running = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  byId("told").textContent = "…";
  const began = performance.now();
  let text = "";
  try {
    const body = JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true } });
    const answer = await call("v1/chat/completions", { method: "POST", body, signal: running.signal });
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      text += event.choices[0]?.delta?.content ?? "";
      box.textContent = text;
      box.scrollIntoView({ block: "end" });
      if (event.usage) {
        const seconds = (performance.now() - began) / 1000;
        byId("told").textContent = `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`;
      }
    }
  } catch (error) {
    byId("told").textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  if (text) {
    messages.push({ role: "assistant", content: text });
  } else {
    messages.pop(); // nothing was answered: the question goes back to where it can be changed
    box.previousSibling.remove();
    box.remove();
    byId("question").value = question;
  }
  running = null;
  byId("send").hidden = false;
  byId("stop").hidden = true;
  byId("question").focus();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || running) return;
  byId("question").value = "";
  ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  byId("messages").replaceChildren();
  byId("told").textContent = "";
  byId("question").focus();
});
call("v1/models")
  .then((answer) => answer.json())
  .then((list) => { model = list.data[0].id; byId("model").textContent = model; })
  .catch((error) => { byId("told").textContent = error.message; });
