"""Singular factors: exact at every condition number, and a cache that is never believed where it is wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from polyrank import MoORETopK, adapt, svd
from polyrank.svd import cache_path, compute, factorise

SHAPES = [(90, 140), (140, 90)]
BIG = (257, 300)  # just cached, and of odd size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    return tmp_path


def spread(shape, decades, dtype=torch.float64):
    """A weight whose singular values fall from 1 to 10^-decades."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(noise, full_matrices=False)
    return ((u * torch.logspace(0, -decades, len(vt), dtype=torch.float64)) @ vt).to(dtype)


def big(dtype=torch.float32, seed=0):
    return torch.randn(*BIG, generator=torch.Generator().manual_seed(seed)).to(dtype)


def counted(monkeypatch, owner, name):
    calls, real = [], getattr(owner, name)

    def call(*args, **keywords):
        calls.append(args)
        return real(*args, **keywords)

    monkeypatch.setattr(owner, name, call)
    return calls


def off_orthonormal(rows):
    return float((rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("decades", "falls_back", "mended"), [(0.5, 0, 0), (2, 0, 0), (4.5, 0, 1), (7, 1, 0)])
def test_each_condition_has_its_remedy(shape, decades, falls_back, mended, monkeypatch):
    """In fp32, W is off by no more than the rounding of U, sigma and V; nothing is paid for that is not needed."""
    weight = spread(shape, decades, torch.float32)
    gesdd = counted(monkeypatch, torch.linalg, "svd")
    step = counted(monkeypatch, svd, "_orthonormal")
    found = compute(weight)
    assert (len(gesdd), len(step)) == (falls_back, mended)
    u, sigma, vt = found.u.double(), found.sigma.double(), found.vt.double()
    assert found.u.dtype == torch.float32
    assert float(((u * sigma) @ vt - weight.double()).norm() / weight.double().norm()) < 2e-7
    assert max(off_orthonormal(u.t()), off_orthonormal(vt)) < 1e-7
    assert (found.sigma.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decades", [0.5, 3, 4.5, 7])
def test_a_double_weight_gets_factors_in_fp64(shape, decades):
    """Against LAPACK: sigma, and each pair of directions, u_k v_k', whose sign is free in U and V alone."""
    weight = spread(shape, decades)
    found, (u, sigma, vt) = compute(weight), torch.linalg.svd(weight, full_matrices=False)
    assert max(off_orthonormal(found.u.t()), off_orthonormal(found.vt)) < 1e-13
    assert_close((found.u * found.sigma) @ found.vt, weight, atol=1e-11, rtol=0)
    assert_close(found.sigma, sigma, atol=1e-11, rtol=0)
    pairs = torch.einsum("ok,ki->koi", found.u, found.vt) - torch.einsum("ok,ki->koi", u, vt)
    assert float((pairs.flatten(1).norm(dim=1) * sigma).max()) < 1e-9
    largest = found.vt.gather(1, found.vt.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_equal_and_missing_singular_values():
    """An orthogonal weight, whose sigma differ by rounding alone, one of rank 1, and zero."""
    orthogonal = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(1)))[0]
    for weight in (orthogonal, torch.ones(40, 30), torch.zeros(20, 30)):
        found = compute(weight)
        assert (found.sigma.diff() <= 0).all()
        assert_close((found.u * found.sigma) @ found.vt, weight, atol=1e-5, rtol=0)
        assert max(off_orthonormal(found.u.t()), off_orthonormal(found.vt)) < 1e-5


def test_a_part_of_the_factors_does_not_hold_the_rest_in_memory():
    found = compute(big())
    for part in (found.first(4), found.last(4)):
        assert part.u.untyped_storage().nbytes() == 4 * 257 * 4
        assert part.vt.untyped_storage().nbytes() == 4 * 300 * 4
    assert torch.equal(found.last(4).vt, found.vt[-4:])
    assert found.first(400) is found.last(400) is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_numbers_with_and_without_the_cache(dtype, monkeypatch):
    weight = big(dtype)
    want, _ = compute(weight), factorise(weight)
    calls = counted(monkeypatch, svd, "compute")
    found = factorise(weight)
    assert not calls, "the file was not read"
    for name in ("u", "sigma", "vt"):
        assert torch.equal(getattr(found, name), getattr(want, name))


def test_the_name_of_a_file_says_what_it_holds(monkeypatch):
    """The weight, the algorithm, the factors' dtype: a change of any is another file."""
    weight = big()
    paths = [cache_path(w) for w in (weight, weight.double(), weight.bfloat16(), weight + 1, weight.t())]
    assert paths[0].name.endswith(f"-{svd.METHOD}-float32.safetensors")
    assert paths[1].name.endswith("-float64.safetensors")
    factorise(weight)
    calls = counted(monkeypatch, svd, "compute")
    monkeypatch.setattr(svd, "METHOD", "another")
    assert cache_path(weight) not in paths and len({*paths}) == 5
    factorise(weight)
    assert len(calls) == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # the lowest bit of an entry of a matrix
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def lack(path):
    save_file({name: part for name, part in load_file(path).items() if name != "sums"}, path)


def exchange(path):
    """Whole, and of another weight."""
    factorise(big(seed=5))
    path.write_bytes(cache_path(big(seed=5)).read_bytes())


def misshape(path):
    factors = compute(big()[:, :290])
    parts = {"u": factors.u, "sigma": factors.sigma, "vt": factors.vt}
    save_file({**parts, "sums": svd._sums(factors)}, path)


@pytest.mark.parametrize("harm", [flip, cut, lack, exchange, misshape])
def test_a_file_that_is_wrong_is_computed_anew(harm, monkeypatch):
    weight = big()
    want, path = factorise(weight), cache_path(weight)
    whole = path.read_bytes()
    harm(path)
    assert path.read_bytes() != whole
    calls = counted(monkeypatch, svd, "compute")
    assert torch.equal(factorise(weight).vt, want.vt)
    assert len(calls) == 1
    assert path.read_bytes() == whole


def test_factors_outlive_their_file():
    weight = big()
    factorise(weight)
    found = factorise(weight)
    path = cache_path(weight)
    path.write_bytes(bytes(len(path.read_bytes())))
    assert_close((found.u * found.sigma) @ found.vt, weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, dtype, cache):
    net = nn.Sequential(nn.Linear(*BIG, dtype=dtype))
    with torch.no_grad():
        net[0].weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"^0: a weight of shape \(300, 257\) has NaN or infinite"):
        adapt(net, MoORETopK(k=4), tasks=["a"])
    assert not list(cache.rglob("*.safetensors"))
