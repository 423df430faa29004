"""MMoLRE: streams of features, each task's mixture of shared and own experts, and each task's fusion of the streams."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank.methods import MMoLRE

WIDTHS = {"text": 5, "image": 4}
TASKS = ["mood", "topic", "place"]
IDS = torch.tensor([1, 0, 2, 1])
LENGTHS = {"text": (4, 2, 3, 1), "image": (3, 3, 1, 2)}


def build(**sizes):
    torch.manual_seed(0)
    model = MMoLRE(WIDTHS, TASKS, **{"out_features": 6, "ranks": (2, 3), "task_rank": 2, **sizes}).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def batch(requires_grad=False):
    torch.manual_seed(1)
    streams = {name: torch.randn(4, max(LENGTHS[name]), d, dtype=torch.float64) for name, d in WIDTHS.items()}
    masks = {
        name: (torch.arange(x.shape[1]) < torch.tensor(LENGTHS[name])[:, None]).long() for name, x in streams.items()
    }
    return {name: x.requires_grad_(requires_grad) for name, x in streams.items()}, masks


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def softmax(x):
    return x.exp() / x.exp().sum()


def expert(p, name, tokens):
    """conv_1(gelu(conv_3)): token i sees i - 1, i and i + 1, and nothing beyond the ends."""
    out = []
    for i in range(len(tokens)):
        hidden = p[f"{name}.down.bias"]
        for tap, j in enumerate((i - 1, i, i + 1)):
            if 0 <= j < len(tokens):
                hidden = hidden + p[f"{name}.down.weight"][:, :, tap] @ tokens[j]
        out.append(p[f"{name}.up.weight"][:, :, 0] @ gelu(hidden) + p[f"{name}.up.bias"])
    return out


def naive(model, streams, ids):
    """The header's equations, sample by sample and token by token, on streams without padding."""
    p, answers = dict(model.named_parameters()), []
    for sample, task in enumerate(ids.tolist()):
        means = []
        for s, name in enumerate(WIDTHS):
            tokens = list(streams[name][sample][: LENGTHS[name][sample]])
            for block in range(2):
                at = f"streams.{s}.blocks.{block}"
                outputs = [expert(p, f"{at}.shared.{n}", tokens) for n in range(2)]
                outputs.append(expert(p, f"{at}.own.{task}", tokens))
                after = []
                for i, x in enumerate(tokens):
                    gate = softmax(p[f"{at}.routers.{task}.weight"] @ x + p[f"{at}.routers.{task}.bias"])
                    after.append(x + sum(g * output[i] for g, output in zip(gate, outputs, strict=True)))
                tokens = after
            means.append(sum(tokens) / len(tokens))
        at = f"fusion.{task}.weights"
        weights = softmax(p[f"{at}.weight"] @ torch.cat(means) + p[f"{at}.bias"])
        maps = [(p[f"fusion.{task}.maps.{s}.weight"], p[f"fusion.{task}.maps.{s}.bias"]) for s in range(2)]
        answers.append(gelu(sum(w * (m @ mean + b) for w, (m, b), mean in zip(weights, maps, means, strict=True))))
    return torch.stack(answers)


def test_equals_the_equation():
    model, (streams, masks) = build(), batch(requires_grad=True)
    wanted = [*model.parameters(), *streams.values()]
    got, want = model(streams, masks, IDS), naive(model, streams, IDS)
    assert_close(got, want, atol=1e-10, rtol=1e-10)
    torch.manual_seed(2)
    weights = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), wanted) for y in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("filler", [1e6, math.inf, math.nan])
def test_padding_changes_nothing(filler):
    model, (streams, masks) = build(), batch()
    want = model(streams, masks, IDS)
    for name, x in streams.items():
        more = torch.full((4, 3, WIDTHS[name]), filler, dtype=torch.float64)
        streams[name] = torch.cat([x.masked_fill(masks[name][..., None] == 0, filler), more], 1)
        masks[name] = torch.cat([masks[name], torch.zeros(4, 3, dtype=torch.long)], 1)
    assert_close(model(streams, masks, IDS), want, atol=1e-12, rtol=0)


def test_a_token_counts():
    """The test above would also pass if nothing counted."""
    model, (streams, masks) = build(), batch()
    want = model(streams, masks, IDS)
    streams["image"][0, 2] += 1
    got = model(streams, masks, IDS)
    assert (got[0] - want[0]).abs().max() > 1e-3
    assert_close(got[1:], want[1:], atol=1e-12, rtol=0)


def test_a_stream_that_a_sample_lacks():
    model, (streams, masks) = build(), batch()
    masks["image"][1] = 0
    want = model(streams, masks, IDS)
    streams["image"][1] = math.nan
    assert_close(model(streams, masks, IDS), want, atol=0, rtol=0)
    assert want.isfinite().all()


def test_a_sample_depends_on_its_own_task_only():
    model, (streams, masks) = build(), batch()
    want = model(streams, masks, IDS)
    for task in range(3):
        alone = model(streams, masks, torch.full((4,), task))
        for sample in range(4):
            same = torch.allclose(alone[sample], want[sample], atol=1e-12, rtol=0)
            assert same == (IDS[sample] == task)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(f"{part}.2." in name for part in ("own", "routers", "fusion")):
                p.add_(1)
    got = model(streams, masks, IDS)
    assert_close(got[IDS != 2], want[IDS != 2], atol=0, rtol=0)
    assert (got[IDS == 2] - want[IDS == 2]).abs().max() > 1e-3


def test_gradient_reaches_every_weight():
    model, (streams, masks) = build(), batch()
    model(streams, masks, IDS).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_ranks_and_weights():
    """Each shared expert has a rank of its own: 3 d r + r down, r d + d up."""
    model = build(ranks=(2, 3), task_rank=4)
    block = model.streams[0].blocks[0]
    sizes = [sum(p.numel() for p in one.parameters()) for one in (*block.shared, block.own[0])]
    assert sizes == [4 * 5 * r + r + 5 for r in (2, 3, 4)]


def test_state_dict_round_trip():
    model, (streams, masks) = build(), batch()
    other = MMoLRE(WIDTHS, TASKS, out_features=6, ranks=(2, 3), task_rank=2).double()
    assert not torch.allclose(other(streams, masks, IDS), model(streams, masks, IDS))
    other.load_state_dict(model.state_dict())
    assert_close(other(streams, masks, IDS), model(streams, masks, IDS), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: s.update(audio=s["text"]), "stream 'audio' is unknown: .* the streams text, image"),
        (lambda s, m: m.update(audio=m["text"]), "mask 'audio' is unknown"),
        (lambda s, m: s.pop("image"), "stream 'image' is missing: .* the streams text, image"),
        (lambda s, m: m.pop("image"), "mask 'image' is missing"),
        (lambda s, m: s.update(image=s["text"]), r"'image' has shape \(4, 4, 5\), and must have \(4, L, 4\)"),
        (lambda s, m: s.update(image=s["image"][:3]), r"'image' has shape \(3, 3, 4\).* one row for each"),
        (lambda s, m: m.update(image=m["text"]), r"mask 'image' has shape \(4, 4\), and must have \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    streams, masks = batch()
    change(streams, masks)
    with pytest.raises(ValueError, match=message):
        build()(streams, masks, IDS)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"0\.\.2 \(mood, topic, place\)"):
        build()(*batch(), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("nothing", [dict(streams={}), dict(tasks=[]), dict(ranks=())])
def test_nothing_to_work_with_is_refused(nothing):
    with pytest.raises(ValueError, match="needs streams, tasks and ranks"):
        MMoLRE(**{"streams": WIDTHS, "tasks": TASKS, "out_features": 6, **nothing})


def signals(count, seed):
    """Sound and sight carry a sign each. The task "heard" asks the sound's, "agree" whether both are the same."""
    torch.manual_seed(seed)
    signs, ids = torch.randint(0, 2, (2, count)) * 2.0 - 1, torch.arange(count) % 2
    sound, sight = (0.5 * torch.randn(count, 4, 3) for _ in range(2))
    sound[..., 0] += signs[0, :, None]
    sight[..., 1] += signs[1, :, None]
    labels = torch.where(ids == 0, signs[0] > 0, signs[0] == signs[1]).long()
    return {"sound": sound, "sight": sight}, ids, labels


def learnt(hears, sees):
    """Accuracy on new samples of both tasks, from these streams."""
    torch.manual_seed(0)
    model = MMoLRE({"sound": 3, "sight": 3}, ["heard", "agree"], out_features=64, ranks=(2, 4), task_rank=2)
    heads = nn.ModuleList(nn.Linear(64, 2) for _ in range(2))
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-2)

    def logits(streams, ids):
        masks = {name: torch.full((len(ids), 4), int(on)) for name, on in (("sound", hears), ("sight", sees))}
        fused = model(streams, masks, ids)
        return torch.where(ids[:, None] == 0, heads[0](fused), heads[1](fused))

    for step in range(40):
        streams, ids, labels = signals(64, 100 + step)
        nn.functional.cross_entropy(logits(streams, ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    streams, ids, labels = signals(400, 1)
    right = logits(streams, ids).argmax(-1) == labels
    return [right[ids == task].float().mean().item() for task in range(2)]


def test_two_streams_teach_what_one_cannot():
    """The task "heard" is in the sound alone; whether both agree is in neither alone."""
    both, sound, sight = learnt(True, True), learnt(True, False), learnt(False, True)
    assert both[0] > 0.9
    assert both[1] > 0.9
    assert sound[0] > 0.9
    assert sound[1] < 0.6
    assert sight[0] < 0.6
    assert sight[1] < 0.6
