"""A finished run under the tasks of lm-eval (EleutherAI's harness), each request on the route of its task.

    python -m polyrank.lm_eval --model polyrank --model_args run=RUN,routes=arc_*:science,default=base --tasks ...

It is lm-eval's own command, with one model more. Requests of one route go to lm-eval's Hugging Face model together, so
that scores are those that ``--model hf`` would give a plain model of that task.
"""

# pyright: reportMissingImports=false
# lm-eval is an extra that the development environment need not have

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'polyrank[lm-eval]'", name=error.name) from error

from polyrank.models import LanguageModel
from polyrank.recipe import load_run

BASE = "base"  # the route of the frozen model, without the adapter
Said = TypeVar("Said")
HarnessModel: Any = HFLM  # its registry decorator hides its type


@register_model("polyrank")
class PolyrankLM(HarnessModel):
    """The language model of a run folder.

    A request's route is the first of ``routes`` whose pattern fits the name of its lm-eval task, else the run's task of
    that very name, else ``default``.
    """

    def __init__(
        self, run: str, routes: str | Mapping[str, str] | None = None, default: str | None = None, **options: Any
    ) -> None:
        """
        Args:
            run: the folder of a finished run.
            routes: lm-eval task -> task of the run, or "base"; in a text "arc_*:science+boolq:yes_no".
            default: the route of all other lm-eval tasks.
            options: lm-eval's own for ``--model hf``, such as batch_size and max_length.

        Raises:
            ValueError: a run without a language model, a gate that reads whole samples, or an unknown route.
        """
        loaded = load_run(Path(run))
        if not isinstance(loaded.model, LanguageModel):
            raise ValueError(f"{run} has heads, and lm-eval asks language models: score it with `polyrank eval {run}`")
        self.adapter = loaded.adapter
        whole = {name for name, layer in self.adapter.layers.items() if layer.reads & {"sample", "batch"}}
        if whole:
            raise ValueError(
                f"the gate of {min(whole)} reads a sample as a whole, and lm-eval does not tell prompts from what "
                f"follows and padding: score the run with `polyrank eval {run}`"
            )
        self.routes = [*_pairs(routes).items()]
        self.default = default
        known = {*self.adapter.tasks, BASE}
        for route in [route for _, route in self.routes] + ([] if default is None else [default]):
            if route not in known:
                raise ValueError(
                    f"no route {route!r}: the run's tasks are {', '.join(self.adapter.tasks)}, and {BASE!r}"
                )
        super().__init__(pretrained=loaded.model.backbone, tokenizer=loaded.model.reader.tokenizer, **options)

    def route(self, task: str) -> str:
        """The route of an lm-eval task.

        Raises:
            ValueError: none fits; with the cure.
        """
        for pattern, route in self.routes:
            if fnmatchcase(task, pattern):
                return route
        if task in self.adapter.tasks:
            return task
        if self.default is None:
            raise ValueError(
                f"no route for the lm-eval task {task!r}: add routes={task}:TASK to --model_args, or default=TASK, "
                f"where TASK is {', '.join(self.adapter.tasks)} or {BASE}"
            )
        return self.default

    def under(self, route: str) -> AbstractContextManager[object]:
        """The model on a route, inside a ``with`` block."""
        return self.adapter.off() if route == BASE else self.adapter.on(route)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """
        Raises:
            ValueError: lm-eval's cache of answers was asked for.
        """
        raise ValueError("lm-eval's cache knows the text of a request and not its task: leave out --use_cache")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ask = super().loglikelihood
        return self._by_route(requests, lambda some: ask(some, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        ask = super().loglikelihood_rolling
        return self._by_route(requests, lambda some: ask(some, disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        ask = super().generate_until
        return self._by_route(requests, lambda some: ask(some, disable_tqdm))

    def _by_route(self, requests: Sequence[Instance], ask: Callable[[list[Instance]], list[Said]]) -> list[Said]:
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self.route(str(request.task_name)), []).append(place)
        found: dict[int, Said] = {}
        for route, own in places.items():
            with self.under(route):
                found |= zip(own, ask([requests[place] for place in own]), strict=True)
        return [found[place] for place in range(len(requests))]


def _pairs(routes: str | Mapping[str, str] | None) -> dict[str, str]:
    """
    Raises:
        ValueError: a text that is no list of pairs.
    """
    if not isinstance(routes, str):
        return dict(routes or {})
    pairs = [part.split(":") for part in routes.split("+")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f"routes={routes}: write LM_EVAL_TASK:TASK, several with + between them")
    return {pair[0]: pair[1] for pair in pairs}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
