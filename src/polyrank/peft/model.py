"""How PEFT puts a POLYRANK adapter in, and takes it out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn

from polyrank import targets
from polyrank.blocks import group
from polyrank.mixture import Mixture, RouteContext, Site, is_linear
from polyrank.places import Places, merge_into_bases

from .adapters import NO_TASK, Adapters, Handle, adapters_of
from .config import PolyrankConfig
from .layer import Container, PolyrankLayer
from .register import PREFIX

OF_LORA = (
    "{what} is LoRA's alone: a mixture is no single low-rank product. Where the gate does not read the input, one task "
    "can leave as a plain LoRA: train with polyrank.adapt and export that task"
)


class PolyrankModel(BaseTuner):
    """A model with POLYRANK adapters."""

    prefix: str = PREFIX
    tuner_layer_cls = PolyrankLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter in. The layers follow from the configuration, also where a state dict is given: layers that
        share all their weights have none of their own in it.

        Raises:
            ValueError: the method cannot adapt these layers; no layer was put in.
        """
        self._plan: _Plan | None = None
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._plan = None

    @skip_init_on_device  # low_cpu_mem_usage leaves fresh weights without values, and methods compute with them
    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """PEFT calls this for one layer after the other; a method is built from all of them, so once."""
        assert isinstance(peft_config, PolyrankConfig)
        if self._plan is None:
            names = [name for name in _names(self.model) if self._check_target_module_exists(peft_config, name)]
            self._plan = _Plan(self.model, adapter_name, peft_config, names)
        if current_key == self._plan.names[-1]:  # after that one PEFT looks up no other name
            self._plan.put_in()

    # Calls.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # older PEFT goes around the model's hooks

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                OF_LORA.format(what="adapter_names=, an adapter for each sample,") + "; give task_id instead"
            )
        yield

    def generate(self, *args: Any, task_id: Any = None, **kwargs: Any) -> Any:
        """The base model's ``generate``, with the task of each prompt: its calls bypass the forward's keywords."""
        adapters = adapters_of(self.model)
        handle = None if adapters is None else adapters.running
        if handle is None:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        if task_id is not None:
            with handle.on(task_id, kwargs.get("attention_mask")):
                return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        if not handle.context.pins and handle.routes_by_task:
            raise ValueError(NO_TASK.format(name=handle.name, method=handle.method))
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    # Leaving.

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """
        Raises:
            ValueError: no task is pinned where the gate reads one, or no weight stands for a task; nothing was changed.
        """
        adapters = adapters_of(self.model)
        if adapters is not None:
            merged = adapters.first.merged
            if merge and not merged:
                self._merge(adapters, adapter_names, safe_merge)
            elif merged and not merge:
                self.unmerge_adapter()
            adapters.close()
        # modules_to_save; PEFT's annotation says None
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put the adapter's weights of the pinned task in the place of the frozen ones, all or none.

        Raises:
            ValueError: as for ``merge_and_unload``.
        """
        adapters = adapters_of(self.model)
        if adapters is None or adapters.first.merged:
            return
        handle = _to_merge(adapters, adapter_names)
        layers = [layer for layer in adapters.layers.values() if layer.has(handle.name)]
        for layer in layers:
            layer.remember(handle.name)
        self._merge(adapters, adapter_names, safe_merge)
        for layer in adapters.layers.values():
            layer.merged_adapters = [handle.name]
        adapters.refresh()

    def _merge(self, adapters: Adapters, adapter_names: list[str] | None, safe_merge: bool) -> None:
        handle = _to_merge(adapters, adapter_names)
        layers = handle.layers
        task = handle.context.pinned_task
        if task is None:
            if any("task" in layer.reads for layer in layers.values()):
                raise ValueError(
                    f"the adapter {handle.name!r} ({handle.method}) is another model for each task: pin one, "
                    "`with polyrank.peft.on(model, 'task'): merged = model.merge_and_unload()`"
                )
            task = 0
        for layer in layers.values():
            layer.refuse_if_input_routed()
            if safe_merge and not all(bool(weight.isfinite().all()) for _, weight in layer.task_weights(task)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {handle.name} seems to be broken")
        merge_into_bases(layers, task)

    # What PEFT has for LoRA alone.

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(OF_LORA.format(what="add_weighted_adapter"))


class _Plan:
    """The layers of one adapter, built and not yet put in.

    Raises:
        ValueError: layers that cannot be adapted, side by side with others or at all.
    """

    def __init__(self, model: nn.Module, adapter: str, config: PolyrankConfig, names: list[str]) -> None:
        self.model, self.names, self.config = model, names, config
        method, known = config.build(), adapters_of(model)
        self.adapters = known
        sites, fresh, blocks = (
            _sites(model, names),
            [name for name in names if known is None or name not in known.layers],
            [],
        )
        if method.ADAPTS == "feed-forward blocks" or (known is not None and any(one.blocks for one in known.places)):
            if known is not None:
                raise ValueError(
                    f"{method} and the adapters that the model has do not go side by side: one that adapts whole "
                    "feed-forward blocks stands alone; delete and unload the others, or load the base once more"
                )
            sites, blocks = group(model, sites, type(method).__name__)
            fresh = list(sites)
        context = RouteContext(config.tasks)
        mixtures = method.build(sites, config.tasks)
        for name, mixture in mixtures.items():
            mixture.site = Site(name, targets.stream(name, model), context)
        self.mixtures, self.blocks, self.fresh = mixtures, blocks, fresh
        self.adapter, self.method, self.context = adapter, method, context
        for hook in method.attach(model, mixtures):  # it may refuse the model, and hooks it only while it runs
            hook.remove()

    def put_in(self) -> None:
        adapters = self.adapters or Adapters(self.model)
        self.context.arguments = adapters.arguments
        places = Places(self.model, self.fresh, self.blocks)
        homes: dict[Tensor, Container] = {}
        layers: dict[str, PolyrankLayer] = {}
        for name, mixture in self.mixtures.items():
            layer = layers[name] = (
                adapters.layers[name] if name in adapters.layers else self._layer(name, mixture, adapters)
            )
            layer.put(self.adapter, mixture, homes, self.config.with_factors)
        places.fill({name: layers[name] for name in self.fresh})  # type: ignore[dict-item]
        adapters.places.append(places)
        adapters.layers |= layers
        adapters.handles[self.adapter] = Handle(
            self.adapter, self.method, self.context, layers, adapters.base_fingerprint
        )

    def _layer(self, name: str, mixture: Mixture, adapters: Adapters) -> PolyrankLayer:
        layer = PolyrankLayer(mixture.base, adapters)
        layer.train(self.model.get_submodule(name).training)
        if adapters.layers:  # PEFT's own switches, of a model that has adapters
            first = adapters.first
            layer._active_adapter, layer._disable_adapters = list(first.active_adapters), first.disable_adapters
            layer.merged_adapters = list(first.merged_adapters)
        return layer


def _names(model: nn.Module) -> Iterator[str]:
    """The names of all modules that PEFT may target: what is inside of an adapted layer is not."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside or ("\0",)):
            yield name
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")


def _sites(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_linear(module)}
    sites: dict[str, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, PolyrankLayer):
            sites[name] = module.base_layer
            continue
        if isinstance(module, BaseTunerLayer) or not is_linear(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, and POLYRANK adapts linear layers: target those, or leave it "
                "out with exclude_modules"
            )
        if (reason := targets.obstacle(model, linears, name, module)) is not None:
            raise ValueError(f"{name} cannot be adapted: {reason}")
        sites[name] = module
    return sites


def _to_merge(adapters: Adapters, adapter_names: list[str] | None) -> Handle:
    handle = adapters.current
    names = [] if handle is None else [handle.name]
    if handle is None or (adapter_names is not None and list(adapter_names) != names):
        raise ValueError(
            f"adapter_names={adapter_names}: the active POLYRANK adapter is merged, and no other ({', '.join(names)}): "
            "set_adapter first"
        )
    return handle
