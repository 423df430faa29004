"""Quality retaining by hand, in the trainer, and after a cut."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
from polyrank import Adapter, LoRA, adapt
from polyrank.models import Answer
from polyrank.retaining import QualityRetaining, Retaining
from polyrank.tasks import MISSING, Examples, Regression
from polyrank.train import train
from polyrank.training import Training
from resumable import STEPS, equal, go, weights
from test_resume import Cut, cut_after


def shares(z, tau):
    total = sum(math.exp(v / tau) for v in z)
    return [math.exp(v / tau) / total for v in z]


def test_penalties_and_banks_by_hand():
    """Three steps of two tasks, one label missing, one class never seen before."""
    tasks, m, tau, weight = tiny.tasks(), 0.25, 2.0, 0.7
    retaining = Retaining(QualityRetaining(weight=weight, momentum=m, temperature=tau), tasks)
    bank = {task.name: {} for task in tasks}  # by class, written here
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        retaining.begin(torch.device("cpu"))
        answers, labels, wanted = {}, {}, []
        for index, task in enumerate(tasks):
            classes = len(task.names)
            logits = torch.randn(5, classes, generator=generator, dtype=torch.float64).requires_grad_()
            y = torch.tensor([0, 0, classes - 1 if step else 0, MISSING, 0])
            answers[task.name], labels[task.name] = Answer(torch.arange(5), logits), y
            mean_loss, total = 0.5 + index, 0.0
            for z, c in zip(logits.tolist(), y.tolist(), strict=True):
                if c in bank[task.name]:
                    p, q = shares(z, tau), shares(bank[task.name][c], tau)
                    total += tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            wanted.append(weight / mean_loss * total)
            for c in {0, classes - 1} if step else {0}:
                own = [z for z, label in zip(logits.tolist(), y.tolist(), strict=True) if label == c]
                mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
                old = bank[task.name].get(c)
                bank[task.name][c] = (
                    mean if old is None else [m * a + (1 - m) * b for a, b in zip(old, mean, strict=True)]
                )
        found = retaining.penalties(answers, labels, torch.tensor([0.5, 1.5], dtype=torch.float64))
        assert_close(found.tolist(), wanted, rtol=1e-5, atol=1e-6)
        if step:
            found.sum().backward()
            assert all(answer.logits.grad.abs().sum() > 0 for answer in answers.values())
        retaining.after()
        for task in tasks:
            for c, row in bank[task.name].items():
                assert_close(retaining.state[f"bank {task.name}"][c].tolist(), row, rtol=1e-5, atol=1e-6)


WITH = STEPS.model_copy(update={"quality_retaining": QualityRetaining(weight=3.0)})


def test_it_changes_the_training_and_survives_a_cut(tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", "lora", WITH)
    assert not equal(weights(go(tmp_path / "without", "lora")), weights(whole))
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "after_step", cut_after(5))
        with pytest.raises(Cut):
            go(tmp_path / "cut", "lora", WITH)
    assert equal(weights(go(tmp_path / "cut", "lora", WITH)), weights(whole))


def test_answers_move_less():
    """At a high rate, far fewer answers drift from step to step."""
    drift = []
    for weight in (None, 50.0):
        settings = None if weight is None else QualityRetaining(weight=weight, momentum=0.9)
        tasks = tiny.tasks()
        model = tiny.model(tasks)
        adapter = adapt(model.backbone, LoRA(rank=4), tasks=[task.name for task in tasks])
        kept = []

        def remember(module: nn.Module, given: object, output: dict, kept: list = kept) -> None:
            if module.training:
                kept.append({name: answer.logits.detach() for name, answer in output.items()})

        model.register_forward_hook(remember)
        training = Training(steps=30, batch_size=16, lr=2e-2, holdout=0.0, eval_every=30, quality_retaining=settings)
        train(model, adapter, tasks, training, progress=False)
        sizes = [max(float(z.std()) for z in answers.values()) for answers in kept[-10:]]
        drift.append(sum(sizes))
    assert drift[1] < 0.7 * drift[0]


def test_tasks_without_classes_are_refused():
    task = Regression.from_examples("length", Examples(["a b", "c"], [2.0, 1.0]), Examples(["a"], [1.0]))
    with pytest.raises(ValueError, match="no task is a classification"):
        Retaining(QualityRetaining(), [task])
