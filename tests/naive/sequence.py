"""Methods for tasks in sequence: their forward here, what they do between tasks in tests of their own."""

import torch

from polyrank.methods import SAME

from .by_token import like, logits_of, softmax, through_lora


def naive_same(method, p, weight, bias, x, ids):
    n, r = method.num_experts, method.rank
    tokens = list(x.flatten(0, 1))
    gates = [softmax(logits_of(p, token)) for token in tokens]
    if method.gate == "batch":
        mean = {i: sum(gate[i] for gate in gates) / len(gates) for i in range(n)}
        gates = [mean] * len(gates)
    out = []
    for token, w in zip(tokens, gates, strict=True):
        y = weight @ token + bias
        for j in range(n):
            if method.mixing == "outputs":
                y = y + method.alpha / r * w[j] * through_lora(p, j, r, token)
                continue
            for i in range(n):
                for k in range(r):
                    a, b = p["experts.lora_A"][i * r + k], p["experts.lora_B"][j * r + k]
                    y = y + method.alpha / r * w[j] * w[i] * b * torch.dot(a, token)
        out.append(y)
    return like(x, out), 0.0


SEQUENCE = {SAME: naive_same}
