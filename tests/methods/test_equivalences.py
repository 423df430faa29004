"""Methods that are one another in a special case: the same outputs and gradients once the weights are copied over."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from polyrank import ASE, LoRA, MoRE, adapt
from polyrank.methods import (
    HydraLoRA,
    LoRAMoE,
    MALoRA,
    MELoRA,
    MiLoRA,
    MoDE,
    MOELoRA,
    MoLA,
    MoSLoRA,
    MTLLoRA,
    OMoE,
    PiSSA,
    Poly,
    RsLoRA,
    SMoRA,
    TeamLoRA,
)
from small import IDS, disturb, inputs

EXACT = dict(atol=1e-10, rtol=1e-10)
A, B, G = "experts.lora_A", "experts.lora_B", "router.weight"
SHAPES = pytest.mark.parametrize("shape", [(10, 14), (14, 10)], ids=["wide", "tall"])


class Adapted:
    """One frozen layer under a method, its adapter weights away from their start."""

    def __init__(self, method, shape, eval_mode=False):
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(*shape)).double()
        self.adapter = adapt(self.net, method, tasks=list("abc"), targets="0")
        disturb(self.adapter)
        self.net.train(not eval_mode)
        self.layer = self.adapter.layers["0"]
        self.weights = dict(self.layer.named_parameters())

    def put(self, **weights):
        """Let weights have these values; a name's ``__`` is a dot."""
        with torch.no_grad():
            for name, value in weights.items():
                p = self.weights[name.replace("__", ".")]
                p.copy_(value.reshape(p.shape))
        return self

    def take(self, other, *names, **renamed):
        """Copy weights of ``other`` of the same name, and ``mine="theirs"`` those of another."""
        theirs = {name: name for name in names} | {mine.replace("__", "."): name for mine, name in renamed.items()}
        for mine, name in theirs.items():
            self.put(**{mine: other.weights[name].detach()})
        return self

    def run(self, ids=IDS):
        """(outputs, gradient of the input, loss); the weights' gradients stay in ``grad``."""
        shape = self.layer.in_features, self.layer.out_features
        x = inputs(4, 3, shape[0], dtype=torch.float64).requires_grad_()
        target = inputs(4, 3, shape[1], seed=9, dtype=torch.float64)
        y = self.net(x, task_ids=ids)
        loss = (y - target).square().mean() + sum(self.adapter.losses().values(), torch.zeros(()))
        loss.backward()
        assert (y - self.layer.base(x)).abs().max() > 0.1, "the adapter does nothing: the test is empty"
        return y, x.grad, loss

    def grad(self, name):
        assert self.weights[name].grad.abs().max() > 0, f"no gradient at {name}: the test is empty"
        return self.weights[name].grad


def same(one, other, *names, ids=IDS, **renamed):
    """Equal outputs, input gradients and losses, and gradients of the weights of a name, or of mine="theirs"."""
    assert_close(one.run(ids), other.run(ids), **EXACT)
    for mine, theirs in ({name: name for name in names} | renamed).items():
        mine = mine.replace("__", ".")
        assert_close(one.grad(mine).flatten(), other.grad(theirs).flatten(), **EXACT)


@SHAPES
@pytest.mark.parametrize("block", [4, 1])
def test_mode_of_one_alternative_is_lora(shape, block):
    """1 x r x p: a softmax over one is 1. MoDE has no scale, so alpha = r."""
    lora = Adapted(LoRA(rank=4, alpha=4), shape)
    same(Adapted(MoDE(num_experts=1, rank=4, block=block), shape).take(lora, A, B), lora, A, B)


@SHAPES
def test_mode_of_one_block_is_hydralora(shape):
    hydra = Adapted(HydraLoRA(num_experts=3, rank=4, alpha=4), shape)
    mode = Adapted(MoDE(num_experts=3, rank=4, block=4), shape)
    same(mode.take(hydra, A, B, G), hydra, A, B, G)


@SHAPES
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_smora_of_whole_experts_is_a_renormalised_mixture(shape, activation):
    """Blocks of r ranks, k r of N r active. p_i / sum p over the chosen is a softmax of log p, so MoLA's gate behind a
    log-sigmoid is the sigmoid's."""
    mola = Adapted(MoLA(num_experts=(4,), k=2, rank=3, alpha=6, balance=0), shape)
    if activation == "sigmoid":
        mola.layer.router.register_forward_hook(lambda module, args, logits: F.logsigmoid(logits))
    smora = Adapted(SMoRA(rank=12, k=6, block=3, alpha=6, activation=activation), shape)
    smora.put(gate__beta=torch.zeros(4))
    same(smora.take(mola, A, B, G), mola, A, B, G)


@SHAPES
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_smora_with_gates_constant_on_blocks_is_moe_lora(shape, activation):
    """Every rank has a router row of its own; rows that are equal within an expert give that expert's gate."""
    moe = Adapted(LoRAMoE(num_experts=3, rank=4, alpha=6, balance=0), shape)
    if activation == "sigmoid":
        moe.layer.router.register_forward_hook(lambda module, args, logits: F.logsigmoid(logits))
    smora = Adapted(SMoRA(rank=12, k=12, alpha=6, activation=activation), shape)
    smora.put(gate__beta=torch.zeros(12), router__weight=moe.weights[G].detach().repeat_interleave(4, 0))
    same(smora.take(moe, A, B), moe, A, B)
    assert_close(smora.grad(G).view(3, 4, -1).sum(1), moe.grad(G), **EXACT)


@SHAPES
def test_teamlora_is_one_lora_with_block_gates(shape):
    """On each token it is the LoRA of rank N r whose A has row j multiplied by the gate of j's block."""
    n, r = 3, 2
    team = Adapted(TeamLoRA(num_experts=n, rank=r, alpha=4, router_dim=5), shape)
    lora = Adapted(LoRA(rank=n * r, alpha=4 * n), shape)  # the scale is alpha / r in both
    y, x_grad, loss = team.run()
    own = {name: p.detach().clone().requires_grad_() for name, p in team.weights.items()}
    x = inputs(4, 3, shape[0], dtype=torch.float64).requires_grad_()
    out = []
    for token in x.flatten(0, 1):
        hidden = own["router.down"] @ token
        logits = own["router.up"] @ (hidden * torch.sigmoid(hidden))
        w = own["gate.interaction"] @ (logits.exp() / logits.exp().sum())
        a = torch.stack([w[j // r] * own[A][j] for j in range(n * r)])
        out.append(torch.func.functional_call(lora.layer, {A: a, B: own[B]}, (token.unsqueeze(0),)))
    again = torch.cat(out).view_as(y)
    total = (again - inputs(4, 3, shape[1], seed=9, dtype=torch.float64)).square().mean()
    total.backward()
    assert_close((again, x.grad, total), (y, x_grad, loss), **EXACT)
    for name in (A, B, "router.down", "router.up", "gate.interaction"):
        assert_close(team.grad(name), own[name].grad, **EXACT)


@SHAPES
@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_mtl_lora_of_one_alternative_is_lora(shape, transform):
    lora = Adapted(LoRA(rank=4, alpha=6), shape)
    mtl = Adapted(MTLLoRA(num_experts=1, rank=4, alpha=6, transform=transform), shape)
    own = torch.eye(4) if transform == "full" else torch.ones(4)
    mtl.put(**{f"experts.transform.rows.{t}": own for t in range(3)})
    mtl.take(lora, experts__shared__lora_A=A, experts__shared__lora_B=B)
    same(mtl, lora, experts__shared__lora_A=A, experts__shared__lora_B=B)


@SHAPES
def test_melora_of_one_block_is_lora(shape):
    lora = Adapted(LoRA(rank=4, alpha=6), shape)
    same(Adapted(MELoRA(num_experts=1, rank=4, alpha=6), shape).take(lora, A, B), lora, A, B)


@SHAPES
@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_malora_of_the_whole_space_is_mola(shape, balance):
    """d = N r, and P_e the r rows of its own."""
    mola = Adapted(MoLA(num_experts=(4,), k=2, rank=2, alpha=4, balance=balance), shape)
    malora = Adapted(MALoRA(num_experts=4, k=2, rank=2, subspace=8, alpha=4, balance=balance), shape)
    malora.put(experts__lora_P=torch.eye(8)).take(mola, B, G, experts__lora_S=A)
    same(malora, mola, B, G, experts__lora_S=A)


@SHAPES
@pytest.mark.parametrize("gate", ["global", "layer"])
def test_moelora_with_even_gates_is_lora(shape, gate):
    """B of the LoRA is B / N, so its gradient is N times as large."""
    moe = Adapted(MOELoRA(num_experts=2, rank=4, alpha=6, task_dim=5, gate=gate), shape)
    moe.put(**{name: torch.zeros_like(p) for name, p in moe.weights.items() if name.endswith(".proj")})
    lora = Adapted(LoRA(rank=4, alpha=6), shape).take(moe, A)
    lora.put(experts__lora_B=moe.weights[B].detach() / 2)
    same(moe, lora, A)
    assert_close(2 * moe.grad(B), lora.grad(B), **EXACT)


@SHAPES
@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize(("gate", "num_shared"), [("joint", 4), ("joint", 2), ("renormalised", 0)])
def test_ase_with_every_expert_active_is_a_dense_mixture(shape, task, gate, num_shared):
    """All but one shared and that one routed, as ASE has at least one routed expert; or all of the routed active."""
    ase = Adapted(
        ASE(num_experts=5, k=5 - num_shared, num_shared=num_shared, rank=2, alpha=4, gate=gate, mutual_information=0),
        shape,
    )
    dense = Adapted(LoRAMoE(num_experts=5, rank=2, alpha=4, balance=0), shape)
    own = f"router.weights.rows.{task}"
    dense.take(ase, A, B, router__weight=own)
    same(dense, ase, A, B, ids=torch.full((4,), task), router__weight=own)


@SHAPES
def test_more_of_full_rank_is_lora(shape):
    """r_t = R for every task, s_i = 1."""
    lora = Adapted(LoRA(rank=6, alpha=9), shape)
    more = Adapted(MoRE(rank=6, alpha=9, scaling="none", contrastive=0), shape).take(lora, A, B)
    more.put(router__proj=torch.zeros(6, shape[0]), router__bias=torch.arange(6.0))
    same(more, lora, A, B)


@SHAPES
def test_moslora_with_the_identity_as_mixer_is_lora(shape):
    lora = Adapted(LoRA(rank=4, alpha=6), shape)
    same(Adapted(MoSLoRA(rank=4, alpha=6), shape).take(lora, A, B).put(experts__mixer=torch.eye(4)), lora, A, B)


@SHAPES
@pytest.mark.parametrize("eval_mode", [False, True], ids=["training", "evaluation"])
def test_poly_of_one_skill_is_lora(shape, eval_mode):
    """The share of the only skill is 1, whatever its noise. Poly's scale is 1 / r."""
    lora = Adapted(LoRA(rank=4, alpha=1), shape)
    same(Adapted(Poly(num_experts=1, rank=4), shape, eval_mode).take(lora, A, B), lora, A, B)


@SHAPES
def test_poly_with_splits_of_one_skill_is_lora(shape):
    """The A of the slices stand beside each other: every slice of the output reads the whole input."""
    poly = Adapted(Poly(num_experts=1, rank=4, splits=2), shape)
    lora = Adapted(LoRA(rank=4, alpha=1), shape)
    for name in (A, B):
        lora.put(**{name: torch.cat([*poly.weights[name].detach()], 1)})
    same(poly, lora)
    for name in (A, B):
        assert_close(torch.cat([*poly.grad(name)], 1), lora.grad(name), **EXACT)


@SHAPES
def test_rslora_is_lora_of_another_alpha(shape):
    lora = Adapted(LoRA(rank=4, alpha=12), shape)
    same(Adapted(RsLoRA(rank=4, alpha=6), shape).take(lora, A, B), lora, A, B)


@SHAPES
@pytest.mark.parametrize("method", [PiSSA(rank=4, alpha=6), MiLoRA(rank=4, alpha=6)], ids=["pissa", "milora"])
def test_singular_starts_are_lora_on_the_residual(shape, method):
    """The released form of both: the start is taken out of the base weight."""
    singular = Adapted(method, shape)
    fresh = nn.Sequential(nn.Linear(*shape)).double()
    fresh.load_state_dict({f"0.{k}": v for k, v in singular.layer.base.state_dict().items()})
    start = dict(adapt(fresh, method, tasks=["a"], targets="0").layers["0"].named_parameters())
    lora = Adapted(LoRA(rank=4, alpha=6), shape).take(singular, A, B)
    with torch.no_grad():
        lora.layer.base.weight.sub_(6 / 4 * start[B].t() @ start[A])
    same(singular, lora, A, B)


@SHAPES
@pytest.mark.parametrize(
    "method",
    [
        HydraLoRA(num_experts=1, rank=4, alpha=6),
        LoRAMoE(num_experts=1, rank=4, alpha=6, balance=0),
        MoLA(num_experts=(1,), k=1, rank=4, alpha=6, balance=0),
        MOELoRA(num_experts=1, rank=4, alpha=6),
        OMoE(num_experts=1, k=1, rank=4, alpha=6),
        ASE(num_experts=1, k=1, num_shared=0, rank=4, alpha=6, gate="renormalised", mutual_information=0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_mixture_of_one_is_lora(shape, method):
    lora = Adapted(LoRA(rank=4, alpha=6), shape)
    same(Adapted(method, shape).take(lora, A, B), lora, A, B)


def test_the_comparison_can_fail():
    """A wrong scale or a weight that was not copied is found."""
    shape = (10, 14)
    lora = Adapted(LoRA(rank=4, alpha=6), shape)
    with pytest.raises(AssertionError, match="not close"):
        same(Adapted(RsLoRA(rank=4, alpha=6), shape).take(lora, A, B), lora)
    with pytest.raises(AssertionError, match="not close"):
        same(copy.deepcopy(lora).put(experts__lora_B=torch.ones(4, 14)), lora)
