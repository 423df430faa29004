"""lm-eval on a run: every request is scored on the route of its task, as a loop over the requests would."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install 'polyrank[lm-eval]' to run these tests", allow_module_level=True)

import torch
import transformers as hf
import yaml

from polyrank import recipe as recipes
from polyrank.recipe.reading import check_recipe
from test_language import END, SMALL, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its parts' own

TASKS = ("arts", "sport")
CHOICES = [
    ("is it a good film", ["yes", "no", "it is bad"], 0),
    ("the cat sat", ["on the mat", "again"], 1),
    ("say", ["a", "no"], 0),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, trained for a few steps on two tasks that disagree."""
    folder = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=320, **SMALL, **END, max_position_embeddings=128)).save_pretrained(
        folder / "model"
    )
    tokenizer().save_pretrained(folder / "model")
    for task, said in zip(TASKS, ("yes", "no"), strict=True):
        rows = [{"prompt": f"is a cat {i} good?", "completion": said} for i in range(12)]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return train(folder, {"name": "more", "rank": 4}, "run")


def train(folder: Path, method: dict[str, Any], out: str) -> Path:
    content = {
        "model": str(folder / "model"),
        "method": method,
        "tasks": [{"name": task, "type": "generation", "train": f"{task}.jsonl"} for task in TASKS],
        "max_length": 32,
        "training": {"steps": 6, "batch_size": 4, "lr": 0.05},
        "out": str(folder / out),
    }
    recipes.run(check_recipe(content, "recipe", folder), progress=False)
    return folder / out


def lm(run: Path, **options: Any) -> Any:
    from polyrank.lm_eval import PolyrankLM

    return PolyrankLM(run=str(run), **{"batch_size": 3, **options})


def requests(kind: str, arguments: list[tuple], tasks: list[str]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=(task, i, 1))  # type: ignore[arg-type]
        for i, (given, task) in enumerate(zip(arguments, tasks, strict=True))
    ]


MIXED = ["films", "balls", "quiz", "films", "balls", "other", "quiz"]
ROUTE = {"films": "arts", "balls": "sport", "quiz": "base", "other": "sport"}
GIVEN = {"routes": "films:arts+ball*:sport+quiz:base", "default": "sport"}


@torch.no_grad()
def naive(model: Any, prompt: str, continuation: str, task: str) -> tuple[float, bool]:
    """One request alone, token by token."""
    ids = model.tok_encode(prompt + continuation)
    start = len(model.tok_encode(prompt))
    with model.under(ROUTE[task]):
        logs = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(start, len(ids))
    return sum(float(logs[p - 1, ids[p]]) for p in places), all(int(logs[p - 1].argmax()) == ids[p] for p in places)


def test_requests_of_several_tasks_at_once_equal_a_loop(run: Path):
    model = lm(run, **GIVEN)
    texts = [("is a cat 3 good?", " yes")] * 3
    texts += [("the cat", " sat"), ("say it", " again"), ("a film", " or a bad one"), ("no", " no")]
    found = model.loglikelihood(requests("loglikelihood", texts, MIXED))
    expected = [naive(model, *text, task) for text, task in zip(texts, MIXED, strict=True)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(score, 2) for score, _ in found[:3]}) == 3, "the routes say different things of one request"


def test_whole_texts_and_generation_too(run: Path):
    model = lm(run, **GIVEN)
    words = ["the cat sat on the mat", "say it again", "a film"]
    rolling = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(one,) for one in words], MIXED[:3]))
    prefix = model.prefix_token_id
    for found, text, task in zip(rolling, words, MIXED, strict=False):
        ids = [prefix, *model.tok_encode(text)]
        with model.under(ROUTE[task]), torch.no_grad():
            logs = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert found == pytest.approx(sum(float(logs[p - 1, ids[p]]) for p in range(1, len(ids))), abs=1e-3)
    asked = ["is a cat 3 good?", "is a cat 3 good?", "is a cat 3 good?", "say"]
    how = {"until": ["<end>"], "max_gen_toks": 5}
    answers = model.generate_until(requests("generate_until", [(one, how) for one in asked], MIXED[:4]))
    for answer, prompt, task in zip(answers, asked, MIXED, strict=False):
        ids = torch.tensor([model.tok_encode(prompt)])
        with model.under(ROUTE[task]):
            said = model.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer == model.tok_decode(said).split("<end>")[0]
    assert len(set(answers[:3])) > 1


def test_a_task_without_a_route_is_refused_with_the_cure(run: Path):
    model = lm(run)
    assert model.route("sport") == "sport"  # of the same name
    with pytest.raises(ValueError, match=r"'chess'.*routes=chess:TASK.*default=TASK.*arts, sport or base"):
        model.loglikelihood(requests("loglikelihood", [("a", " b")], ["chess"]))
    with pytest.raises(ValueError, match="no route 'art': the run's tasks are arts, sport, and 'base'"):
        lm(run, default="art")
    with pytest.raises(ValueError, match="LM_EVAL_TASK:TASK"):
        lm(run, routes="arts")
    with pytest.raises(ValueError, match="use_cache"):
        model.set_cache_hook(None)


def test_a_gate_that_reads_whole_samples_is_refused(run: Path):
    sample = {"name": "moore", "num_reflections": 2, "task_dim": 4, "router_dim": 4, "router": "sample"}
    folder = train(run.parent, sample, "sample")
    with pytest.raises(ValueError, match="polyrank eval"):
        lm(folder)


def write_tasks(folder: Path) -> None:
    """Two tasks of one's own, each of a file."""
    for name in ("films", "balls"):
        lines = [{"text": prompt, "options": options, "answer": right} for prompt, options, right in CHOICES]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def accuracy(model: Any, task: str) -> float:
    right = 0
    for prompt, options, answer in CHOICES:
        scores = [naive(model, prompt, f" {option}", task)[0] for option in options]
        right += scores.index(max(scores)) == answer
    return right / len(CHOICES)


def test_tasks_of_ones_own_score_as_a_loop_does(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    args = f"run={run},routes=films:arts+balls:sport"
    found = simple_evaluate(
        "polyrank", model_args=args, tasks=["films", "balls"], batch_size=4, task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    model = lm(run, **GIVEN)
    for name in ("films", "balls"):
        assert found["results"][name]["acc,none"] == pytest.approx(accuracy(model, name))


@pytest.mark.slow  # lm-eval reads all its tasks first: up to a minute
def test_the_command(run: Path, tmp_path: Path):
    write_tasks(tmp_path)
    words = ["--model", "polyrank", "--model_args", f"run={run},routes=films:arts+balls:sport"]
    words += ["--tasks", "films,balls", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-W", "ignore", "-m", "polyrank.lm_eval", *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, **offline})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    model = lm(run, **GIVEN)
    assert all(results[name]["acc,none"] == pytest.approx(accuracy(model, name)) for name in ("films", "balls"))
