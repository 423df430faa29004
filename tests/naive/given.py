"""Methods without a router, whose parts come from elsewhere: from a bank of all layers, or from a budget of them."""

import math

import torch

from polyrank.methods import AdaLoRA, VBLoRA


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


def naive_adalora(method, p, weight, bias, x, ids):
    """y = W x + b + s sum_i lambda_i P_i <Q_i, x>, and how far P and Q are from orthonormal."""
    q, values, columns = p["experts.lora_A"], p["experts.lora_E"], p["experts.lora_B"]
    rows = []
    for sample in x:
        for token in sample:
            y = weight @ token + bias
            for i in range(method.init_rank):
                y = y + method.alpha / method.init_rank * values[i] * sum(q[i] * token) * columns[i]
            rows.append(y)
    far = 0.0
    for vectors in (q, columns):
        for i in range(method.init_rank):
            for j in range(method.init_rank):
                far = far + (sum(vectors[i] * vectors[j]) - (1.0 if i == j else 0.0)) ** 2
    return torch.stack(rows).view(*x.shape[:-1], -1), method.orthogonality * far


GIVEN = {VBLoRA: naive_vb_lora, AdaLoRA: naive_adalora}
