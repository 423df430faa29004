"""What a method's weights buy: their number in closed form, and the rank of the change that they can make."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn

from polyrank import LoRA, adapt
from polyrank.methods import METHODS as CLASSES, Dropout, Faded, MALoRA, MELoRA, MoLA
from small import GLU, METHODS, TASKS, Net, adapted, disturb


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))


def trained(adapter):
    return sum(p.numel() for p in adapter.parameters())


def change(method, in_features, out_features):
    """(what a layer with random adapter weights adds to W, from its outputs alone; its trained weights)."""
    torch.manual_seed(6)
    base = nn.Linear(in_features, out_features, dtype=torch.float64)
    net = nn.Sequential(copy.deepcopy(base))
    adapter = adapt(net, method, tasks=["a"], targets="0")
    disturb(adapter, by=1.0)
    eye = torch.eye(in_features, dtype=torch.float64)
    with torch.no_grad():
        return (net(eye) - base(eye)).t(), trained(adapter)


@pytest.mark.parametrize(("in_features", "out_features"), [(24, 36), (36, 24), (24, 24)])
@pytest.mark.parametrize(("n", "r"), [(1, 3), (2, 1), (2, 4), (3, 2), (4, 3), (6, 4), (12, 2)])
def test_melora_has_n_times_loras_rank_at_its_size(n, r, in_features, out_features):
    mini, size = change(MELoRA(num_experts=n, rank=r), in_features, out_features)
    plain, plain_size = change(LoRA(rank=r), in_features, out_features)
    assert size == plain_size == r * (in_features + out_features)
    assert int(torch.linalg.matrix_rank(plain)) == r
    assert int(torch.linalg.matrix_rank(mini)) == n * r
    for i in range(n):  # each block is of rank r, and there is nothing beside the blocks
        rows = slice(i * out_features // n, (i + 1) * out_features // n)
        columns = slice(i * in_features // n, (i + 1) * in_features // n)
        assert int(torch.linalg.matrix_rank(mini[rows, columns])) == r
        mini[rows, columns] = 0
    assert mini.abs().max() < 1e-12


def closed_form(method, shapes):
    """SIZE of each layer, by its I, O, K (or H, O, G of a block), and SIZE_ONCE, evaluated."""
    known = asdict(method) | {"T": len(TASKS), "L": len(shapes)}
    if isinstance(method, Faded | Dropout):
        known |= method.of
    each = []
    for l, shape in enumerate(shapes):
        beside = method.ADAPTS == "feed-forward blocks" and "H" not in shape
        each.append(eval(method.SIZE_BESIDE if beside else method.SIZE, {}, known | shape | {"l": l}))
    return sum(each) + eval(method.SIZE_ONCE, {}, known)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_size_is_the_closed_form(name):
    net, adapter = adapted(METHODS[name])
    assert trained(adapter) == closed_form(METHODS[name], net.shapes)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_default_size_is_the_closed_form(name):
    method = CLASSES[name]()
    if method.ADAPTS == "feed-forward blocks":
        net, shapes = nn.Sequential(GLU(384, 768, 384, gated=False)), [dict(I=384, H=768, O=384, G=0)]
    else:
        net = nn.Sequential(nn.Linear(384, 768), nn.Linear(768, 384))
        shapes = [dict(I=384, O=768, K=384), dict(I=768, O=384, K=384)]
    adapter = adapt(net, method, tasks=TASKS)
    assert trained(adapter) == closed_form(method, shapes)


@pytest.mark.parametrize("name", ["moore", "moore_topk", "pissa", "milora"])
def test_size_where_the_weight_has_a_low_rank(name):
    """K is the numerical rank, not the shorter side, where a method leaves the null directions out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(24, 3) @ torch.randn(3, 16))
    adapter = adapt(net, CLASSES[name](), tasks=TASKS, targets="0")
    assert trained(adapter) == closed_form(CLASSES[name](), [dict(I=16, O=24, K=3)])


# The weights of one layer as the papers list them: one product for each matrix, in plain numbers of METHODS' sizes.
WRITTEN = {
    "lora": lambda I, O, T, K: 4 * I + O * 4,
    "rslora": lambda I, O, T, K: 4 * I + O * 4,
    "dora": lambda I, O, T, K: 4 * I + O * 4 + O,
    "pissa": lambda I, O, T, K: 4 * I + O * 4,
    "milora": lambda I, O, T, K: 4 * I + O * 4,
    "moslora": lambda I, O, T, K: 4 * I + O * 4 + 4 * 4,
    "melora": lambda I, O, T, K: 2 * (2 * (I // 2) + (O // 2) * 2),
    "multilora": lambda I, O, T, K: 3 * (2 * I) + 3 * (O * 2) + 3 * O,
    "adalora": lambda I, O, T, K: 4 * I + 4 + O * 4,
    "mtl_lora": lambda I, O, T, K: 2 * I + T * 2 * 2 + 3 * O * 2 + T * 3,
    "mtl_lora-diagonal": lambda I, O, T, K: 2 * I + T * 2 + 3 * O * 2 + T * 3,
    "moelora-layer": lambda I, O, T, K: 2 * (2 * I + O * 2) + T * 5 + 2 * 5,
    "poly": lambda I, O, T, K: 3 * (2 * I + O * 2) + T * 3,
    "poly-splits": lambda I, O, T, K: 2 * 3 * (2 * (I // 2) + (O // 2) * 2) + T * 2 * 3,
    "c_lorae": lambda I, O, T, K: (4 * I + O * 4) + T * (2 * I + O * 2) + 2 * I,
    "hydralora": lambda I, O, T, K: 2 * I + 3 * O * 2 + 3 * I,
    "loramoe": lambda I, O, T, K: 3 * (2 * I + O * 2) + 3 * I,
    "malora": lambda I, O, T, K: 5 * I + 4 * 3 * 5 + 4 * O * 3 + 4 * I,
    "mode": lambda I, O, T, K: 4 * I + 3 * 4 * O + 4 * I * 3,
    "mode-block": lambda I, O, T, K: 4 * I + 3 * 4 * O + 2 * I * 3,
    "smora": lambda I, O, T, K: 8 * I + O * 8 + 8 * I,
    "smora-softmax": lambda I, O, T, K: 8 * I + O * 8 + 4 * I,
    "teamlora": lambda I, O, T, K: 3 * 2 * I + 3 * O * 2 + 5 * I + 3 * 5 + 3 * 3,
    "omoe": lambda I, O, T, K: 3 * (2 * I + O * 2) + 3 * I,
    "conditional_mixlora": lambda I, O, T, K: 5 * I + 5 * O + (5 * I + 5 * I) + 3 * 5 * I,
    "conditional_mixlora-released": lambda I, O, T, K: 5 * I + 5 * O,
    "same": lambda I, O, T, K: 3 * (2 * I + O * 2) + 3 * I,
    "moa": lambda I, O, T, K: T * (2 * I + O * 2) + T * I,
    "faded": lambda I, O, T, K: 2 * I + 3 * O * 2 + 3 * I,
    "dropout": lambda I, O, T, K: 2 * I + 3 * O * 2 + 3 * I,
    "dropout-input": lambda I, O, T, K: 2 * I + T * 2 * 2 + 3 * O * 2 + T * 3,
    "smola": lambda I, O, T, K: 3 * (2 * I + O * 2) + 3 * 2 * I,
    "ase": lambda I, O, T, K: 6 * (2 * I + O * 2) + T * 6 * I,
    "more": lambda I, O, T, K: 6 * I + O * 6 + T * I + 6 * I + 6,
    "moore-token": lambda I, O, T, K: 4 * I + T * 6 + K * 6 + 5 * I + K * 5,
    "moore-task": lambda I, O, T, K: 4 * I + T * 6 + K * 6,
    "moore_topk-token": lambda I, O, T, K: 4 * I + T * 6 + 5 * 6 + 5 * I + 5 * 5,
}


# The same of a gated block of I inputs, H hidden units and O outputs.
WRITTEN_BLOCKS = {
    "mixlora": lambda I, H, O, T: 4 * (2 * (2 * I + H * 2) + 2 * H + O * 2) + 4 * I,
    "mixlora-top_p": lambda I, H, O, T: 3 * (2 * (2 * I + H * 2) + 2 * H + O * 2) + 3 * I,
    "emtal": lambda I, H, O, T: 2 * (2 * I + H * 2) + 2 * H + O * 2 + 4 * I,
    "fgmoe": lambda I, H, O, T: (T + 1) * (2 * (2 * I + H * 2) + 2 * H + O * 2) + T * (7 * I) + T * I,
}


@pytest.mark.parametrize("name", sorted(WRITTEN_BLOCKS))
def test_size_of_a_block_as_the_paper_lists_it(name):
    _, adapter = adapted(METHODS[name])
    own = [sum(p.numel() for k, p in adapter.named_parameters() if k[0] == l and p.requires_grad) for l in "qv"]
    assert own == [2 * (16 + 24), WRITTEN_BLOCKS[name](24, 40, 12, 3)]  # beside the block, a LoRA of rank 2


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_size_as_the_paper_lists_it(name):
    _, adapter = adapted(METHODS[name])
    written = [WRITTEN[name](shape["I"], shape["O"], 3, shape["K"]) for shape in Net.shapes]
    own = [sum(p.numel() for k, p in adapter.named_parameters() if k[0] == l and p.requires_grad) for l in "qv"]
    assert own == written
    assert closed_form(METHODS[name], Net.shapes) == sum(written)


def test_sizes_that_no_single_layer_tells():
    """MOELoRA's one gate for all layers, VB-LoRA's one bank, X-LoRA's one classifier; MoLA's experts by depth: 3 in q
    (16 -> 24), 4 in v (24 -> 12)."""
    _, adapter = adapted(METHODS["moelora"])
    assert trained(adapter) == 4 * (16 + 24) + 4 * (24 + 12) + (3 * 5 + 2 * 5)
    assert trained(adapter) == closed_form(METHODS["moelora"], Net.shapes)
    _, adapter = adapted(METHODS["vb_lora"])  # 3 ranks of sub-vectors of length 2, each with 7 logits
    assert trained(adapter) == 3 * 7 * (8 + 12) + 3 * 7 * (12 + 6) + 7 * 2
    assert trained(adapter) == closed_form(METHODS["vb_lora"], Net.shapes)
    _, adapter = adapted(METHODS["mola"])
    assert trained(adapter) == 3 * (2 * (16 + 24) + 16) + 4 * (2 * (24 + 12) + 24)
    assert trained(adapter) == closed_form(METHODS["mola"], Net.shapes)
    _, adapter = adapted(METHODS["xlora"])  # two layers of three LoRAs: logits of the 16 inputs of q, with biases
    assert trained(adapter) == 2 * 3 * 16 + 2 * 3
    _, adapter = adapted(METHODS["xlora-top"])  # five hidden units between
    assert trained(adapter) == 5 * 16 + 2 * 3 * 5 + 2 * 3


def test_malora_saves_what_its_paper_says():
    """30 to 48 % fewer trained weights than a mixture of LoRAs with the same N, k and r (its abstract)."""
    small, large = MALoRA(), MoLA(num_experts=(8,), k=2, rank=8)
    assert (small.num_experts, small.k, small.rank) == (*large.num_experts, large.k, large.rank)
    base = nn.utils.skip_init(nn.Linear, 4096, 4096)
    sizes = []
    for method in (small, large):
        adapter = adapt(nn.Sequential(base), method, tasks=TASKS, targets="0")
        sizes.append(trained(adapter))
        adapter.remove()
    assert sizes == [361_472, 557_056]  # 16 I + 8 (8 (16 + O) + I), and 8 (8 (I + O) + I)
    assert 0.30 <= 1 - sizes[0] / sizes[1] <= 0.48


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("lora", 4 * (16 + 24)),
        ("hydralora", 2 * (16 + 3 * 24) + 3 * 16),  # dense: all of them
        ("mola", 2 * 2 * (16 + 24) + 3 * 16),  # 2 of 3 experts, and the router
        ("malora", 5 * 16 + 2 * 3 * (5 + 24) + 4 * 16),  # the shared subspace always works
        ("smora", 3 * (16 + 24) + 8 * 16),
        ("omoe", 3 * 2 * (16 + 24) + 3 * 16),  # the chosen outputs depend on all
        ("moa", 2 * (16 + 24) + 3 * 16),  # one LoRA, and every task's router
        ("conditional_mixlora", 3 * (16 + 24) + 3 * 5 * 16 + 2 * 5 * 16),
        ("mtl_lora", 2 * (16 + 3 * 24) + 2 * 2 + 3),  # one task's transform and logits
        ("c_lorae", (4 + 2) * (16 + 24) + 2 * 16),
    ],
)
def test_active_weights_of_a_token(name, active):
    _, adapter = adapted(METHODS[name])
    assert adapter.layers["q"].active_parameters() == active
