"""Task files and data for lm-evaluation-harness, one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path

_FACTS = [
    ("The colour of a clear sky at noon is", ["blue", "green as grass", "black and white", "red"], 0),
    ("Water freezes at a temperature of", ["fifty degrees", "zero degrees Celsius", "a hundred degrees"], 1),
    ("A week has", ["nine days", "two days", "seven days", "as many days as a month"], 2),
    ("The opposite of hot is", ["cold", "warm", "a stove"], 0),
    ("Two and two make", ["3", "5", "4", "22"], 2),
    ("Bees make", ["milk", "honey", "bread and butter"], 1),
    ("The capital of France is", ["Rome", "Madrid", "Paris", "London, of course"], 2),
    ("A triangle has", ["three sides", "four sides", "no sides at all"], 0),
    ("The sun rises in the", ["west", "north-north-west", "east"], 2),
]
_TEXTS = [
    "The keeper of the lighthouse had not spoken to anyone for three weeks when the storm began. ",
    "def sums(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n",
    "Größe, naïveté and 東京 are words – as good as any.",
]


def write_tasks(folder: Path) -> list[str]:
    """Write four tasks into a folder; their names."""
    choices = [{"question": q, "choices": list(c), "answer": a} for q, c, a in _FACTS]
    _lines(folder / "choices.jsonl", choices)
    _lines(folder / "texts.jsonl", [{"text": text * n} for n, text in enumerate(_TEXTS, 1)])
    tasks = {
        "own_choice": """
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
output_type: multiple_choice
fewshot_split: test
num_fewshot: 2
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
        "own_ending": """
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
output_type: loglikelihood
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
        "own_text": """
doc_to_text: ""
doc_to_target: "{{text}}"
output_type: loglikelihood_rolling
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
        "own_answer": """
doc_to_text: "Q: {{question}} …\\nA:"
doc_to_target: "{{choices[answer]}}"
output_type: generate_until
generation_kwargs: {until: ["\\n", "Q:", "e"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
""",
    }
    for name, text in tasks.items():
        data = folder / ("texts.jsonl" if name == "own_text" else "choices.jsonl")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {json.dumps(str(data))}}}\n"
        (folder / f"{name}.yaml").write_text(head + "test_split: test" + text, encoding="utf-8")
    return list(tasks)


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
