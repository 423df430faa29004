"""The tasks' gradients from forwards of their own samples, and from one of all: the same, whatever the method."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.testing import assert_close

import small
import test_combining
import test_language
import tiny
from polyrank import Adapter, Method, adapt
from polyrank.combine import COMBINERS
from polyrank.combining import Apart, Combination
from polyrank.corpus import Batch, Corpus
from polyrank.forwards import Forwards, TaskByTask, Whole
from polyrank.methods import SAME, LoRA, MoLA, SMoRA
from polyrank.methods.same import RememberingRouter
from polyrank.methods.smora import LossFreeTopK
from polyrank.mixture import MixtureLinear
from polyrank.models import HeadModel
from polyrank.retaining import QualityRetaining, Retaining
from polyrank.training import Training
from small import METHODS

ALONE = {"moa", "task_lora"}  # nothing is shared, so nothing is kept apart


def ready(method: Method, picks: list[tuple[int, int]] | None = None) -> tuple[HeadModel, Adapter, Batch]:
    """A tiny encoder in training, moved off its start, and a batch of three tasks, some labels missing."""
    of = [replace(task, name=name) for task, name in zip(test_combining.tasks(), small.TASKS, strict=True)]
    model = tiny.model(of)
    targets = r".*(query|value|intermediate\.dense|output\.dense)"  # blocks too
    adapter = adapt(model.backbone, method, tasks=small.TASKS, targets=targets)
    model.double()
    small.fill_bank(adapter)
    small.disturb(adapter)
    model.train(not isinstance(method, small.NOISY))
    corpus = Corpus.of(of, {t.name: t.train for t in of}, model.reader)
    return model, adapter, corpus.collate(picks or [(t, 5 * t + i) for i in range(5) for t in (2, 0, 1)])


def gradients(kind: type[Forwards], model, adapter, batch, retaining=None) -> tuple[list[Tensor], Tensor, Tensor]:
    """The tasks' gradients on each shared weight, what stands in all weights' grad, and S_t with auxiliary losses."""
    counts = model.counts(batch.labels)
    shared = list(adapter.shared_parameters())
    every = [*adapter.parameters(), *model.heads.parameters()]
    others = [p for p in every if not any(p is one for one in shared)]
    combination = Combination(COMBINERS["mgda"](), [t.name for t in model.tasks], 0)
    how = Apart(combination, 0, counts, shared, others, Accelerator(cpu=True))
    if retaining is not None:
        retaining.begin(model.device)
    model.zero_grad()
    values = torch.zeros(len(counts) + 1, dtype=torch.float64)
    for found in kind(model, adapter, retaining, Training(), lambda: None).of(batch, counts):
        how.add(found.objective, found.auxiliary, found.present, found.again)
        values += torch.cat([found.sums, found.auxiliary.detach().view(1)])
    assert not adapter.context.notes, "notes were left over"
    return how.stacks, test_combining.flat(every), values


def calls(model: nn.Module) -> list[int]:
    """How many samples stood in each forward of a model from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[1])))
    return seen


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ALONE])
def test_both_ways_give_the_same_gradients(name):
    model, adapter, batch = ready(METHODS[name])
    (stacks, rest, values), (want, want_rest, want_values) = (
        gradients(kind, model, adapter, batch) for kind in (TaskByTask, Whole)
    )
    for one, other in zip(stacks, want, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-11 * float(other.abs().max()) + 1e-14)
    assert_close(rest, want_rest, rtol=1e-9, atol=1e-12)
    assert_close(values, want_values, rtol=1e-10, atol=1e-12)
    norms = torch.stack([one.flatten(1).square().sum(1) for one in want]).sum(0)
    assert (norms > 0).all() and rest.norm() > 0
    assert adapter.hears != "nothing" or values[-1] == 0, "losses that were not announced"


@pytest.mark.parametrize("name", ["lora", "mola", "c_lorae", "xlora"])
def test_with_checkpointing(name):
    """The recomputation of a forward that leaves no notes leaves none."""
    found = []
    for checkpointing in (False, True):
        model, adapter, batch = ready(METHODS[name])
        if checkpointing:
            adapter.enable_checkpointing()
        found.append(gradients(TaskByTask, model, adapter, batch))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert_close(found[0][1:], found[1][1:], rtol=1e-9, atol=1e-12)


def test_with_answers_that_are_retained():
    found = []
    for kind in (TaskByTask, Whole):
        model, adapter, batch = ready(METHODS["mola"])
        retaining = Retaining(QualityRetaining(weight=3.0), model.tasks)
        without = gradients(kind, model, adapter, batch, retaining)
        retaining.after()
        for p in adapter.parameters():
            p.data += 0.1
        found.append((*gradients(kind, model, adapter, batch, retaining), retaining.last, retaining.fresh))
        assert not torch.equal(without[0][0], found[-1][0][0]) and retaining.last.gt(0).all()
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-8)  # the banks are fp32
    assert_close(found[0][1:], found[1][1:], rtol=1e-6, atol=1e-7)


SOME = [(0, 1), (1, 1), (0, 2), (1, 2)]  # of two tasks
MIX = [5, 5, 5]


@pytest.mark.parametrize(
    ("method", "picks", "want"),
    [
        (LoRA(rank=2), None, MIX),
        (LoRA(rank=2), SOME, [2, 2]),
        (LoRA(rank=2), SOME[::2], [2]),
        (METHODS["smora"], None, MIX),
        (MoLA(num_experts=(3,), balance=0.1), SOME, [2, 2]),  # its notes add up
        (METHODS["c_lorae"], None, [15, *MIX]),  # its notes compare samples
        (METHODS["c_lorae"], SOME, [4]),  # a backward pass each is not more
        (METHODS["faded"], None, MIX),  # of a method without losses
        (METHODS["same-released"], None, [15]),  # its gate reads the batch
    ],
    ids=repr,
)
def test_which_way_is_taken(method, picks, want):
    model, adapter, batch = ready(method, picks)
    seen = calls(model)
    gradients(TaskByTask, model, adapter, batch)
    assert seen == want


def test_a_norm_of_batches_keeps_the_batch_together():
    model, adapter, _ = ready(LoRA(rank=2))
    norm = nn.BatchNorm1d(16).double()
    model.backbone.add_module("norm", norm)
    assert adapter.mixes_samples
    norm.eval()
    assert not adapter.mixes_samples


def test_a_task_without_a_label_takes_no_part():
    model, adapter, batch = ready(LoRA(rank=2))
    labels = {**batch.labels, "b": torch.full_like(batch.labels["b"], -100)}
    batch = Batch(batch.inputs, batch.task_ids, labels)
    assert model.counts(labels).tolist()[1] == 0
    (stacks, rest, _), (want, want_rest, _) = (gradients(kind, model, adapter, batch) for kind in (TaskByTask, Whole))
    for one, other in zip(stacks, want, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert not one[1].any()
    assert_close(rest, want_rest, rtol=1e-9, atol=1e-12)


def counted(adapter: Adapter) -> list[Tensor]:
    found = []
    for layer in adapter.layers.values():
        assert isinstance(layer, MixtureLinear)
        if isinstance(layer.gate, LossFreeTopK):
            found.append(layer.gate.counts)
        if isinstance(layer.router, RememberingRouter):
            found.append(layer.router.heard)
    return found


@pytest.mark.parametrize("method", [SMoRA(rank=8, k=3, rate=0.01), SAME(num_experts=3, rank=2)], ids=repr)
def test_every_sample_is_counted_once(method):
    found = []
    for kind in (TaskByTask, Whole):
        model, adapter, batch = ready(method)
        gradients(kind, model, adapter, batch)
        found.append(counted(adapter))
    assert len(found[0]) == len(adapter.layers) and all(one.abs().sum() > 0 for one in found[0])
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_nothing_is_heard_in_a_forward_that_is_not_to_be():
    model, adapter, batch = ready(METHODS["mola"])
    with adapter.unheard():
        model(batch.inputs, batch.task_ids)
        assert not adapter.losses()
    model(batch.inputs, batch.task_ids)
    assert adapter.losses()


def test_parts_of_a_batch_of_a_causal_model():
    """Rows of samples are taken, and what is the batch's stays, although both have the same length here."""
    model = test_language.model("llama").double()
    corpus = Corpus.of(model.tasks, {t.name: t.train for t in model.tasks}, model.reader)
    batch = corpus.collate([(1, 0), (0, 0), (2, 1)])
    assert len(batch.task_ids) == len(batch.inputs["logits_to_keep"])
    whole = model.loss_sums(model(batch.inputs, batch.task_ids), batch.labels)
    parts = batch.by_task([t.name for t in model.tasks])
    assert [part.task_ids.unique().tolist() for part in parts] == [[0], [1], [2]]
    assert_close(sum(model.loss_sums(model(p.inputs, p.task_ids), p.labels) for p in parts), whole)
    assert sum(len(part.task_ids) for part in parts) == len(batch.task_ids)
