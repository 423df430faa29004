"""The configuration of a POLYRANK adapter: a method as a recipe has it, its tasks, and PEFT's targets."""

import difflib
from dataclasses import asdict, dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from pydantic import TypeAdapter, ValidationError

from polyrank import __version__
from polyrank.files import checked_name
from polyrank.methods import METHODS, Method
from polyrank.saving import method_fields, method_from

from .register import NAME


@dataclass
class PolyrankConfig(PeftConfig):
    """The configuration of a POLYRANK adapter.

    Raises:
        ValueError: an unknown method or field, a value out of range, or bad task names.
    """

    method: str | dict[str, Any] = field(
        default="", metadata={"help": "A method's name, or its name and fields, as a recipe's `method`."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "The names of the tasks, in order of their ids."})
    target_modules: str | list[str] | set[str] | None = field(
        default="all-linear",
        metadata={"help": "'all-linear', a regular expression for whole names, or a list of names' ends."},
    )
    exclude_modules: str | list[str] | set[str] | None = field(
        default=None, metadata={"help": "What target_modules leaves out: a regular expression, or a list of ends."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save, such as a fresh head."}
    )
    with_factors: bool = field(
        default=False,
        metadata={
            "help": "Save the frozen parts that were computed from the base (MoORE's U, sigma, V) whole. Without it "
            "the files hold a projection of them, and are refused where they come out differently."
        },
    )
    polyrank_version: str | None = field(default=None, metadata={"help": "Leave it empty: it is filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        self.method = method_fields(_method(self.method))
        self.tasks = _tasks(self.tasks)
        self.polyrank_version = self.polyrank_version or __version__
        if self.target_modules is None:
            raise ValueError("target_modules=None: give 'all-linear', a regular expression, or a list of names' ends")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def build(self) -> Method:
        """The method's own frozen dataclass."""
        assert isinstance(self.method, dict)
        return method_from(self.method)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; sets in order, so that equal adapters write equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(self).items()}


def _method(given: object) -> Method:
    fields = {"name": given} if isinstance(given, str) else given
    if not isinstance(fields, dict) or "name" not in fields:
        raise ValueError(f"method={given!r}: give a method's name, or a dict of its name and fields")
    name = fields["name"]
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the methods are: {', '.join(METHODS)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    try:
        return TypeAdapter(METHODS[name]).validate_python(
            {key: value for key, value in fields.items() if key != "name"}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"method {name!r}: {where}: {first['msg']} (`polyrank methods {name}` shows it)") from error


def _tasks(given: list[str]) -> list[str]:
    if isinstance(given, str):
        raise ValueError(f"tasks={given!r} is one string: give a list of names, [{given!r}]")
    names = [checked_name(task, "task") for task in given]
    if not names or len({name.lower() for name in names}) != len(names):
        raise ValueError(
            f"tasks must be one or more different names (upper and lower case count as the same), got {names}"
        )
    return names
