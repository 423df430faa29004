"""The three founding papers and LoRA, as loops over tokens and experts."""

import torch


def svd(weight):
    """LAPACK's own, with the sign convention of the factors: the largest entry of each right vector is positive."""
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    for i in range(len(vt)):
        if vt[i][vt[i].abs().argmax()] < 0:
            u[:, i], vt[i] = -u[:, i], -vt[i]
    return u, sigma, vt


def reflected(vectors, x):
    """x H_1 ... H_L, one reflection after the other."""
    for v in vectors:
        v = v / v.norm()
        x = x - 2 * (x @ v) * v
    return x


def moore_logits(method, p, prefix, x, sample, t):
    task = f"{prefix}router." if method.router == "task" else f"{prefix}router.routers.0."
    logits = p[f"{task}proj"] @ p[f"{task}embedding"][t]
    if method.router != "task":
        seen = x if method.router == "token" else sample.mean(0)
        logits = logits + p[f"{prefix}router.routers.1.up"] @ (p[f"{prefix}router.routers.1.down"] @ seen)
    return logits


def naive_lora(method, p, weight, bias, x, ids):
    y = torch.stack(
        [
            weight @ t + bias + method.alpha / method.rank * (p["experts.lora_B"].t() @ (p["experts.lora_A"] @ t))
            for t in x.flatten(0, 1)
        ]
    )
    return y.view(*x.shape[:2], -1), 0.0


def naive_moore(method, p, weight, bias, x, ids):
    u, sigma, vt = svd(weight)
    out = []
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            g = (sigma + moore_logits(method, p, "", token, sample, t)).clamp_min(0)
            turned = reflected(p["reflections.vectors"], token)
            out.append(sum(g[d] * u[:, d] * (vt[d] @ turned) for d in range(len(sigma))) + bias)
    return torch.stack(out).view(*x.shape[:2], -1), 0.0


def naive_moore_topk(method, p, weight, bias, x, ids):
    u, sigma, vt = svd(weight)
    out = []
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            s = sigma[: method.k]
            delta = (s + moore_logits(method, p, "", token, sample, t)).clamp_min(0) - s
            turned = reflected(p["experts.reflections.vectors"], token)
            y = weight @ turned + bias
            out.append(y + sum(delta[d] * u[:, d] * (vt[d] @ turned) for d in range(method.k)))
    return torch.stack(out).view(*x.shape[:2], -1), 0.0


def naive_more(method, p, weight, bias, x, ids):
    out, contrast = [], []
    for sample, t in zip(x, ids, strict=True):
        prob = torch.softmax(p["router.proj"] @ p["router.embedding"][t] + p["router.bias"], 0)
        r = int(prob.argmax())
        pi = prob[r] - prob[r].detach() + 1
        power = {"none": 0, "row": 1, "released": 2}[method.scaling]
        for token in sample:
            y = weight @ token + bias
            for i in range(r + 1):
                s = ((i + 1) / method.rank) ** power
                y = y + method.alpha / method.rank * pi * s * p["experts.lora_B"][i] * (p["experts.lora_A"][i] @ token)
            out.append(y)
        h = sample.mean(0) if method.pooling == "mean" else sample[0]
        near = torch.stack([torch.dot(h, e) / h.norm() / e.norm() for e in p["router.embedding"]])
        contrast.append(-torch.log_softmax(near / method.temperature, 0)[t])
    return torch.stack(out).view(*x.shape[:2], -1), method.contrastive * torch.stack(contrast).mean()


def naive_ase(method, p, weight, bias, x, ids):
    n, s, r = method.num_experts, method.num_shared, method.rank
    out, joint = [], [[0.0] * (n - s) for _ in range(len(p["router.weights"]))]
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            z = p["router.weights"][t] @ token
            routed = sorted(range(s, n), key=lambda e: -z[e].item())[: method.k]
            if method.gate in ("joint", "renormalised"):
                active = [*range(s), *routed]
                total = sum(z[e].exp() for e in active)
                gate = {e: z[e].exp() / total for e in active}
            else:
                total = sum(z[e].exp() for e in range(s, n))
                gate = {e: z[e].exp() / total for e in routed} | dict.fromkeys(range(s), 1.0)
            y = weight @ token + bias
            for e, g in gate.items():
                rows = slice(e * r, (e + 1) * r)
                y = y + method.alpha / r * g * (p["experts.lora_B"][rows].t() @ (p["experts.lora_A"][rows] @ token))
            out.append(y)
            prob = torch.softmax(z[s:], 0)
            joint[int(t)] = [a + b for a, b in zip(joint[int(t)], prob, strict=True)]
    tokens = x.shape[0] * x.shape[1]
    aux = torch.zeros((), dtype=x.dtype)
    for i in range(len(joint)):
        for j in range(n - s):
            here = joint[i][j] / tokens
            if isinstance(here, torch.Tensor):
                pi = sum(joint[i]) / tokens
                pj = sum(row[j] for row in joint) / tokens
                aux = aux - here * torch.log(here / (pi * pj) + 1e-4)
    return torch.stack(out).view(*x.shape[:2], -1), method.mutual_information * aux
