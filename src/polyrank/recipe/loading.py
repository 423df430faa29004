"""What a recipe names, loaded: the examples of its tasks, and the frozen model that fits them."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from polyrank.assets import model_folder
from polyrank.data import DATASETS, Columns, Record, examples, load, of_dataset, read_dataset, read_rows
from polyrank.data.text import as_rows
from polyrank.manifest import MODELS
from polyrank.models import HeadModel, LanguageModel, MultiTaskModel
from polyrank.processes import accelerator, launched
from polyrank.recipe.reading import RecipeError
from polyrank.recipe.schema import Recipe, TaskSource, nearest
from polyrank.sharding import shard
from polyrank.tasks import KINDS, Examples, HeadTask, Label, LanguageTask, Task, shown


@dataclass(frozen=True)
class Loaded:
    """The tasks of a recipe, and what a person should know of their data before believing a score."""

    tasks: tuple[Task, ...]
    notices: list[str]


def load_tasks(recipe: Recipe) -> Loaded:
    """
    Raises:
        RecipeError: an unknown data set, or a file that cannot be used; tasks that need different kinds of models.
    """
    tasks: list[Task] = []
    notices: list[str] = []
    for source in recipe.tasks:
        train, test, faults = load_examples(source, recipe)
        fields = {"metric": source.metric, "normalise": source.normalise}
        chosen = {key: value for key, value in fields.items() if value is not None}
        try:
            task = KINDS[kind_of(source)].from_examples(source.name, train, test, **chosen)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        tasks.append(task)
        if faults:
            notices.append(f"task {task.name!r}: {len(faults)} bad rows were left out, the first: {faults[0]}")
        if missing := len(train) - len(train.labelled()):
            notices.append(f"task {task.name!r}: {missing} of {len(train)} training examples have no label")
        if not len(test.labelled()):
            notices.append(f"task {task.name!r} has no labelled test example: it gets no score")
        if leaked := task.leaked():
            notices.append(
                f"task {task.name!r}: {len(leaked)} of {len(task.test)} test texts also stand in its training data, "
                f"such as {shown(leaked[0])!r}: its test score will flatter"
            )
    speaks_language(tasks)
    return Loaded(tuple(tasks), notices)


def kind_of(source: TaskSource) -> str:
    if source.type is not None:
        return source.type
    if source.data == "socialiqa":
        return "multiple_choice"
    return "classification"


def load_examples(source: TaskSource, recipe: Recipe) -> tuple[Examples, Examples, list[str]]:
    """The train and test examples of one task, at most as many as the recipe says, and the bad rows left out.

    Raises:
        RecipeError: an unknown data set, or a file that cannot be used.
    """
    limits, seed = (recipe.max_train, recipe.max_test), recipe.training.seed
    columns, skip = source.columns(kind_of(source)), recipe.bad_rows == "skip"
    faults: list[str] = []
    try:
        if source.data is not None:
            parts = _built_in(source, columns, *limits, seed)
        else:
            train, faults = examples(_records(source, source.train or ""), columns, skip=skip)
            parts = train.split(source.test_share)
            if columns.kind in ("classification", "multi_label", "token_classification"):
                parts = _rare_in_train(*parts)
            if source.test is not None:
                test, more = examples(_records(source, source.test), columns, skip=skip)
                parts, faults = (train, test), faults + more
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(f"task {source.name!r}: {error}") from error
    train, test = (part.sample(limit, f"{seed}/{source.name}") for part, limit in zip(parts, limits, strict=True))
    return train, test, faults


def _rare_in_train(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """Where we cut the test ourselves, an example with a label that training would never see goes to the training."""
    known = {one for label in train.labels for one in _names(label)}
    rare = [i for i, label in enumerate(test.labels) if not set(_names(label)) <= known]
    moved, left = test.select(rare), test.select(sorted(set(range(len(test))) - set(rare)))
    return Examples([*train.texts, *moved.texts], [*train.labels, *moved.labels]), left


def _names(label: Label) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,) if isinstance(label, str) else ()


def _built_in(
    source: TaskSource, columns: Columns, max_train: int, max_test: int, seed: int
) -> tuple[Examples, Examples]:
    """A built-in set as it is, or its rows read as another type of task."""
    name = source.data or ""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}{nearest(name, DATASETS)}")
    splits = load(name, max_train, max_test, seed)
    if splits.kind == columns.kind and source.plain:
        return splits.train, splits.test
    train, test = (examples(of_dataset(as_rows(part), name), columns)[0] for part in (splits.train, splits.test))
    return train, test


def _records(source: TaskSource, part: str) -> Iterable[Record]:
    return read_rows(part) if source.dataset is None else read_dataset(source.dataset, part)


def speaks_language(tasks: Sequence[Task]) -> bool:
    """Whether the tasks need a language model; otherwise a model with heads.

    Raises:
        RecipeError: some need the one, some the other.
    """
    heads = [task for task in tasks if isinstance(task, HeadTask)]
    language = [task for task in tasks if isinstance(task, LanguageTask)]
    if heads and language:
        raise RecipeError(
            f"task {heads[0].name!r} is {heads[0].kind}, with a head on an encoder, and task {language[0].name!r} is "
            f"{language[0].kind}, answered by a language model: one model cannot be both. Make {heads[0].name!r} a "
            "task of type generation, with its label as the completion, or train two recipes"
        )
    return bool(language)


def load_backbone(recipe: Recipe, language: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model in fp32, without dropout, and its tokenizer: a built-in name, a folder, or a name on the hub.

    Raises:
        RecipeError: nothing loadable has that name, or it is of another kind.
    """
    name = recipe.model
    options = _quantised(recipe)
    source = str(model_folder(name)) if name in MODELS else name
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        _quiet(config)
        backbone = _kind(config, language).from_pretrained(source, config=config, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if "Unrecognized configuration class" in reason:
            reason = f"it cannot {'generate text' if language else 'read a text and give its features'}"
        raise RecipeError(
            f"model {name!r} cannot be loaded{nearest(name, MODELS)}: {reason}\n"
            "Give a built-in name, a folder that has config.json, model.safetensors and the tokenizer, or a hub name"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do
    backbone = backbone.eval()
    _check_length(recipe, config)
    if language and not config.is_encoder_decoder and not is_causal(backbone):
        raise RecipeError(
            f"model {name!r} is {type(backbone).__name__}, in which a token sees those after it, so it cannot "
            "generate: give a causal language model (such as smollm2) or an encoder-decoder, or tasks with heads"
        )
    return backbone, tokenizer


def _kind(config: PreTrainedConfig, language: bool) -> type:
    if language:
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel


def _quiet(config: PreTrainedConfig) -> None:
    """No dropout: the base is frozen, and noise in it costs time and repeatability."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _quantised(recipe: Recipe) -> dict[str, BitsAndBytesConfig]:
    if recipe.quantise is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"quantise: {recipe.quantise} needs bitsandbytes, and a GPU: pip install bitsandbytes, or remove the line"
        )
    four = recipe.quantise == "4bit"
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four)}


def _check_length(recipe: Recipe, config: PreTrainedConfig) -> None:
    """A model with learned positions has no more of them than its config says."""
    key = "max_position_embeddings"
    most = config.to_dict().get(config.attribute_map.get(key, key))
    if isinstance(most, int) and most < recipe.max_length:
        raise RecipeError(f"max_length {recipe.max_length}: the model {recipe.model!r} reads at most {most} tokens")


@torch.no_grad()
def is_causal(backbone: PreTrainedModel) -> bool:
    """Whether a later token leaves the logits of an earlier one as they were."""
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]], device=backbone.device)
    first, second = backbone(input_ids=ids).logits[:, 0]
    return bool(torch.allclose(first, second, atol=1e-4))


def build_model(
    recipe: Recipe, tasks: Sequence[Task], backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> MultiTaskModel:
    """The model with fresh heads, or the language model; where the recipe says so, sharded over the processes.

    Raises:
        RecipeError: the tokenizer lacks what the tasks need.
    """
    torch.manual_seed(recipe.training.seed)
    if backbone.main_input_name != "input_ids":
        raise RecipeError(
            f"model {recipe.model!r} is {type(backbone).__name__}, which reads {backbone.main_input_name}: give a "
            "model of texts"
        )
    try:
        if speaks_language(tasks):
            model: MultiTaskModel = LanguageModel(
                backbone, tokenizer, tasks, recipe.max_length, recipe.truncation or "left"
            )
        else:
            side = recipe.truncation or "right"
            model = HeadModel(backbone, tokenizer, tasks, recipe.max_length, recipe.pooling, side)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"model {recipe.model!r}: {error}") from error
    device = accelerator().device
    if recipe.training.sharding == "fsdp2" and launched() > 1:
        backbone.requires_grad_(False)
        shard(backbone)  # from main memory, a block at a time: no device holds all of it
        model.heads.to(device)
        return model
    return model.to(device)
