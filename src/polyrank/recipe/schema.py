"""What a recipe says, as frozen models: an unknown name or a wrong type is an error, and every default is filled in."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from polyrank.combine import COMBINERS
from polyrank.data import Columns
from polyrank.methods import METHODS, Method
from polyrank.tasks import KINDS, check_names
from polyrank.training import Training


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TaskSource(_Part):
    """Where a task's examples come from, and what they are.

    One of: `data` (built in); `train` and perhaps `test` (files of yours); `dataset` (a data set of the hub, or one
    that save_to_disk wrote), of which `train` and `test` are then the splits.
    """

    name: str
    type: (
        Literal["classification", "multi_label", "regression", "token_classification", "generation", "multiple_choice"]
        | None
    ) = Field(default=None, description="default: classification, or that of the built-in data")
    data: str | None = Field(default=None, description="a built-in data set")
    dataset: str | None = Field(default=None, description="owner/name or owner/name:configuration, or a folder")
    train: str | None = None
    test: str | None = Field(default=None, description="without it, test_share of the training texts")
    test_share: float = Field(
        default=0.2, gt=0, lt=1, description="where there is no test file; the same texts whatever the seed"
    )
    text: str | list[str] | None = Field(
        default=None, description="the column of the texts; two for pairs; or a template such as 'Q: {question}'"
    )
    label: str | list[str] | None = Field(
        default=None, description="the column of the labels; for multi_label perhaps a column of 0 and 1 for each"
    )
    options: str | list[str] = Field(
        default="options", description="of multiple_choice: the column of the list of options, or a column for each"
    )
    choices: list[str] | None = Field(
        default=None, min_length=2, description="of multiple_choice: the options, where they are the same in every row"
    )
    names: str | list[str] | None = Field(
        default=None,
        description="the names of labels that are numbers from 0; of multiple_choice the keys of the options",
    )
    letters: bool = Field(
        default=False, description="of multiple_choice: list the options in the prompt, answer by letter"
    )
    metric: str | None = Field(default=None, description="default: the first of the type's metrics that fits")
    normalise: Literal["none", "tokens"] | None = Field(
        default=None, description="of multiple_choice: compare summed (none) or mean (tokens) log-probabilities"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TaskSource":
        if (self.data is None) == (self.train is None) or (self.data is not None and self.dataset is not None):
            raise ValueError(
                "give one of 'data' (a built-in data set), 'train' (your file), or 'dataset' with the split 'train'"
            )
        if self.data is not None and self.test is not None:
            raise ValueError("'test' belongs to 'train', not to built-in data, which has its own test side")
        if self.type != "multiple_choice" and (
            self.letters or self.normalise or self.choices or self.options != "options"
        ):
            raise ValueError("options, choices, letters and normalise belong to the type multiple_choice")
        if self.metric is not None and self.type is not None and self.metric not in KINDS[self.type].METRICS:
            raise ValueError(f"metric {self.metric!r}: {self.type} has {', '.join(KINDS[self.type].METRICS)}")
        return self

    def columns(self, kind: str) -> Columns:
        """How its rows are read."""
        return Columns(kind, self.text, self.label, self.options, self.names, self.letters, self.choices)

    @property
    def plain(self) -> bool:
        """Whether no column is named: built-in data is then taken as it is."""
        return self.text is None and self.label is None and self.names is None and not self.letters


class Recipe(_Part):
    """A run: which model, which method on which layers, which tasks, how to train, where to write."""

    model: str = Field(description="a built-in name (minilm), a folder, or a name on the model hub")
    method: dict[str, Any] = Field(description="name, and any of the method's own fields")
    targets: str | list[str] = Field(
        default="all-linear", description="all-linear, a regular expression, or a list of endings"
    )
    tasks: list[TaskSource] = Field(min_length=1)
    max_train: int = Field(default=4000, ge=2, description="at most this many training examples per task")
    max_test: int = Field(default=500, ge=1, description="at most this many test examples per task")
    max_length: int = Field(default=64, ge=2, description="tokens of a text, or of a prompt with its completion")
    truncation: Literal["left", "right"] | None = Field(
        default=None,
        description="where longer texts are cut; default: right, and left for prompts, which ask at the end",
    )
    pooling: Literal["mean", "first", "last"] = Field(
        default="mean", description="how heads see a text: the mean of its tokens, the first, or the last (decoders)"
    )
    quantise: Literal["4bit", "8bit"] | None = Field(
        default=None, description="load the frozen model in 4 or 8 bits with bitsandbytes"
    )
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="of data files: stop at the first bad row, or leave such rows out and count them"
    )
    bank: dict[str, str] | None = Field(
        default=None,
        description="by task, the folder of a LoRA that is there (PEFT's format, or RUN/adapter): for methods that mix "
        "trained LoRAs, and train them first where this is left out",
    )
    heads: Literal["probe", "fresh"] = Field(
        default="probe", description="start of the heads: a linear probe, or random"
    )
    training: Training = Training()
    out: str = Field(default="runs/polyrank", description="folder of the run")

    @field_validator("tasks", mode="before")
    @classmethod
    def _short(cls, tasks: object) -> object:
        """`- r8` is short for `- {name: r8, data: r8}`."""
        if not isinstance(tasks, list):
            return tasks
        return [{"name": task, "data": task} if isinstance(task, str) else task for task in tasks]

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: list[TaskSource]) -> list[TaskSource]:
        check_names([task.name for task in tasks])
        return tasks

    @field_validator("method", mode="before")
    @classmethod
    def _short_method(cls, method: object) -> object:
        """`method: more` is short for `method: {name: more}`."""
        return {"name": method} if isinstance(method, str) else method

    @field_validator("method")
    @classmethod
    def _method(cls, method: dict[str, Any]) -> dict[str, Any]:
        """The method with every field filled in."""
        name = method.get("name")
        if "name" not in method:
            raise ValueError(f"name is missing: add it{nearest('', METHODS)}")
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"unknown method {name!r}{nearest(str(name), METHODS)}")
        fields = {key: value for key, value in method.items() if key != "name"}
        resolved: Any = TypeAdapter(METHODS[name]).validate_python(fields)  # a frozen dataclass
        return {"name": name, **asdict(resolved)}

    @model_validator(mode="after")
    def _weights(self) -> "Recipe":
        given, names = self.training.task_weights, {task.name for task in self.tasks}
        if given is not None and set(given) != names:
            raise ValueError(
                f"training.task_weights names {sorted(given)}, the tasks are {sorted(names)}: name each once"
            )
        if self.bank is not None and self.build_method().bank() is None:
            raise ValueError(f"bank: {self.method['name']} mixes no LoRAs that are given: take moa or xlora")
        if self.bank is not None and set(self.bank) != names:
            raise ValueError(f"bank names {sorted(self.bank)}, the tasks are {sorted(names)}: name each once")
        self.training.mixing.stages(self.training.steps, len(self.tasks))
        if self.quantise is not None and self.training.sharding != "none":
            raise ValueError("quantise packs the weights, and training.sharding cuts them: leave out one of them")
        if (combiner := self.training.combiner()) is not None:
            combiner.check([task.name for task in self.tasks])
        return self

    def build_method(self) -> Method:
        """The method's own frozen dataclass."""
        fields = {key: value for key, value in self.method.items() if key != "name"}
        return METHODS[self.method["name"]](**fields)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, the fields of each method and combiner included."""
    schema = Recipe.model_json_schema()
    for key in ("additionalProperties", "type"):
        schema["properties"]["method"].pop(key, None)
    choices = [{"enum": [*METHODS]}, {"oneOf": _choices(METHODS, schema["$defs"])}]
    schema["properties"]["method"] |= {"anyOf": choices}
    combine = schema["$defs"]["Training"]["properties"]["combine"]
    combine["anyOf"] = [{"type": "null"}, {"enum": [*COMBINERS]}, {"oneOf": _choices(COMBINERS, schema["$defs"])}]
    schema["properties"]["tasks"]["items"] = {"anyOf": [{"type": "string"}, schema["properties"]["tasks"]["items"]]}
    return schema


def _choices(kinds: Mapping[str, type], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """A name, and the fields that belong to it."""
    choices: list[dict[str, Any]] = []
    for name, kind in kinds.items():
        own = TypeAdapter(kind).json_schema()
        definitions |= own.pop("$defs", {})
        own["properties"] = {"name": {"const": name}, **own.get("properties", {})}
        choices.append({**own, "required": ["name", *own.get("required", ())], "additionalProperties": False})
    return choices


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest name there is, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(names)})" if names else hint
