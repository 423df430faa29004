"""Recipes in YAML: read strictly, changed by `--set`, written back complete."""

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from polyrank.combine import COMBINERS
from polyrank.files import write_text
from polyrank.methods import METHODS
from polyrank.mixing import Mixing
from polyrank.recipe.schema import Recipe, TaskSource, nearest
from polyrank.training import Training

LARGEST = 100_000  # bytes of a recipe file


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names the file, the key, the reason and the cure."""


def read_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `settings` are changes such as "training.steps=50". File paths are relative to the recipe.

    Raises:
        RecipeError: anything wrong with the file, a key or a value.
    """
    if not path.is_file():
        raise RecipeError(f"no recipe {path}: give the path of a YAML file (`polyrank train --help` shows one)")
    if path.stat().st_size > LARGEST:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes is no recipe (at most {LARGEST})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of names to values, this is a {type(content).__name__}")
    # the method's name first: it drops the fields of another method, and none that is set beside it
    for setting in sorted(settings, key=lambda one: one.partition("=")[0].strip() not in ("method", "method.name")):
        apply_setting(content, setting)
    return check_recipe(content, str(path), path.parent)


def check_recipe(content: Mapping[str, Any], where: str, folder: Path) -> Recipe:
    """Validate the content of a recipe; relative data files are looked up in `folder`."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(where, item, content) for item in error.errors())) from error
    here = (folder / recipe.model).resolve()
    model = str(here) if here.is_dir() else recipe.model  # otherwise built in, of the working directory, or of the hub
    bank = None if recipe.bank is None else {task: str((folder / one).resolve()) for task, one in recipe.bank.items()}
    tasks = [_located(task, folder) for task in recipe.tasks]
    return recipe.model_copy(update={"model": model, "tasks": tasks, "bank": bank})


def _located(task: TaskSource, folder: Path) -> TaskSource:
    """With absolute paths; a data set that is no folder here is one of the hub."""
    if task.dataset is not None:
        here = (folder / task.dataset).resolve()
        return task.model_copy(update={"dataset": str(here)}) if here.is_dir() else task
    paths = {"train": task.train, "test": task.test}
    return task.model_copy(update={key: str((folder / path).resolve()) for key, path in paths.items() if path})


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default filled in; `read_recipe` gives an equal recipe back."""
    content = recipe.model_dump(mode="json")
    content["tasks"] = [{k: v for k, v in task.items() if v is not None} for task in content["tasks"]]
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


class _Loader(yaml.SafeLoader):
    """Safe YAML without repeated keys and without aliases, in which 1e-3 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} stands twice: remove one", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document, or a RecipeError that names the line."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise RecipeError(f"{where}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not readable as YAML: {error}") from error


def apply_setting(content: dict[str, Any], setting: str) -> None:
    """Put one "key.path=value" into the content; a new method.name drops the fields of the old method."""
    path, equals, value = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {setting!r}: write key=value, for example --set training.steps=50")
    if keys[0] == "method" and len(keys) > 1 and isinstance(content.get("method"), str):
        content["method"] = {"name": content["method"]}  # the short form
    place: Any = content
    for depth, key in enumerate(keys[:-1]):
        place = _task(place, key, setting) if keys[:depth] == ["tasks"] else place.setdefault(key, {})
        if not isinstance(place, dict) and keys[: depth + 1] != ["tasks"]:
            raise RecipeError(
                f"--set {setting!r}: {key!r} holds no names; keys are such as training.steps, method.rank"
            )
    parsed = parse_yaml(value, f"--set {setting!r}")
    if keys == ["method"] and isinstance(parsed, str):
        parsed = {"name": parsed}
    if keys == ["method", "name"] and place.get("name") != parsed:
        place.clear()
    place[keys[-1]] = parsed


def _task(tasks: Any, name: str, setting: str) -> Any:
    """The entry of a list of tasks; a short one is written out."""
    for i, task in enumerate(tasks if isinstance(tasks, list) else []):
        if task == name:
            tasks[i] = {"name": name, "data": name}
        if isinstance(tasks[i], dict) and tasks[i].get("name") == name:
            return tasks[i]
    raise RecipeError(f"--set {setting!r}: the recipe has no task {name!r}; keys are such as tasks.NAME.train")


def _explain(where: str, error: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    keys = [str(part) for part in error["loc"]]
    reason = str(error["msg"]).removeprefix("Value error, ")
    known = _known(keys[:-1], content)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        reason = f"unknown name{nearest(keys[-1], known)}"
    elif error["type"] == "missing":
        reason = "is missing: add it"
    elif error["type"] not in ("value_error", "assertion_error"):
        reason = f"{reason[0].lower()}{reason[1:]}, got {error['input']!r}"
    return f"{where}: {'.'.join(keys) or 'recipe'}: {reason}"


def _known(keys: Sequence[str], content: Mapping[str, Any]) -> Iterable[str]:
    """The names that are valid below a key path."""
    match list(keys):
        case []:
            return Recipe.model_fields
        case ["training"]:
            return Training.model_fields
        case ["training", "mixing"]:
            return Mixing.model_fields
        case ["training", "combine"]:
            given = content["training"]["combine"]
            return signature(COMBINERS[given["name"] if isinstance(given, dict) else given]).parameters
        case ["tasks", _]:
            return TaskSource.model_fields
        case ["method"]:
            return signature(METHODS[content["method"]["name"]]).parameters  # its name was found before its fields
    return ()
