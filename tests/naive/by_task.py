"""Methods whose gate is a constant or the task's, as loops over tokens and experts."""

import math

import torch

from polyrank.methods import (
    CLoRAE,
    DoRA,
    MELoRA,
    MiLoRA,
    MOELoRA,
    MoSLoRA,
    MTLLoRA,
    MultiLoRA,
    PiSSA,
    Poly,
    RsLoRA,
    TaskLoRA,
)

from .seeds import svd


def each_token(f, x, ids):
    """f(token, task) of every token, (B, L, O)."""
    return torch.stack([torch.stack([f(token, int(t)) for token in sample]) for sample, t in zip(x, ids, strict=True)])


def pair(a, b, x):
    """B A x, one rank after the other: row j of ``a`` is a_j, row j of ``b`` the column b_j."""
    return sum(b[j] * sum(a[j] * x) for j in range(len(a)))


def shares(logits):
    """exp(l_i) / sum exp(l_j) of a list of numbers."""
    total = sum(math.e**l for l in logits)
    return [math.e**l / total for l in logits]


def naive_rslora(method, p, weight, bias, x, ids):
    def y(token, t):
        update = pair(p["experts.lora_A"], p["experts.lora_B"], token)
        return weight @ token + bias + method.alpha / math.sqrt(method.rank) * update

    return each_token(y, x, ids), 0.0


def naive_dora(method, p, weight, bias, x, ids):
    a, b, m = p["experts.lora_A"], p["experts.lora_B"], p["magnitude"]

    def y(token, t):
        out = []
        for o in range(len(weight)):
            v = weight[o] + method.alpha / method.rank * sum(b[j, o] * a[j] for j in range(method.rank))
            length = math.sqrt(sum(float(entry) ** 2 for entry in v.detach()))  # a number: no gradient
            out.append(m[o] / length * torch.dot(v, token) + bias[o])
        return torch.stack(out)

    return each_token(y, x, ids), 0.0


def singular(method, p, weight, bias, x, ids, which):
    """(W - s B_0 A_0) x + b + s B A x, the start being the singular directions ``which``."""
    u, sigma, vt = svd(weight)
    s = method.alpha / method.rank
    rest = weight.clone()
    for d in which(len(sigma)):
        b_0, a_0 = u[:, d] * torch.sqrt(sigma[d] / s), torch.sqrt(sigma[d] / s) * vt[d]
        rest = rest - s * torch.outer(b_0, a_0)

    def y(token, t):
        return rest @ token + bias + s * pair(p["experts.lora_A"], p["experts.lora_B"], token)

    return each_token(y, x, ids), 0.0


def naive_pissa(method, p, weight, bias, x, ids):
    return singular(method, p, weight, bias, x, ids, lambda k: range(method.rank))


def naive_milora(method, p, weight, bias, x, ids):
    return singular(method, p, weight, bias, x, ids, lambda k: range(k - method.rank, k))


def naive_moslora(method, p, weight, bias, x, ids):
    a, b, m = p["experts.lora_A"], p["experts.lora_B"], p["experts.mixer"]

    def y(token, t):
        out = weight @ token + bias
        for i in range(method.rank):
            for j in range(method.rank):
                out = out + method.alpha / method.rank * b[i] * m[i, j] * torch.dot(a[j], token)
        return out

    return each_token(y, x, ids), 0.0


def naive_melora(method, p, weight, bias, x, ids):
    n = method.num_experts
    width = len(weight[0]) // n

    def y(token, t):
        slices = []
        for i in range(n):
            mine = token[i * width : (i + 1) * width]
            slices.append(pair(p["experts.lora_A"][i], p["experts.lora_B"][i], mine))
        return weight @ token + bias + method.alpha / method.rank * torch.cat(slices)

    return each_token(y, x, ids), 0.0


def naive_multilora(method, p, weight, bias, x, ids):
    def y(token, t):
        out = weight @ token + bias
        for i in range(method.num_experts):
            rows = slice(i * method.rank, (i + 1) * method.rank)
            update = pair(p["experts.lora_A"][rows], p["experts.lora_B"][rows], token)
            out = out + method.alpha / method.rank * p["experts.scales"][i] * update
        return out

    return each_token(y, x, ids), 0.0


def naive_mtl_lora(method, p, weight, bias, x, ids):
    r = method.rank

    def y(token, t):
        own = p["experts.transform"][t]
        z = [torch.dot(p["experts.shared.lora_A"][j], token) for j in range(r)]
        if method.transform == "diagonal":
            turned = [own[i] * z[i] for i in range(r)]
        else:
            turned = [sum(own[i, j] * z[j] for j in range(r)) for i in range(r)]
        gate = shares([w / method.temperature for w in p["router.logits"][t]])
        out = weight @ token + bias
        for e in range(method.num_experts):
            for i in range(r):
                out = out + method.alpha / r * gate[e] * p["experts.shared.lora_B"][e * r + i] * turned[i]
        return out

    return each_token(y, x, ids), 0.0


def naive_moelora(method, p, weight, bias, x, ids):
    router = "router.router." if method.gate == "global" else "router."
    own = method.rank // method.num_experts

    def y(token, t):
        embedding = p[f"{router}embedding"][t]
        gate = shares([torch.dot(row, embedding) for row in p[f"{router}proj"]])
        out = weight @ token + bias
        for e in range(method.num_experts):
            rows = slice(e * own, (e + 1) * own)
            update = pair(p["experts.lora_A"][rows], p["experts.lora_B"][rows], token)
            out = out + method.alpha / method.rank * gate[e] * update
        return out

    return each_token(y, x, ids), 0.0


def naive_poly(method, p, weight, bias, x, ids):
    """After training, when the choice is sigmoid(w_t). The mixed matrices are formed, slice by slice, as in the papers:
    A = [A^1 .. A^S] beside each other, so that every slice of the output reads the whole input."""
    n, r, s = method.num_experts, method.rank, method.splits

    def mixed(table, t):
        slices = []
        for k in range(s):
            on = [1 / (1 + math.e ** -p["router.logits"][t][k * n + e]) for e in range(n)]
            slices.append(sum(on[e] / sum(on) * table[k, e * r : (e + 1) * r] for e in range(n)))
        return torch.cat(slices, 1)  # (r, I) or (r, O)

    def y(token, t):
        a, b = mixed(p["experts.lora_A"], t), mixed(p["experts.lora_B"], t)
        return weight @ token + bias + pair(a, b, token) / r

    return each_token(y, x, ids), 0.0


def naive_c_lorae(method, p, weight, bias, x, ids):
    def universal(token):
        return pair(p["experts.universal.lora_A"], p["experts.universal.lora_B"], token)

    def own(token, t):
        return pair(p["experts.task.lora_A"][t], p["experts.task.lora_B"][t], token)

    def y(token, t):
        first, second = shares([torch.dot(row, token) for row in p["router.weight"]])
        update = first * universal(token) + second * own(token, t)
        return weight @ token + bias + method.alpha / method.rank * update

    # which D belongs to which U, among the samples of the batch?
    us = [sum(universal(token) for token in sample) / len(sample) for sample in x]
    ds = [sum(own(token, int(t)) for token in sample) / len(sample) for sample, t in zip(x, ids, strict=True)]
    wrong = 0.0
    for i in range(len(x)):
        likely = shares([torch.dot(us[i], d) / math.sqrt(len(weight)) for d in ds])
        wrong = wrong - torch.log(likely[i]) / len(x)
    return each_token(y, x, ids), method.mutual_information * wrong


def naive_task_lora(method, p, weight, bias, x, ids):
    def y(token, t):
        update = pair(p["experts.lora_A"][t], p["experts.lora_B"][t], token)
        return weight @ token + bias + method.alpha / method.rank * update

    return each_token(y, x, ids), 0.0


BY_TASK = {
    RsLoRA: naive_rslora,
    DoRA: naive_dora,
    PiSSA: naive_pissa,
    MiLoRA: naive_milora,
    MoSLoRA: naive_moslora,
    MELoRA: naive_melora,
    MultiLoRA: naive_multilora,
    MTLLoRA: naive_mtl_lora,
    MOELoRA: naive_moelora,
    Poly: naive_poly,
    TaskLoRA: naive_task_lora,
    CLoRAE: naive_c_lorae,
}
