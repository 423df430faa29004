"""Methods whose layers need more than their own token: soft slots over a sample, scalings of another forward."""

import torch

from polyrank.methods import SMoLA, XLoRA

from .by_token import best, like, softmax, through_lora


def naive_smola(method, p, weight, bias, x, ids, mask=None, modality_ids=None):
    """Slots hold means of the tokens themselves (I long), sample by sample and group by group."""
    n, slots, out = method.num_experts, method.slots, []
    for b, sample in enumerate(x):
        ys = [weight @ token + bias for token in sample]
        for g in range(1 + method.modalities):
            among = [s for s in range(len(sample)) if mask is None or mask[b][s]]
            if g > 0:
                among = [s for s in among if int(modality_ids[b][s]) == g - 1]
            if not among:
                continue
            first = g * n * slots
            logits = {
                s: [torch.dot(row, sample[s]) for row in p["router.weight"][first : first + n * slots]] for s in among
            }
            combine = {s: softmax(logits[s]) for s in among}
            for slot in range(n * slots):
                dispatch = softmax([logits[s][slot] for s in among])
                u = sum(dispatch[i] * sample[s] for i, s in enumerate(among))
                made = through_lora(p, g * n + slot // slots, method.rank, u)
                for s in among:
                    ys[s] = ys[s] + method.alpha / method.rank * combine[s][slot] * made
        out.extend(ys)
    return like(x, out), 0.0


def naive_xlora(method, p, weight, bias, x, ids):
    """One layer: in the extra forward it is the first, so the classifier reads its input."""
    out, loras = [], p["experts.lora_A"]
    for token in x.flatten(0, 1):
        h = token
        if method.hidden:
            h = torch.stack([torch.dot(row, token).clamp(min=0) for row in p["router.classifier.down"]])
        q, c = p["router.classifier.weight"], p["router.classifier.bias"]
        scalings = softmax([(torch.dot(q[e], h) + c[e]) / method.temperature for e in range(len(loras))])
        kept = best([scalings[e] for e in range(len(loras))], method.k or len(loras))
        y = weight @ token + bias
        for e in kept:
            scaled = scalings[e] * token
            for a, b in zip(loras[e], p["experts.lora_B"][e], strict=True):
                y = y + method.alpha / method.rank * b * torch.dot(a, scaled)
        out.append(y)
    return like(x, out), 0.0


MIXED = {SMoLA: naive_smola, XLoRA: naive_xlora}
