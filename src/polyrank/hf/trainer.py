"""A mixin for the Trainers of transformers and TRL.

    L = what the Trainer computes + the method's auxiliary losses of the same forward, a mean over micro-batches

The adapter is trained, logged, saved and resumed; the base model is not copied. The class stands before a Trainer:
``class T(PolyrankTrainerMixin, Seq2SeqTrainer)``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from polyrank.adapt import Adapter
from polyrank.hf.checkpoints import restore_from, save_into
from polyrank.hf.collator import TaskCollator
from polyrank.hf.losses import Losses, TaskLosses, losses_of
from polyrank.methods import Method
from polyrank.mixture import Mixture
from polyrank.tasks.base import MISSING

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # whichever stands behind the mixin


class PolyrankTrainerMixin(Trainer):
    """Trains an adapter of ``polyrank.adapt``. It takes what the Trainer takes, by name, and three arguments more.

    The losses that the Trainer logs also come by task, as ``loss_TASK`` and ``eval_loss_TASK``: the mean over the
    labels since the last log, over all processes, without the method's own losses (those are ``auxiliary``). In
    evaluation the samples that even out the last batches of several processes count twice. ``metric_for_best_model``
    may name one of them.
    """

    def __init__(
        self, *args: Any, adapter: Adapter, task_column: str = "task", task_keyword: str = "task_ids", **kwargs: Any
    ) -> None:
        """
        Args:
            adapter: the handle of the adapter in the model.
            task_column: the column of every data set that names the task of its rows, or gives its id.
            task_keyword: the model's name for the ids.

        Raises:
            ValueError: settings under which the tasks or the adapter's state would be lost, with the cure.
        """
        super().__init__(*args, **kwargs)
        self.adapter, self.task_column, self.task_keyword = adapter, task_column, task_keyword
        self._pinned: Tensor | None = None  # the tasks of an evaluation step under way
        self._trained, self._evaluated = TaskLosses(adapter.tasks), TaskLosses(adapter.tasks)
        self._refuse_unfit()
        if not isinstance(self.data_collator, TaskCollator):
            self.data_collator = TaskCollator(self.data_collator, adapter.tasks, task_column, task_keyword)
        self.add_callback(_Steps(self))

    def _adapted(self) -> nn.Module:
        """The model as it was given, in no wrapper: it is the adapter's, or has it inside."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _refuse_unfit(self) -> None:
        model = self._adapted()
        if all(module is not self.adapter.model for module in model.modules()):
            raise ValueError("the adapter is not in this model: give the Trainer the model that was adapted")
        if self.model_init is not None:
            raise ValueError("model_init would build a model without the adapter: adapt a model and pass it as model=")
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process share one route: start a process for each, `accelerate launch` or "
                "`torchrun`, or make one GPU visible with CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed split the adapter's weights, which are saved as a whole: train with DDP (torchrun "
                "without either), the frozen base in bf16 or 4 bits where memory is short"
            )
        if self.args.fp16 and type(self.adapter.method).before_step is not Method.before_step:
            raise ValueError(
                f"{type(self.adapter.method).__name__} reads gradients, and fp16 scales them: set bf16=True instead"
            )
        own = self.args.gradient_checkpointing_kwargs
        if self.args.gradient_checkpointing and own not in (None, {}, {"use_reentrant": False}):
            raise ValueError(
                f"gradient_checkpointing_kwargs={own}: recomputed layers need their own forward's route, which the "
                "adapter brings along; leave the argument out"
            )
        fused = any(kind.__module__.startswith("trl.") for kind in type(self).__mro__)
        if fused and isinstance(model, PreTrainedModel) and isinstance(model.get_output_embeddings(), Mixture):
            raise ValueError(
                "TRL multiplies with the output layer's weight and never calls it: leave it out with "
                "adapt(..., exclude=r'.*lm_head')"
            )
        for name, rows in _data_sets(self.train_dataset, self.eval_dataset):
            if self.task_column not in rows.column_names:
                raise ValueError(
                    f"the {name} data set has no column {self.task_column!r}, only {', '.join(rows.column_names)}: add "
                    "it, or name yours with task_column= (TRL's packing drops it: set packing=False)"
                )

    # The task of each row.

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and self.task_column not in self._signature_columns:
            self._signature_columns.append(self.task_column)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._pinned is not None:  # prediction_step listens
            return super().compute_loss(model, self._with_prompt(inputs), return_outputs, num_items_in_batch)  # type: ignore[arg-type]
        ids, labels = self._ids(inputs), inputs.get("labels")
        with _Heard(self.adapter, torch.is_grad_enabled()) as heard:
            found: Any = super().compute_loss(
                model,
                self._with_prompt(inputs),
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,  # type: ignore[arg-type]
            )
        auxiliary = sum(heard.losses.values(), torch.zeros((), device=ids.device)) if heard.losses else None
        if not self.adapter.model.training:
            return found
        self._trained.add(self._losses(heard.output, labels, ids), auxiliary)
        if auxiliary is None:
            return found
        auxiliary = auxiliary / (self.current_gradient_accumulation_steps if self._scaled(num_items_in_batch) else 1)
        return (found[0] + auxiliary, *found[1:]) if return_outputs else found + auxiliary

    def _ids(self, inputs: Mapping[str, Any]) -> Tensor:
        if self.task_keyword not in inputs:
            raise ValueError(
                f"a batch came without {self.task_keyword!r}, only with {', '.join(inputs)}: let the data loader use "
                "the Trainer's own data_collator, which brings it"
            )
        return inputs[self.task_keyword]

    def _with_prompt(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A causal model's gate that pools its tokens sees those before the first label, as when it generates."""
        labels, reads = inputs.get("labels"), (layer.reads for layer in self.adapter.layers.values())
        if self._writes and isinstance(labels, Tensor) and any("sample" in one for one in reads):
            inputs["prompt_mask"] = ((labels != MISSING).cumsum(1) == 0).long()
            if isinstance(mask := inputs.get("attention_mask"), Tensor):
                inputs["prompt_mask"] *= mask
        return inputs

    @property
    def _writes(self) -> bool:
        """Whether logits are those of the next token."""
        return type(self.adapter.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _losses(self, output: Any, labels: Any, ids: Tensor) -> list[Losses]:
        model = self.adapter.model
        problem = model.config.problem_type if isinstance(model, PreTrainedModel) else None
        return losses_of(output, labels, ids, shifts=self._writes, problem=problem)

    def _scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is the micro-batch's share of the whole step already; otherwise the Trainer divides it."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """With the tasks pinned: generation may bypass the model's own forward."""
        inputs = self._prepare_inputs(dict(inputs))  # type: ignore[assignment]
        ids, labels = self._ids(inputs), inputs.get("labels")
        self._pinned = inputs.pop(self.task_keyword)
        try:
            with self.adapter.on(ids, inputs.get("attention_mask")), _Heard(self.adapter, False) as heard:
                found = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._pinned = None
        self._evaluated.add(self._losses(heard.output, labels, ids))
        return found

    # Steps.

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Over the adapter's own groups, and what else is trained (a head) as the Trainer has it."""
        if self.optimizer is None:
            rate, decay = self.args.learning_rate, self.args.weight_decay
            groups = self.adapter.param_groups(rate, decay)
            own = set(self.adapter.parameters())
            others = [p for p in self._adapted().parameters() if p.requires_grad and p not in own]
            if others:
                groups.append({"params": others, "lr": rate, "weight_decay": decay})
            model: Any = self._adapted()
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"params", "model", "optimizer_dict"} & options.keys() or not isinstance(kind, type):
                raise ValueError(
                    f"optim={self.args.optim} groups the weights itself: take another, such as adamw_torch"
                )
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the step's last micro-batch: gradients are complete, and not clipped yet
            self.adapter.before_step((self.state.global_step + 1) / self.state.max_steps)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._trained.take(self.accelerator)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = TaskLosses(self.adapter.tasks)
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if found.metrics is not None:
            found.metrics.update(self._evaluated.take(self.accelerator, f"{metric_key_prefix}_"))
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        settled = self.state.global_step >= self.adapter.settles * self.state.max_steps
        return settled and super()._determine_best_metric(metrics, trial)

    # Files.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_into(folder, self._adapted(), self.adapter)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_from(Path(resume_from_checkpoint), self._adapted(), self.adapter)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            restore_from(Path(self.state.best_model_checkpoint), self._adapted(), self.adapter)


class _Steps(TrainerCallback):
    """What has no method of the Trainer to stand in."""

    def __init__(self, trainer: PolyrankTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_checkpointing:  # after the Trainer's own, which knows no route
            self.trainer.adapter.enable_checkpointing()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.adapter.after_step()


class _Heard:
    """What the model's last forward inside the block said and left behind, of those that have gradients (TRL also runs
    some without, for its metrics), or have none."""

    def __init__(self, adapter: Adapter, gradients: bool) -> None:
        self.adapter, self.gradients = adapter, gradients
        self.output: Any = None
        self.losses: dict[str, Tensor] = {}

    def _hear(self, module: nn.Module, args: object, output: object) -> None:
        if torch.is_grad_enabled() == self.gradients:
            self.output, self.losses = output, self.adapter.losses()

    def __enter__(self) -> "_Heard":
        self.hook = self.adapter.model.register_forward_hook(self._hear)  # behind the adapter's own
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def _data_sets(train: object, evaluation: object) -> list[tuple[str, Dataset]]:
    found = {"training": train}
    found |= evaluation if isinstance(evaluation, dict) else {"evaluation": evaluation}
    return [(name, rows) for name, rows in found.items() if isinstance(rows, Dataset)]
