"""Put a method's layers into any ``nn.Module``, use them, and take them out again."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import targets as target_names
from .blocks import Block, group
from .export import Exported, Format, export, gate_means, task_weights
from .files import Fingerprint, checked_name, difference, fingerprint, read_folder, write_folder
from .joining import put_experts, saved_loras, task_parts, with_task
from .methods import Method
from .methods.base import Hears
from .mixture import Mixture, RouteContext, Site, global_notes
from .places import Places, lost_by_rounding, merge_into_bases, put_back, write_weights
from .saving import copy_weights, frozen_parts, load_frozen, method_fields, method_from, named_weights, projection
from .summary import Summary, summarise


class Adapter:
    """The handle of an adapted model: its tasks, its layers, its files. The model stays the object it was."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        context: RouteContext,
        layers: dict[str, Mixture],
        base: Fingerprint,
        trained: set[str],
        blocks: Sequence[Block] = (),
    ) -> None:
        self.model, self.method, self.context, self.layers = model, method, context, layers
        self.base_fingerprint = base
        self._trained = trained  # base parameters that were trainable before
        self._places = Places(model, list(layers), blocks)
        self._released: Path | None = None  # where the base's weights are, if they left memory
        self._hooks = [
            model.register_forward_pre_hook(context.enter, with_kwargs=True),
            model.register_forward_hook(context.leave, always_call=True),
        ]
        self._attached: list[RemovableHandle] = []
        try:
            self._put_in(layers)
        except BaseException:
            self._unhook()
            raise

    def _put_in(self, layers: dict[str, Mixture]) -> None:
        attached = list(self.method.attach(self.model, layers))
        for hook in self._attached:
            hook.remove()
        self._attached, self.layers = attached, layers
        self._places.fill(layers)

    def _unhook(self) -> None:
        for hook in [*self._hooks, *self._attached]:
            hook.remove()
        self._hooks, self._attached = [], []

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.context.tasks

    def _in_place(self) -> None:
        if not self.layers:
            raise RuntimeError(
                "this adapter was merged or removed: adapt() the model again, or Adapter.load a saved one"
            )

    def task_ids(self, tasks: str | Sequence[str]) -> Tensor:
        """Ids (B,) of task names.

        Raises:
            ValueError: an unknown task.
        """
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; the adapter's tasks are: {', '.join(self.tasks)}")
        return torch.tensor([self.tasks.index(name) for name in names])

    def on(
        self, tasks: str | Sequence[str] | Tensor, attention_mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Fix the task of every call inside a ``with`` block: one name for all samples, or one name or id for each.

        It also serves calls that bypass the model's own forward, as when T5's ``generate`` runs the encoder.
        """
        self._in_place()
        ids = tasks if isinstance(tasks, Tensor) else self.task_ids(tasks)
        return self.context.on(ids, attention_mask)

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """Inside a ``with`` block the model is the frozen base, bit for bit; its forward still takes ``task_ids``.

        A base that was released is back in memory from then on.
        """
        self._in_place()
        self._restore_base()
        for hook in self._attached:
            hook.remove()
        self._attached = []
        self._places.restore()
        try:
            yield self.model
        finally:
            for name, layer in self.layers.items():
                layer.train(self.model.get_submodule(name).training)
            self._put_in(self.layers)

    # Training.

    @property
    def settles(self) -> float:
        """The share of the training before which no state is the one to keep: a router fades, a budget falls."""
        return self.method.settles

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's trainable weights; none is the base model's."""
        return (p for _, p in self.named_parameters() if p.requires_grad)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All the adapter's weights, each once: also those that no gradient trains, and those that are frozen."""
        return named_weights(self.layers)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """What was made from the base and the layers compute with, by name: MoORE's U, sigma, V."""
        return frozen_parts(self.layers)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable weights that all tasks have in common: those in which tasks can conflict."""
        own = {layer.get_parameter(key) for layer in self.layers.values() for key in task_parts(layer)}
        return (p for p in self.parameters() if p not in own)

    def losses(self) -> dict[str, Tensor]:
        """The method's auxiliary losses of the last forward, weighted scalars by name; call it before the next.

        Of several processes all call it: notes that are sums are summed over them, and the losses are those of the
        whole, whose gradients each process has in part, times their number. Other notes are each process's own.
        """
        self._in_place()
        notes, self.context.notes = self.context.notes, {}
        if self.hears == "sums":
            notes = global_notes(notes)
        return self.method.losses(notes)

    @property
    def hears(self) -> Hears:
        """What ``losses`` looks at: nothing, sums over the samples of a forward, or its batch as a whole."""
        return self.method.hears

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's output depends on its neighbours, by a gate or, in training, by a norm over batches."""
        norms = [m.training for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return any(norms) or any("batch" in layer.reads for layer in self.layers.values())

    def unheard(self) -> AbstractContextManager[None]:
        """Forwards in the block leave nothing for ``losses`` and count nothing: another of the same samples does."""
        return self.context.unheard()

    def adding(self) -> AbstractContextManager[None]:
        """After the block, ``losses`` are those of all its forwards together, if ``hears`` is "sums"."""
        return self.context.adding()

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, object]]:
        self._in_place()
        return self.method.param_groups(self.layers, lr, weight_decay)

    def before_step(self, done: float) -> None:
        """Tell the method that the gradients of a step are complete, before they are clipped and used.

        Args:
            done: the share of the training that is done with this step, 1 at the last one. Schedules (fading, rank
                budgets) follow it.
        """
        self.method.before_step(self.layers, done)

    def after_step(self) -> None:
        """Tell the method that the optimiser has made a step."""
        self.method.after_step(self.layers)

    def after_task(self) -> None:
        """Tell the method that a task is over, where tasks are trained one after the other."""
        self.method.after_task(self.layers)

    def enable_checkpointing(self) -> None:
        """Activation checkpointing of a Hugging Face model, with the route captured.

        Raises:
            TypeError: the model has none; checkpoint by hand with ``context_fn=adapter.context.replay``.
        """
        how = {"use_reentrant": False, "context_fn": self.context.replay}
        model: Any = self.model
        try:
            try:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
            except AttributeError:  # its older name
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        except (AttributeError, ValueError) as error:
            raise TypeError(
                f"{type(model).__name__} has no activation checkpointing of its own: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=adapter.context.replay)"
            ) from error

    # What joins later.

    def add_task(self, task: str, freeze: bool = True) -> None:
        """Let one more task join; the outputs of the others stay bit for bit what they are, where the task decides.

        (MoA guesses the task in evaluation, and may guess the new one.) Build the optimiser anew: there are new
        weights. An adapter whose base was released has it back in memory.

        Args:
            freeze: train nothing but the new task's own parts, so that the others stay as they are while it trains.
                Like any ``requires_grad`` it is not saved with the adapter, and a later call without it frees nothing.

        Raises:
            ValueError: a bad or known name, a method with weights whose size depends on the number of tasks, or, with
                ``freeze``, one that keeps nothing of a task's own; nothing was changed.
        """
        self._in_place()
        _checked_tasks([*self.tasks, task])
        self._restore_base()
        grown = with_task(self.method, self.layers, self.tasks, task)
        own = {
            layer.get_parameter(key)
            for layer in grown.values()
            for key, index in task_parts(layer).items()
            if index == len(self.tasks)
        }
        if freeze and not own:
            raise ValueError(
                f"{self.method} keeps nothing of a task's own, so nothing would be trained: add the task with "
                "freeze=False, or take a method that routes by task"
            )
        self._put_in(grown)
        self.context.tasks = (*self.tasks, task)
        if freeze:
            for p in self.parameters():
                p.requires_grad_(p in own)

    def load_bank(self, bank: Mapping[str, str | Path]) -> None:
        """Put saved adapters, or LoRAs in PEFT's format, one for each task named, where the method keeps the tasks'
        experts (MoA, X-LoRA, TaskLoRA).

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: an unknown task, an adapter of another base or other layers, one for which no LoRA stands, or
                one of a higher rank; nothing was changed.
        """
        self._in_place()
        ids = {task: int(self.task_ids(task)[0]) for task in bank}
        found = {
            ids[task]: saved_loras(folder, self.layers, task, self.base_fingerprint) for task, folder in bank.items()
        }
        before = {name: p.clone() for name, p in self.state_dict().items()}
        try:
            put_experts(self.layers, found)
        except ValueError:
            self.load_state_dict(before)
            raise

    # Files.

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's own weights by name; no base weight is in it."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the adapter, all of it or nothing.

        Raises:
            ValueError: a missing, extra or misshapen tensor, named.
        """
        copy_weights(self.layers, state)

    def save(self, folder: str | Path, with_factors: bool = False) -> None:
        """Write the adapter: its weights, and a manifest with the method, tasks, layers and the base's fingerprint.

        Args:
            with_factors: also write the frozen parts that were computed from the base (MoORE's U, sigma, V), so that
                another machine need not find the same ones.
        """
        self._in_place()
        frozen = frozen_parts(self.layers)
        tensors = {
            "adapter": self.state_dict(),
            "frozen": frozen if with_factors else {name: projection(part) for name, part in frozen.items()},
        }
        manifest = {
            "polyrank": "adapter",
            "method": method_fields(self.method),
            "tasks": list(self.tasks),
            "layers": self._places.linears(),
            "with_factors": with_factors,
            "base": self.base_fingerprint,
        }
        write_folder(folder, tensors, manifest)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, method: Method | None = None) -> "Adapter":
        """Put a saved adapter into a fresh base model. The model is changed only if everything fits.

        Args:
            method: needed for a method that does not come with polyrank; code is never imported from a file.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: damaged files, another base model, or singular factors that differ on this machine.
        """
        tensors, manifest = read_folder(folder)
        if manifest.get("polyrank") != "adapter" or not {"base", "layers", "method", "tasks"} <= manifest.keys():
            raise ValueError(
                f"{folder} holds no adapter: give the folder that adapter.save() wrote (for a run: RUN/adapter)"
            )
        wrong = difference(manifest["base"], fingerprint(dict(model.named_parameters())))
        if wrong is not None:
            raise ValueError(f"{folder} was trained on another base model: {wrong}; load the base it was trained on")
        exactly = "|".join(re.escape(name) for name in manifest["layers"])
        adapter = adapt(model, method or method_from(manifest["method"]), tasks=manifest["tasks"], targets=exactly)
        try:
            adapter.load_state_dict(tensors["adapter"])
            load_frozen(adapter.layers, tensors["frozen"], manifest["with_factors"])
        except (ValueError, KeyError):
            adapter.remove()
            raise
        return adapter

    # Leaving.

    def release_base(self, folder: str | Path) -> None:
        """Move the adapted layers' frozen weights to ``folder`` and free their memory.

        ``remove`` reads them back bit for bit. Only for methods whose layers stand for their base (MoORE).

        Raises:
            ValueError: a layer computes with its base's weight.
        """
        self._in_place()
        if self._released is not None:
            raise RuntimeError(f"the base's weights are in {self._released} already")
        for name, layer in self.layers.items():
            if not layer.stands_for_base:
                raise ValueError(f"{name} needs its base weight in every forward: only MoORE's layers stand for it")
        write_folder(
            folder, {"weights": {name: layer.weight for name, layer in self.layers.items()}}, {"polyrank": "weights"}
        )
        self._released = Path(folder)
        for layer in self.layers.values():
            empty = torch.empty_like(layer.weight, device="meta")
            layer.base.register_parameter("weight", nn.Parameter(empty, requires_grad=False))

    def _restore_base(self) -> None:
        if self._released is None:
            return
        weights = read_folder(self._released)[0]["weights"]
        for name, layer in self.layers.items():
            device = next(p for key, p in layer.named_parameters() if not key.startswith("base.")).device
            layer.base.register_parameter("weight", nn.Parameter(weights[name].to(device), requires_grad=False))
        self._released = None

    def remove(self) -> nn.Module:
        """Take the adapter out: the model is the base again, module for module and bit for bit."""
        self._restore_base()
        self._places.restore()
        self._unhook()
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self._trained)
        self.layers = {}
        return self.model

    def merge(self, task: str) -> nn.Module:
        """Turn the model into the plain model of one task: each adapted layer becomes one weight. The adapter is spent.

        A base in 16 bits rounds the change with the weight, and a small change may be lost: the log warns, and
        ``lost_by_merging`` tells before. ``model.float()`` first keeps it.

        Raises:
            ValueError: an unknown task, or a gate that depends on the input; the model is unchanged.
        """
        self._in_place()
        index = int(self.task_ids(task)[0])
        self._restore_base()
        merge_into_bases(self.layers, index)
        return self.remove()

    @contextmanager
    def merged(self, task: str, gates: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The plain model of one task, for a while: afterwards the layers stand in it again, bit for bit.

        Args:
            gates: hold each layer's gate fixed at these weights (E,); see ``gate_means``.

        Raises:
            ValueError: an unknown task, or a gate that depends on the input, without ``gates``.
        """
        index = int(self.task_ids(task)[0])
        with self.off() as model:
            before = write_weights(self.layers, task_weights(self.layers, index, gates))
            try:
                yield model
            finally:
                put_back(before)

    def gate_means(self, task: str, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mean weights (E,) of each layer's gate on a task, over the tokens of ``batches`` that are no padding.

        Args:
            batches: the model's inputs by keyword.

        Raises:
            ValueError: an unknown task, no batch, or layers that have no such gate.
        """
        training = self.model.training
        self.model.eval()
        try:
            with self.on(task):
                return gate_means(self.model, self.layers, batches)
        finally:
            self.model.train(training)

    def export(
        self,
        folder: str | Path,
        task: str,
        format: Format = "lora",
        *,
        inputs: Mapping[str, Tensor],
        max_rank: int | None = None,
        dtype: torch.dtype | None = None,
        gates: Mapping[str, Tensor] | None = None,
        also: Callable[[Path], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Exported:
        """Write one task as files that others load without polyrank; the adapter stays what it is.

        What was written is read again and run on ``inputs``. Where it does not compute what the mixture computes,
        nothing is left.

        Args:
            folder: a new one, or an empty one.
            format: "lora", PEFT's files in the form that every engine reads; or "dense", a plain model by
                ``save_pretrained``.
            inputs: examples for the comparison, the model's inputs by keyword.
            max_rank: cut the change of each layer to the best LoRA of this rank; the error is told before it is saved.
            dtype: of the LoRA; fp32 by default.
            gates: hold gates that depend on the input fixed at these weights; see ``gate_means``. The files then say
                that they are approximate.
            also: is called with the folder before it is put in its place, to add files; its errors leave nothing.
            say: is told what a person wants to know, line by line.

        Raises:
            ValueError: an unknown task; a gate that depends on the input, without ``gates``; a change of full rank that
                is no LoRA, without ``max_rank``; or files that compute something else.
            FileExistsError: the folder holds something.
            TypeError: "dense", and the model has no ``save_pretrained``.
        """
        self._in_place()
        if format not in ("lora", "dense"):
            raise ValueError(f"format={format!r}: take 'lora' or 'dense'")
        if format == "dense" and (max_rank is not None or dtype is not None):
            raise ValueError("max_rank and dtype are of a LoRA: leave them out, or take format='lora'")
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank={max_rank}: a LoRA has a rank of 1 or more")
        note = {"polyrank": version("polyrank"), "method": method_fields(self.method)}
        return export(
            self,
            folder,
            task,
            format,
            inputs=inputs,
            max_rank=max_rank,
            dtype=dtype,
            gates=gates,
            note=note,
            also=also,
            say=say,
        )

    def lost_by_merging(self, task: str) -> dict[str, float]:
        """By layer, the share of the change of its weight that ``merge`` would lose by rounding to the base's dtype.

        Empty where the base is as fine as the adapter.

        Raises:
            ValueError: an unknown task, or a gate that depends on the input.
        """
        self._in_place()
        index = int(self.task_ids(task)[0])
        self._restore_base()
        return lost_by_rounding(self.layers, index)

    def summary(self) -> Summary:
        """Parameters, cost and mergeability; ``print`` it."""
        return summarise(self.model, self.method, self.tasks, self.layers)


def adapt(
    model: nn.Module,
    method: Method,
    *,
    tasks: Sequence[str],
    targets: str | Sequence[str] = target_names.ALL_LINEAR,
    exclude: str | None = None,
) -> Adapter:
    """Freeze ``model`` and put the method's layer, in place, wherever ``targets`` says.

    Args:
        model: any module with linear layers. Its forward then also takes ``task_ids``, a LongTensor (B,).
        tasks: the names of the tasks, in the order of their ids.
        targets: "all-linear", a regular expression for whole names, or a list of suffixes; see ``targets.find``.
        exclude: a regular expression for names to leave out.

    Raises:
        ValueError: bad task names, or layers that cannot be adapted; the model is unchanged.
    """
    names = _checked_tasks(tasks)
    sites = target_names.find(model, targets, exclude)
    base = fingerprint(dict(model.named_parameters()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks: list[Block] = []
    if method.ADAPTS == "feed-forward blocks":
        sites, blocks = group(model, sites, type(method).__name__)
    model.requires_grad_(False)
    context = RouteContext(names)
    context.arguments = tuple(inspect.signature(model.forward).parameters)
    try:
        layers = method.build(sites, names)
        for name, layer in layers.items():
            layer.site = Site(name, target_names.stream(name, model), context)
            layer.train(model.get_submodule(name).training)
        return Adapter(model, method, context, layers, base, trained, blocks)
    except BaseException:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)
        raise


def _checked_tasks(tasks: Sequence[str]) -> list[str]:
    if isinstance(tasks, str):
        raise ValueError(f"tasks={tasks!r} is one string: give a list of names, [{tasks!r}]")
    names = [checked_name(task, "task") for task in tasks]
    if not names or len({name.lower() for name in names}) != len(names):
        raise ValueError(
            f"tasks must be one or more different names (upper and lower case count as the same), got {names}"
        )
    return names
