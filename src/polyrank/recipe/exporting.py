"""A task of a finished run as files: the LoRA or the plain model, and its head as the ecosystem has it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from polyrank.corpus import Corpus
from polyrank.evaluate import evaluate
from polyrank.export import Exported, Format, beside, check, loras_of, refuse
from polyrank.models import HeadModel, MultiTaskModel
from polyrank.recipe.loading import load_tasks
from polyrank.recipe.reading import RecipeError
from polyrank.recipe.runs import Run
from polyrank.tasks import Examples, HeadTask, MultiLabel, Regression, Task, TokenClassification

COMPARED = 32  # held-out examples whose outputs are compared
POOLING = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}  # as sentence-transformers calls them
HEAD, LABELS = "head.safetensors", "labels.json"


@dataclass(frozen=True)
class Wish:
    """What a person wants exported."""

    format: Format = "lora"
    max_rank: int | None = None
    dtype: torch.dtype | None = None
    mean_gate: bool = False


def export_tasks(
    run: Run, tasks: Sequence[Task], places: dict[str, Path], wish: Wish, say: Callable[[str], None]
) -> dict[str, Exported]:
    """Export tasks of a run into a new folder each; ``places`` by the tasks' names.

    Raises:
        RecipeError: a method that has no such export, with the cure; nothing is left of that task.
    """
    tests = {task.name: task.test for task in load_tasks(run.recipe).tasks}
    found: dict[str, Exported] = {}
    for task in tasks:
        try:
            found[task.name] = _export(run, task, tests[task.name], places[task.name], wish, say)
        except (ValueError, TypeError, FileExistsError) as error:
            routed = not wish.mean_gate and any(layer.reads_input for layer in run.adapter.layers.values())
            cure = "; or --approximate mean-gate, which measures what that costs" if routed else ""
            raise RecipeError(f"task {task.name!r} was not exported: {error}{cure}") from error
    return found


def _export(run: Run, task: Task, test: Examples, place: Path, wish: Wish, say: Callable[[str], None]) -> Exported:
    adapter, model = run.adapter, run.model
    seen = test.select(range(min(COMPARED, len(test))))
    inputs = _inputs(model, task, seen)
    gates = adapter.gate_means(task.name, _batches(run, task)) if wish.mean_gate else None
    if gates is not None or wish.max_rank is not None:
        for line in _cost(run, task, test, _form(run, task, wish, gates)):
            say(line)

    def also(folder: Path) -> None:
        if wish.format == "dense":
            model.reader.tokenizer.save_pretrained(folder)
        if isinstance(task, HeadTask) and isinstance(model, HeadModel):
            if wish.format == "dense" and isinstance(task, TokenClassification):
                with torch.no_grad(), adapter.on(task.name):
                    wanted = None if gates is not None else model.heads[task.name](model.hidden(inputs, None)[0])
                _write_token_classifier(folder, model, task, inputs, wanted)
            else:
                _write_head(folder, model, task, wish.format)

    exported = adapter.export(
        place,
        task.name,
        wish.format,
        inputs=inputs,
        max_rank=wish.max_rank,
        dtype=wish.dtype,
        gates=gates,
        also=also,
        say=say,
    )
    for line in _loading(run, task, exported):
        say(line)
    return exported


def new_place(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that is not there: engines remember what they read."""
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in count(2))
    return next(place for place in chain([folder], numbered) if not place.exists())


def _inputs(model: MultiTaskModel, task: Task, examples: Examples) -> dict[str, Tensor]:
    """The backbone's inputs for these examples, by keyword: those that a model without an adapter takes too."""
    if not len(examples):
        raise ValueError("it has no test example to compare the export on: add a test file to the recipe")
    corpus = Corpus.to_score(model.tasks, {task.name: examples}, model.reader)
    return _given(model, corpus.collate(sorted(corpus.by_length(10**6)[0])[: 2 * COMPARED]).to(model.device).inputs)


def _given(model: MultiTaskModel, inputs: dict[str, Tensor], *more: str) -> dict[str, Tensor]:
    keys = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask", *more}
    return {key: value for key, value in inputs.items() if key in keys}


def _batches(run: Run, task: Task) -> Iterator[dict[str, Tensor]]:
    """Training examples of a task, for the mean of its gates."""
    train = {one.name: one.train for one in load_tasks(run.recipe).tasks}[task.name]
    examples = train.sample(run.recipe.training.eval_batch_size * 8, f"{task.name}/calibration")
    corpus = Corpus.of(run.model.tasks, {task.name: examples}, run.model.reader)
    for picks in corpus.by_length(run.recipe.training.eval_batch_size):
        yield _given(run.model, corpus.collate(picks).to(run.model.device).inputs, "prompt_mask")


@contextmanager
def _form(run: Run, task: Task, wish: Wish, gates: dict[str, Tensor] | None) -> Iterator[None]:
    """The model as the export will be."""
    if wish.format == "dense":
        with run.adapter.merged(task.name, gates):
            yield
        return
    loras = loras_of(run.adapter, task.name, wish.max_rank, wish.dtype or torch.float32, gates)
    with run.adapter.off() as plain, beside(dict(plain.named_modules()), loras):
        yield


def _cost(run: Run, task: Task, test: Examples, form: AbstractContextManager[None]) -> Iterator[str]:
    """What an approximation costs, on held-out examples: the KL divergence of its answers, and the task's metric."""
    before, score = _logits(run.model, task, test), evaluate(run.model, {task.name: test}, progress=False)
    with form:
        after, approximate = _logits(run.model, task, test), evaluate(run.model, {task.name: test}, progress=False)
    what = f"{_apart(task, before, after)} on {len(test)} test examples"
    if task.name in score:
        what += f"; {task.metric} {score[task.name]:.4f} as a mixture, {approximate[task.name]:.4f} as exported"
    yield what


@torch.no_grad()
def _logits(model: MultiTaskModel, task: Task, examples: Examples) -> Tensor:
    """Of all labels of a task's examples, (n, C)."""
    corpus = Corpus.to_score(model.tasks, {task.name: examples}, model.reader)
    batches = (corpus.collate(picks).to(model.device) for picks in corpus.by_length(64))
    return torch.cat([model(batch.inputs, batch.task_ids)[task.name].logits.float().cpu() for batch in batches])


def _apart(task: Task, one: Tensor, other: Tensor) -> str:
    if isinstance(task, Regression):
        return f"mean |difference| of the answers {float((one - other).abs().mean()) * task.deviation:.3e}"
    if isinstance(task, MultiLabel):
        one, other = (torch.stack([x, torch.zeros_like(x)], -1) for x in (one, other))  # each label is yes or no
    p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return f"KL(mixture || export) of the answers {float((p.exp() * (p - q)).sum(-1).mean()):.3e} nats in the mean"


def _write_head(folder: Path, model: HeadModel, task: HeadTask, format: Format) -> None:
    """The task's head, and the names of its labels."""
    head: Any = model.heads[task.name]
    weight, bias = head.weight.detach().cpu().float(), head.bias.detach().cpu().float()
    if isinstance(task, Regression):  # the head gives standard deviations from the mean
        weight, bias = weight * task.deviation, bias * task.deviation + task.mean
    if format == "lora":
        safetensors.torch.save_file({"weight": weight, "bias": bias}, str(folder / HEAD))
    else:
        _write_sentence_transformer(folder, model, weight, bias)
    if not isinstance(task, Regression):
        _write_json(folder / LABELS, list(task.names))  # type: ignore[attr-defined]


def _write_sentence_transformer(folder: Path, model: HeadModel, weight: Tensor, bias: Tensor) -> None:
    """The modules beside a transformer that `SentenceTransformer(folder)` puts together: pooling, and the head."""
    outputs, width = weight.shape
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": model.reader.max_length})
    pooling = {"word_embedding_dimension": width, f"pooling_mode_{POOLING[model.pooling]}": True}
    if model.pooling != "mean":
        pooling["pooling_mode_mean_tokens"] = False
    dense = {
        "in_features": width,
        "out_features": outputs,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    for name, config in {"1_Pooling": pooling, "2_Dense": dense}.items():
        (folder / name).mkdir()
        _write_json(folder / name / "config.json", config)
    tensors = {"linear.weight": weight, "linear.bias": bias}
    safetensors.torch.save_file(tensors, str(folder / "2_Dense" / "model.safetensors"), metadata={"format": "pt"})


def _write_token_classifier(
    folder: Path, model: HeadModel, task: TokenClassification, inputs: dict[str, Tensor], wanted: Tensor | None
) -> None:
    """The backbone in ``folder`` becomes transformers' own model of tagged words.

    Raises:
        ValueError: transformers has none for this architecture, or it computes something else.
    """
    from transformers import AutoModelForTokenClassification

    names = dict(enumerate(task.names))
    tagger: Any = AutoModelForTokenClassification.from_pretrained(
        folder, dtype="auto", id2label=names, label2id={name: i for i, name in names.items()}
    )
    fresh = [
        module
        for name, module in tagger.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{tagger.base_model_prefix}.")
    ]
    if len(fresh) != 1:
        raise ValueError(f"{type(tagger).__name__} has no single layer for a head: export the task as a LoRA")
    fresh[0].load_state_dict(
        {key: value.to(tagger.dtype) for key, value in model.heads[task.name].state_dict().items()}
    )
    tagger.save_pretrained(folder)
    again: Any = AutoModelForTokenClassification.from_pretrained(folder, dtype="auto").eval()
    if wanted is not None:
        with torch.no_grad():
            found = again.to(model.device)(**inputs).logits
        here = inputs["attention_mask"].bool()
        refuse(check([wanted[here]], [found[here]], again.dtype), type(again).__name__)


def _loading(run: Run, task: Task, exported: Exported) -> Iterator[str]:
    """The code that loads what was written, without polyrank."""
    folder, model = str(exported.folder), run.model
    kind = type(model.backbone).__name__
    yield "load it with:"
    if exported.format == "lora":
        yield "  import transformers, peft"
        yield f"  base = transformers.{kind}.from_pretrained({_base(run)!r})"
        yield f"  model = peft.PeftModel.from_pretrained(base, {folder!r})"
        if isinstance(task, HeadTask):
            yield f"  # the head reads the {_feature(task, model)}: W (C, D) and b (C,) in {HEAD}"
    elif isinstance(task, TokenClassification):
        yield "  from transformers import pipeline"
        yield f"  answers = pipeline('token-classification', {folder!r})"
    elif isinstance(task, HeadTask):
        yield "  from sentence_transformers import SentenceTransformer"
        yield f"  logits = SentenceTransformer({folder!r}).encode(texts)  # (n, {task.outputs})"
    else:
        yield "  from transformers import AutoTokenizer"
        yield f"  from transformers import {kind}"
        yield f"  model, tokenizer = {kind}.from_pretrained({folder!r}), AutoTokenizer.from_pretrained({folder!r})"
    if isinstance(task, HeadTask) and not isinstance(task, Regression | TokenClassification):
        yield f"  labels = json.load(open({str(exported.folder / LABELS)!r}))"


def _feature(task: HeadTask, model: MultiTaskModel) -> str:
    if isinstance(task, TokenClassification):
        return "last hidden state of each word's first token"
    assert isinstance(model, HeadModel)
    return {"mean": "mean of the last hidden states", "first": "first last hidden state", "last": "final hidden state"}[
        model.pooling
    ]


def _base(run: Run) -> str:
    """Where the base model is: the folder or hub name that the recipe gives."""
    return str(run.model.backbone.config._name_or_path or run.recipe.model)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
