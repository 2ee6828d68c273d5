"""m7mlx-eval --tasks.

Lm-evaluation-harness with our adapter, and with its own for Hugging Face's models.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from eval_tasks import write_tasks
from models import random_weights, small_config, write_folder
from needs import require
from values import number

require("eval")
import datasets  # noqa: E402
import evaluate.config  # noqa: E402
import huggingface_hub.constants  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from m7mlx_eval.adapter import M7LM  # noqa: E402
from m7mlx_eval.answers import generation_request  # noqa: E402
from m7mlx_eval.cli import main  # noqa: E402
from m7mlx_eval.journal import Journal  # noqa: E402
from m7mlx_eval.tasks import Selection, prepare, run_tasks  # noqa: E402

from m7mlx.errors import InputError  # noqa: E402
from m7mlx.loading import load  # noqa: E402
from m7mlx.model import Mistral  # noqa: E402

pytestmark = [
    pytest.mark.eval,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take back what `prepare` sets for a process, and keep data sets out of the user's cache."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub")}
    before = dict(os.environ)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A window of 16 and Mistral's v1 tokenizer."""
    config = small_config(vocab_size=32000, sliding_window=16, n_layers=2)
    return write_folder(tmp_path_factory.mktemp("mistral") / "model", config)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


NAMES = ("own_choice", "own_ending", "own_text", "own_answer")


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("t", 0, 1))


# --- against the harness's own adapter --------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.demo
@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_results_are_those_of_the_harness_for_hugging_face(
    kind: str,
    max_length: int | None,
    tmp_path: Path,
    tasks: Path,
    mistral_folder: Path,
    demo_model: Path,
) -> None:
    """Both sides have equal weights in float32.

    Texts are seen whole, and in another run everything is longer than what is seen.
    """
    # Which transformers takes from a file that is not there.
    folder, more = mistral_folder, {"add_bos_token": True}
    if kind == "tokenizer.json":
        more = {}
        folder = write_folder(tmp_path / "model", small_config(vocab_size=49152, sliding_window=None, n_layers=2))
        (folder / "tokenizer.model").unlink()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model / name, folder)
    prepare()
    from lm_eval.models.huggingface import HFLM

    selection = Selection(NAMES, tasks)
    ours = run_tasks(lambda: M7LM(*load(folder), batch_size=3, max_length=max_length), selection)
    theirs = run_tasks(
        lambda: HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=max_length, **more),
        selection,
    )
    assert set(ours["results"]) == set(theirs["results"]) == set(NAMES)
    compared = 0
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-3, abs=1e-3), (name, metric)
                compared += "_stderr" not in metric
    assert compared == 9
    for name in NAMES:
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for (mine,), (his,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(his, tuple):
                    assert mine[0] == pytest.approx(his[0], abs=1e-3) and mine[1] == his[1]
                else:
                    assert mine == (his if isinstance(his, str) else pytest.approx(his, rel=1e-5))


# --- the adapter by itself --------------------------------------------------------------------


def test_neither_company_nor_order_change_a_likelihood(model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    requests = [
        asked("loglikelihood", context, continuation)
        for context in ("", "Bees", "Bees make", "Bees make a great deal of noise, and what they make in the end is")
        for continuation in (" honey", " milk", " honey and wax and much more than that", " a")
    ]
    together = M7LM(model, tokenizer, batch_size=5).loglikelihood(requests)
    alone = [M7LM(model, tokenizer, batch_size=1).loglikelihood([request])[0] for request in requests]
    for (one, greedy), (other, too) in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-3) and greedy == too
    backwards = M7LM(model, tokenizer, batch_size=16).loglikelihood(requests[::-1])
    assert [value for value, _ in backwards[::-1]] == pytest.approx([value for value, _ in together], abs=1e-3)


def test_the_greedy_answer_is_known_as_such(model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    lm = M7LM(model, tokenizer)
    context = tokenizer.encode("Bees make", add_bos=True)
    best = int(number(mx.argmax(model(mx.array([context]))[0, -1])))
    (right, greedy), (wrong, not_greedy) = lm._loglikelihood_tokens(
        [(None, context, [best]), (None, context, [best - 1])]
    )
    assert greedy and not not_greedy and right > wrong


def test_what_contexts_have_in_common_is_read_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(model_folder)
    config = small_config(vocab_size=32768, sliding_window=None, n_layers=1)
    model.config = config  # only the cache looks at it
    model.model.layers = model.model.layers[:1]
    read: list[int] = []
    hidden = Mistral.hidden

    def counted(self: Mistral, ids: mx.array, cache: Any = None) -> mx.array:
        read.append(ids.size)
        return hidden(self, ids, cache)

    monkeypatch.setattr(Mistral, "hidden", counted)
    examples = "Question: what is it?\nAnswer: that\n\n" * 9
    contexts = [examples + f"Question: {n}\nAnswer:" for n in range(6)]
    requests = [asked("loglikelihood", c, e) for c in contexts for e in (" A", " B", " C", " D and more")]
    lm = M7LM(model, tokenizer, batch_size=4)
    lm.loglikelihood(requests)
    shared, whole = len(tokenizer.encode(examples)), len(tokenizer.encode(contexts[0]))
    assert shared < sum(read) < shared + 6 * (whole - shared) + 6 * 4 * 4 < len(requests) * whole / 4


def test_a_text_rolls_on_beyond_the_window_and_is_cut_where_asked(model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    text = "Bees make honey, and honey makes bees. " * 9
    (rolled,) = M7LM(model, tokenizer).loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    (cut,) = M7LM(model, tokenizer, max_length=9).loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    bos = tokenizer.bos_id
    ids = [bos, *tokenizer.encode(text, add_bos=True)]
    logits = model(mx.array([ids]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = sum(logprobs[i, token].item() for i, token in enumerate(ids[1:]))
    assert rolled == pytest.approx(expected, abs=1e-2)
    assert abs(cut - rolled) > 1


def test_a_chat_is_encoded_as_the_chat_does_it(model_folder: Path) -> None:
    """And what a task's data says stays text."""
    model, tokenizer = load(model_folder)
    lm = M7LM(model, tokenizer)
    messages = [{"role": "user", "content": "a [/INST] b</s> \ufdd1 c"}]
    begun = [*messages, {"role": "assistant", "content": "The answer"}]
    expected = tokenizer.chat.encode(messages)
    assert lm.tok_encode(lm.apply_chat_template(messages)) == expected
    prompt = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(prompt) == expected + tokenizer.encode("The answer")
    before, after = lm._pair(prompt, " is 4")
    assert list(before + after) == expected + tokenizer.encode("The answer is 4")


def test_drawn_answers_differ_from_each_other_and_not_from_run_to_run(model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 40, "max_gen_toks": 6, "until": []}
    requests = [asked("generate_until", "Bees make", options)] * 3
    first, again = (M7LM(model, tokenizer, batch_size=n).generate_until(requests) for n in (2, 3))
    assert first == again and len(set(first)) == 3


def test_options_of_answers() -> None:
    request = generation_request(range(1, 90), {"until": ["", "\n"], "max_gen_toks": 20}, 64, 0)
    assert request.ids == list(range(46, 90)) and request.max_tokens == 20
    assert request.stop == ["\n"] and request.sampling.temperature == 0
    drawn = generation_request([1], {"do_sample": True, "temperature": 0.7, "top_p": "0.9"}, 4096, 0).sampling
    assert (drawn.temperature, drawn.top_p) == (0.7, 0.9)
    assert generation_request([1], {"do_sample": False, "temperature": 0.7}, 4096, 0).sampling.temperature == 0
    assert generation_request([1], {"until": "x", "max_tokens": 3}, 4096, 0).stop == ["x"]
    for options, reason in (
        ({"num_beams": 4}, "ask for num_beams"),
        ({"max_gen_toks": 64}, "answers of 64 tokens, where the context holds 64"),
        ({"max_gen_toks": "many"}, "cannot be used"),
    ):
        with pytest.raises(InputError, match=reason):
            generation_request([1], options, 64, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"batch_size": 0}, "batch size"), ({"max_length": 1}, "context must lie"), ({"max_length": 5000}, "4096")],
)
def test_an_adapter_needs_sensible_numbers(options: dict[str, Any], reason: str, model_folder: Path) -> None:
    with pytest.raises(InputError, match=reason):
        M7LM(*load(model_folder), **options)


def test_a_continuation_that_is_none_is_refused(model_folder: Path) -> None:
    with pytest.raises(InputError, match="a continuation has 0 tokens"):
        M7LM(*load(model_folder)).loglikelihood([asked("loglikelihood", "Bees", "")])


# --- runs that are killed ---------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from m7mlx_eval import cli, journal
write, count = journal.Journal._write, []
def dying(self, entry):
    count.append(entry)
    if len(count) == 22:  # a header and twenty answers later, in the middle of a line
        self._file.write(b'{"key": "abc", "ans')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, entry)
journal.Journal._write = dying
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_with_what_is_missing(
    tmp_path: Path,
    tasks: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def arguments(folder: Path | str, output: str) -> list[str]:
        chosen = ["--tasks", "own_choice,own_ending,own_answer", "--include-path", str(tasks)]
        return [str(folder), *chosen, "--output", str(tmp_path / output), "--save", str(tmp_path / f"{output}.json")]

    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments(model_folder, "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (kept,) = (tmp_path / "out").glob("answers-*.jsonl")
    assert len(kept.read_bytes().splitlines()) == 22
    added: list[str] = []
    add = Journal.add

    def counted(self: Journal, key: str, answer: Any) -> None:
        added.append(key)
        add(self, key, answer)

    monkeypatch.setattr(Journal, "add", counted)
    assert main(arguments(model_folder, "out")) == 0
    resumed = len(added)
    assert main(arguments(model_folder, "whole")) == 0
    assert len(added) - resumed == resumed + 20
    results = [json.loads((tmp_path / name).read_text())["results"] for name in ("out.json", "whole.json")]
    assert results[0] == results[1] == json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert len((tmp_path / "out" / "samples-own_answer.jsonl").read_text().splitlines()) == 9
    added.clear()
    assert main(arguments(model_folder, "out")) == 0 and not added  # all is there
    config = small_config(vocab_size=32768, sliding_window=16, n_layers=2)
    other = write_folder(tmp_path / "other", config, random_weights(config, seed=5))
    assert main(arguments(other, "out")) == 0  # never another model's answers
    assert len(added) == resumed + 20 and len(list((tmp_path / "out").glob("answers-*.jsonl"))) == 2
    added.clear()
    # Nor those of other options.
    assert main([*arguments(model_folder, "out"), "--context", "60"]) == 0
    assert len(added) == resumed + 20


def test_a_damaged_journal_is_said(tmp_path: Path) -> None:
    with Journal(tmp_path, {"a": 1}) as journal:
        journal.add("x", [1.5, True])
        journal.add("y", "text")
    with Journal(tmp_path, {"a": 1}) as journal:
        assert journal.answers == {"x": [1.5, True], "y": "text"}
    data = journal.path.read_bytes()
    for broken in (data.replace(b'"key"', b'"kex"', 1), b"{}\n" + data, data.replace(b"1.5", b"1.5.", 1)):
        journal.path.write_bytes(broken)
        with pytest.raises(InputError, match="is damaged; delete it"):
            Journal(tmp_path, {"a": 1})


# --- what cannot be run -----------------------------------------------------------------------


def test_tasks_that_cannot_be_run_are_one_line(
    tmp_path: Path,
    tasks: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval import tasks as harness

    manager = harness.TaskManager
    theirs = [str(Path(harness.__file__).parent / name) for name in ("gsm8k", "humaneval", "mmlu/default")]
    everything = manager(include_path=theirs, include_defaults=False)

    def once(include_path: str | None = None, include_defaults: bool = True) -> Any:
        return everything if include_defaults else manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", once)  # reading 14,000 task files takes seconds
    (tmp_path / "wrong.yaml").write_text("task: wrong\ndataset_path: /no/such.py\ntest_split: test\n")
    (tmp_path / "bad.yaml").write_text("task: [")
    cases: list[tuple[list[str], str]] = [
        (["gsm8kk"], "there is no task 'gsm8kk'; there is gsm8k"),
        (["gsm8k"], "the data of gsm8k cannot be reached"),
        (["mmlu_anatomy"], "the data of mmlu_anatomy cannot be reached"),
        (["humaneval"], "humaneval runs programs that the model writes"),
        (["humaneval", "--allow-code"], "the data of humaneval cannot be reached"),
        (["no.yaml"], "there is no task file no.yaml"),
        ([str(tmp_path / "wrong.yaml")], "wrong.yaml cannot be loaded: RuntimeError: Dataset scripts are no longer"),
        ([str(tmp_path / "bad.yaml")], "bad.yaml cannot be loaded"),
        (["own_choice", "--include-path", "/no/such"], "--include-path: there is no folder /no/such"),
        ([","], "--tasks names no task"),
        ([str(tasks / "own_answer.yaml"), "--context", "9"], "answers of 9 tokens, where the context holds 9"),
    ]
    for given, reason in cases:
        assert main([str(model_folder), "--tasks", *given]) == 2, given
        said = capsys.readouterr().err
        # Tqdm was there before us here.
        lines = [line for line in said.splitlines() if line and "it/s" not in line]
        assert reason in said and len(lines) == 1, (given, said)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([str(model_folder), "--tasks", "gsm8k"]) == 2
    assert "--tasks needs the extra eval (lm_eval): pip install 'm7mlx[eval]'" in capsys.readouterr().err


CODE = {
    "a function": "doc_to_text: !function evil.text",
    "a function of an included file": "include: sub/more.yaml",
    "a function of the standard library": "doc_to_text: !function os.system",
    "a function by a path": "doc_to_text: !function ../sub/evil.text",
    "a class": "class: !function evil.Task",
    "a metric": "metric_list:\n  - {metric: ./evil_metric, hf_evaluate: true}",
    "a metric's function": "metric_list:\n  - {metric: !function evil.text}",
    "a template": """doc_to_text: "{{ cycler.__init__.__globals__.os.system('touch RAN') }}" """,
    "a template's target": """doc_to_target: "{{ ''.__class__.__mro__[1].__subclasses__() }}" """,
}


@pytest.mark.parametrize("kind", CODE)
def test_no_program_of_a_stranger_runs_unasked(
    kind: str,
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "RAN"
    write_tasks(tmp_path)
    (tmp_path / "sub").mkdir()
    evil = f"open({str(ran)!r}, 'w').close()\ndef text(doc):\n    return 'x'\nclass Task: ..."
    for place in (tmp_path, tmp_path / "sub"):
        (place / "evil.py").write_text(evil)
    (tmp_path / "sub" / "more.yaml").write_text("doc_to_text: !function evil.text\n")
    (tmp_path / "evil_metric").mkdir()
    (tmp_path / "evil_metric" / "evil_metric.py").write_text(evil)
    task = (tmp_path / "own_choice.yaml").read_text().replace("own_choice", "own_evil")
    key = CODE[kind].split(":")[0]
    if "!function" in CODE[kind] or "{{" in CODE[kind] or key == "metric_list":
        task = "".join(block for block in re.split(r"(?m)^(?=\w)", task) if not block.startswith(key + ":"))
    if key == "include":
        task = "".join(line for line in task.splitlines(True) if not line.startswith("doc_to_text"))
    (tmp_path / "own_evil.yaml").write_text(task + CODE[kind] + "\n")
    given = [str(model_folder), "--tasks", str(tmp_path / "own_evil.yaml"), "--limit", "1"]
    status = main(given)
    said = capsys.readouterr().err
    assert not ran.exists(), said
    assert status != 0 and len([line for line in said.splitlines() if "m7mlx-eval: error" in line]) == 1, said
    if "template" not in kind:
        assert "--allow-code" in said
    else:
        assert "SecurityError" in said
    if kind == "a function":
        main([*given, "--allow-code"])
        assert ran.exists()


def test_a_task_file_by_its_path_and_few_examples(
    tmp_path: Path,
    tasks: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = tmp_path / "result.json"
    given = [str(model_folder), "--tasks", str(tasks / "own_choice.yaml"), "--save", str(result)]
    assert main([*given, "--limit", "4", "--num-fewshot", "1", "--chat", "--system", "Be brief"]) == 0
    found = json.loads(result.read_text())
    assert found["n-samples"]["own_choice"] == {"original": 9, "effective": 4}
    assert found["n-shot"]["own_choice"] == 1
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["task", "examples", "filter", "metric", "value", "±"]
    value = found["results"]["own_choice"]["acc,none"]
    assert f"{value:.4f}" in shown and "acc_norm" in shown
