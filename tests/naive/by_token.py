"""Methods whose gate reads the input, as loops over tokens and experts."""

import math

import torch
from torch.nn.functional import silu

from polyrank.methods import (
    ConditionalMixLoRA,
    Faded,
    HydraLoRA,
    LoRAMoE,
    MALoRA,
    MoA,
    MoDE,
    MoLA,
    OMoE,
    SMoRA,
    TeamLoRA,
)
from small import TASKS


def best(scores, k):
    """The indices of the k highest scores, from the highest."""
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]


def softmax(scores, among=None):
    """Index -> exp(score) over the sum of them all."""
    among = range(len(scores)) if among is None else among
    highest = max(scores[e].item() for e in among)
    total = sum(torch.exp(scores[e] - highest) for e in among)
    return {e: torch.exp(scores[e] - highest) / total for e in among}


def through_lora(p, e, r, token):
    """B_e A_e x."""
    out = 0.0
    for row in range(e * r, (e + 1) * r):
        out = out + p["experts.lora_B"][row] * torch.dot(p["experts.lora_A"][row], token)
    return out


def logits_of(p, token):
    return [torch.dot(row, token) for row in p["router.weight"]]


def switch(every, k):
    """E sum_e f_e P_e over the logits of every token: f the share of the k N choices, P the mean probability."""
    experts = len(every[0])
    loss = 0.0
    for e in range(experts):
        fraction = sum(e in best(z, k) for z in every) / (k * len(every))
        probability = sum(softmax(z)[e] for z in every) / len(every)
        loss = loss + fraction * probability
    return experts * loss


def like(x, out):
    return torch.stack(out).view(*x.shape[:2], -1)


def naive_hydralora(method, p, weight, bias, x, ids):
    r, out = method.rank, []
    for token in x.flatten(0, 1):
        gate = softmax(logits_of(p, token))
        y = weight @ token + bias
        for i in range(method.num_experts):
            for j in range(r):
                b = p["experts.lora_B"][i * r + j]
                y = y + method.alpha / r * gate[i] * b * torch.dot(p["experts.lora_A"][j], token)
        out.append(y)
    return like(x, out), 0.0


def naive_faded(method, p, weight, bias, x, ids):
    """HydraLoRA's weights, and equal ones as far as its router has faded."""
    of, out = method.method, []
    for token in x.flatten(0, 1):
        gate = softmax(logits_of(p, token))
        y = weight @ token + bias
        for i in range(of.num_experts):
            share = p["gate.kept"] * gate[i] + (1 - p["gate.kept"]) / of.num_experts
            for j in range(of.rank):
                b = p["experts.lora_B"][i * of.rank + j]
                y = y + of.alpha / of.rank * share * b * torch.dot(p["experts.lora_A"][j], token)
        out.append(y)
    return like(x, out), 0.0


def naive_loramoe(method, p, weight, bias, x, ids):
    r, n, out, z = method.rank, method.num_experts, [], []
    for sample, t in zip(x, ids, strict=True):
        mass = [0.0] * n
        for token in sample:
            gate = softmax(logits_of(p, token))
            y = weight @ token + bias
            for i in range(n):
                y = y + method.alpha / r * gate[i] * through_lora(p, i, r, token)
                mass[i] = mass[i] + gate[i]
            out.append(y)
        for i in range(n):
            factor = 1.0
            if method.knowledge:
                of_knowledge, in_first_half = TASKS[int(t)] in method.knowledge, i < math.ceil(n / 2)
                factor = 1 - method.delta if of_knowledge == in_first_half else 1 + method.delta
            z.append(factor * mass[i] / len(sample))
    mean = sum(z) / len(z)
    variance = sum((one - mean) ** 2 for one in z) / len(z)
    return like(x, out), method.balance * variance / mean**2


def naive_mola(method, p, weight, bias, x, ids):
    r, out, every = method.rank, [], []
    for token in x.flatten(0, 1):
        every.append(logits_of(p, token))
        y = weight @ token + bias
        for e, g in softmax(every[-1], best(every[-1], method.k)).items():
            y = y + method.alpha / r * g * through_lora(p, e, r, token)
        out.append(y)
    assert len(every[0]) == method.num_experts[0], "one layer: the first group's number"
    return like(x, out), method.balance * switch(every, method.k)


def naive_malora(method, p, weight, bias, x, ids):
    r, out, every = method.rank, [], []
    for token in x.flatten(0, 1):
        every.append(logits_of(p, token))
        shared = [torch.dot(row, token) for row in p["experts.lora_S"]]  # S x
        y = weight @ token + bias
        for e, g in softmax(every[-1], best(every[-1], method.k)).items():
            for i in range(r):
                coordinate = sum(p["experts.lora_P"][e][i][d] * shared[d] for d in range(method.subspace))
                y = y + method.alpha / r * g * p["experts.lora_B"][e * r + i] * coordinate
        out.append(y)
    return like(x, out), method.balance * switch(every, method.k)


def naive_mode(method, p, weight, bias, x, ids):
    m, r, out = method.num_experts, method.rank, []
    for token in x.flatten(0, 1):
        z = logits_of(p, token)
        y = weight @ token + bias
        for j in range(r):
            router = j // method.block  # of p neighbouring ranks, over the m alternatives
            gate = softmax(z[router * m : (router + 1) * m])
            along = torch.dot(p["experts.lora_A"][j], token)
            for i in range(m):
                y = y + gate[i] * p["experts.lora_B"][i * r + j] * along
        out.append(y)
    return like(x, out), 0.0


def naive_smora(method, p, weight, bias, x, ids):
    """Rank by rank: those of a block have its logit and its beta in common."""
    out = []
    for token in x.flatten(0, 1):
        block = [j // method.block for j in range(method.rank)]
        z, beta = logits_of(p, token), p["gate.beta"]
        score = [1 / (1 + torch.exp(-v)) for v in z] if method.activation == "sigmoid" else z
        chosen = best([score[e] + beta[e] for e in block], method.k)
        value = {j: score[block[j]] + (beta[block[j]] if method.value == "biased" else 0) for j in chosen}
        if method.activation == "softmax":
            value = {j: torch.exp(v) for j, v in value.items()}
        total = sum(value.values())
        y = weight @ token + bias
        for j in chosen:
            gate = method.k * value[j] / total
            along = torch.dot(p["experts.lora_A"][j], token)
            y = y + method.alpha / method.k * gate * p["experts.lora_B"][j] * along
        out.append(y)
    return like(x, out), 0.0


def naive_teamlora(method, p, weight, bias, x, ids):
    n, r, out = method.num_experts, method.rank, []
    for token in x.flatten(0, 1):
        hidden = [silu(torch.dot(row, token)) for row in p["router.down"]]
        phi = softmax([sum(u * h for u, h in zip(row, hidden, strict=True)) for row in p["router.up"]])
        wide = p["experts.lora_A"] @ token
        y = weight @ token + bias
        for i in range(n):
            w = sum(p["gate.interaction"][i][j] * phi[j] for j in range(n))
            mine = wide[i * r : (i + 1) * r]
            for j in range(r):
                y = y + method.alpha / r * w * p["experts.lora_B"][i * r + j] * mine[j]
        out.append(y)
    return like(x, out), 0.0


def naive_omoe(method, p, weight, bias, x, ids):
    """Gram-Schmidt on the experts' outputs themselves, vectors of R^O."""
    out = []
    for token in x.flatten(0, 1):
        z = logits_of(p, token)
        gate = softmax(z, best(z, method.k))
        orthogonal = []
        for i in range(method.num_experts):
            h = through_lora(p, i, method.rank, token)
            o = h
            for earlier in orthogonal:
                squared = torch.dot(earlier, earlier)
                if squared > 1e-30:
                    o = o - torch.dot(h, earlier) / squared * earlier
            orthogonal.append(o)
        y = weight @ token + bias
        for i, g in gate.items():
            o = orthogonal[i]
            y = y + method.alpha / method.rank * g * (o if method.length == "kept" else o / torch.sqrt(torch.dot(o, o)))
        out.append(y)
    return like(x, out), 0.0


def naive_conditional_mixlora(method, p, weight, bias, x, ids):
    n, r, out = method.num_experts, method.rank, []
    pool_a, pool_b = p["experts.lora_A"], p["experts.lora_B"]
    for sample in x:
        h = sum(sample) / len(sample)
        z = logits_of(p, h)
        first, second = z[:n], z[n:]
        alpha = best(first, r)
        follows = [0.0] * n
        for i in range(r):
            own = softmax([torch.dot(g, pool_a[alpha[i]]) for g in p["experts.follow"][i]])
            follows = [follows[e] + own[e] for e in range(n)]
        follows, by_input, by_input_a = softmax(follows), softmax(second), softmax(first)
        p_b = [by_input[e] + method.weight * follows[e] for e in range(n)]
        beta = best(p_b, r)
        for token in sample:
            y = weight @ token + bias
            for i in range(r):
                factor = 1.0  # of value 1: a choice by index alone, and nothing but the pair learns
                if method.selection == "straight_through":
                    chance = by_input_a[alpha[i]] * p_b[beta[i]]
                    factor = chance - chance.detach() + 1
                y = y + method.alpha / r * factor * pool_b[beta[i]] * torch.dot(pool_a[alpha[i]], token)
            out.append(y)
    return like(x, out), 0.0


def naive_moa(method, p, weight, bias, x, ids):
    """As in training: the task's own LoRA answers, and the router learns to name it from the mean of the sample."""
    out, cross_entropy = [], []
    for sample, t in zip(x, ids, strict=True):
        a, b = p["experts.lora_A"][t], p["experts.lora_B"][t]
        for token in sample:
            y = weight @ token + bias
            for j in range(method.rank):
                y = y + method.alpha / method.rank * b[j] * torch.dot(a[j], token)
            out.append(y)
        pooled = sum(sample) / len(sample)
        guess = softmax([torch.dot(row, pooled) for row in p["router.weight"]])
        cross_entropy.append(-torch.log(guess[int(t)]))
    return like(x, out), method.router_loss * sum(cross_entropy) / len(cross_entropy)


BY_TOKEN = {
    HydraLoRA: naive_hydralora,
    Faded: naive_faded,
    LoRAMoE: naive_loramoe,
    MoLA: naive_mola,
    MALoRA: naive_malora,
    MoDE: naive_mode,
    SMoRA: naive_smora,
    TeamLoRA: naive_teamlora,
    OMoE: naive_omoe,
    ConditionalMixLoRA: naive_conditional_mixlora,
    MoA: naive_moa,
}
