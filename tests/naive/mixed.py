"""Methods whose layers need more than their own token: soft slots over a sample, as loops."""

import torch

from polyrank.methods import SMoLA

from .by_token import like, softmax, through_lora


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


MIXED = {SMoLA: naive_smola}
