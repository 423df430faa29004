"""Methods for feed-forward blocks, as loops over tokens and experts that each run the whole block.

A twin is ``twin(method, p, block, x, ids) -> (y, auxiliary loss)``: ``block`` has weight and bias of "up", "down" and,
where it is gated, "gate".
"""

import math

import torch
from torch.nn.functional import gelu

from polyrank.methods import EMTAL, FGMoE, MixLoRA

from .by_token import best, like, softmax, switch


def linear(part, token, update=None):
    """W x + b, or (W + update) x + b."""
    weight, bias = part
    weight = weight if update is None else weight + update
    return weight @ token + (0 if bias is None else bias)


def product(a, b):
    """B A as a matrix (O, I); row j of ``a`` is a_j, row j of ``b`` the column b_j."""
    return sum(torch.outer(b[j], a[j]) for j in range(len(a)))


def naive_mixlora(method, p, block, x, ids):
    r, n, s = method.rank, method.num_experts, method.alpha / method.rank

    def update(name, e):
        rows = slice(e * r, (e + 1) * r)
        return s * product(p[f"{name}.lora_A"][rows], p[f"{name}.lora_B"][rows])

    def expert(e, token):
        """The whole block, every product of its own."""
        hidden = linear(block["up"], token, update("up", e))
        if "gate" in block:
            hidden = gelu(linear(block["gate"], token, update("side", e))) * hidden
        else:
            hidden = gelu(hidden)
        return linear(block["down"], hidden, update("down", e))

    out, every, chosen, size = [], [], [], 0.0
    for token in x.flatten(0, 1):
        z = [torch.dot(row, token) for row in p["router.weight"]]
        every.append(z)
        p_all = softmax(z)
        if method.routing == "top_k":
            gate = softmax(z, best(z, method.k))
        elif method.routing == "switch":
            gate = {best(z, 1)[0]: p_all[best(z, 1)[0]]}
        else:
            gate, reached = {}, 0.0
            for e in best(z, n):
                if reached < method.p:
                    gate[e] = p_all[e]
                reached += p_all[e].item()
        chosen.append(set(gate))
        out.append(sum(g * expert(e, token) for e, g in gate.items()))
        size = size + torch.log(sum(torch.exp(v) for v in z)) ** 2 / x.shape[0] / x.shape[1]
    choices = sum(len(one) for one in chosen)
    balance = n * sum(
        sum(e in one for one in chosen) / choices * sum(softmax(z)[e] for z in every) / len(every) for e in range(n)
    )
    if method.routing == "top_k":
        assert abs(balance - switch(every, method.k)) < 1e-12
    return like(x, out), method.balance * balance + method.z_loss * size


def naive_emtal(method, p, block, x, ids):
    """Expert by expert: slices of the block's matrices, each with its own units."""
    s, n = method.alpha / method.rank, method.num_experts
    weights = {
        name: (block[part][0] + s * product(p[f"{name}.lora_A"], p[f"{name}.lora_B"]), block[part][1])
        for name, part in (("up", "up"), ("side", "gate"), ("down", "down"))
        if part in block
    }
    out = []
    for token in x.flatten(0, 1):
        share = softmax([torch.dot(row, token) / method.temperature for row in p["router"]])
        y = weights["down"][1].clone()
        for e in range(n):
            w = p["kept"] * n * share[e] + 1 - p["kept"]
            for unit in (p["groups"] == e).nonzero().flatten().tolist():

                def of(name, unit=unit, token=token):
                    weight, bias = weights[name]
                    return torch.dot(weight[unit], token) + (0 if bias is None else bias[unit])

                hidden = gelu(w * of("side")) * of("up") if "side" in weights else gelu(w * of("up"))
                y = y + weights["down"][0][:, unit] * hidden
        out.append(y)
    assert [int((p["groups"] == e).sum()) for e in range(n)] == [len(p["groups"]) // n] * n
    return like(x, out), 0.0


def naive_fgmoe(method, p, block, x, ids):
    s, n, shared = method.alpha / method.rank, method.num_experts, method.num_shared
    out = []
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            z = [torch.dot(row, token) for row in p["router.weights"][t]]
            gate = softmax(z, best(z, method.k))
            f = 1 / (1 + math.e ** -torch.dot(p["transfer.weights"][t][0], token))

            def of_unit(unit, width, gate=gate):
                e = unit * n // width
                return 1.0 if e < shared else gate.get(e - shared, 0.0)

            def updated(name, part, token=token, t=t, f=f, of_unit=of_unit):
                h = linear(block[part], token)
                own = product(p[f"{name}.task.lora_A"][t], p[f"{name}.task.lora_B"][t]) @ token
                common = product(p[f"{name}.all.lora_A"], p[f"{name}.all.lora_B"]) @ token
                m = torch.stack([torch.as_tensor(of_unit(u, len(h)), dtype=h.dtype) for u in range(len(h))])
                return h + s * (m * own + f * common), m

            up, m = updated("up", "up")
            a = gelu(updated("side", "gate")[0]) * up if "gate" in block else gelu(up)
            y = linear(block["down"], a)
            y = y + s * product(p["down.task.lora_A"][t], p["down.task.lora_B"][t]) @ (m * a)
            y = y + s * f * product(p["down.all.lora_A"], p["down.all.lora_B"]) @ a
            out.append(y)
    return like(x, out), 0.0


BLOCKS = {MixLoRA: naive_mixlora, EMTAL: naive_emtal, FGMoE: naive_fgmoe}
