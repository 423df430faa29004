"""Methods without a router, whose parts come from elsewhere: from a bank of all layers, or from a budget of them."""

import math

import torch

from polyrank.methods import VBLoRA


def naive_vb_lora(method, p, weight, bias, x, ids):
    bank = p["experts.bank.vectors"]

    def joined(logits):
        """One row of A, or column of B: its sub-vectors, each from logits of its own, one after the other."""
        entries = []
        for own in logits:
            best = sorted(range(len(bank)), key=lambda j: -float(own[j].detach()))[: method.k]
            total = sum(math.e ** own[j] for j in best)
            mixed = sum(math.e ** own[j] / total * bank[j] for j in best)
            entries += [mixed[e] for e in range(method.vector_length)]
        return torch.stack(entries)

    a = [joined(p["experts.logits_A"][i]) for i in range(method.rank)]
    b = [joined(p["experts.logits_B"][i]) for i in range(method.rank)]
    rows = []
    for sample in x:
        for token in sample:
            y = weight @ token + bias
            for i in range(method.rank):
                y = y + b[i] * sum(a[i] * token)
            rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1), 0.0


GIVEN = {VBLoRA: naive_vb_lora}
