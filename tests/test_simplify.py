"""Rewriting a graph of aten calls leaves what it computes."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metaopt.capture import products, sharing
from metaopt.capture.aten import trace
from metaopt.capture.simplify import simplify


def rewritten(function: Any, *arguments: Tensor) -> Counter[str]:
    """Rewrite a function's graph, check that it gives the same, and count the calls."""
    graph = make_fx(function)(*arguments)
    expected = graph(*arguments)
    simplify(graph.graph)
    graph.graph.lint()
    graph.recompile()
    tolerance = 1e-10 if expected.dtype is torch.float64 else 1e-5
    torch.testing.assert_close(graph(*arguments), expected, rtol=tolerance, atol=tolerance)
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    "empty",
    [
        lambda x: x.new_empty(3, 2),
        lambda x: x.new_empty_strided((3, 2), (2, 1)),
        lambda x: torch.empty_strided((3, 2), (1, 3), dtype=x.dtype),
        lambda x: torch.empty(3, 2, dtype=x.dtype),
        torch.empty_like,
    ],
    ids=["new", "strided", "columns", "empty", "like"],
)
def test_memory_that_is_written_through_an_expanded_view_is_that(empty: Any) -> None:
    def function(given: Any) -> Any:
        (x,) = given
        y = empty(x)
        for i in range(3):
            y.expand(3, 2)[i].copy_(x[i])
        return [2 * y], []

    x = torch.randn(3, 2)
    graph = trace(function, [x])
    torch.use_deterministic_algorithms(True)  # what is not written is NaN then
    try:
        (found,) = graph([x])
    finally:
        torch.use_deterministic_algorithms(False)
    assert found is not None
    assert torch.equal(found, 2 * x)


size = st.integers(1, 6)


@given(size, size, size, size)
def test_two_products_that_are_added_are_one_where_it_pays(m: int, n: int, k: int, other: int) -> None:
    a, b, c, d = (torch.randn(shape) for shape in ((m, k), (k, n), (m, other), (other, n)))
    calls = rewritten(lambda a, b, c, d: a @ b + c @ d, a, b, c, d)
    assert calls["aten.mm.default"] == (1 if k + other <= min(m, n) else 2)


def test_a_product_that_is_needed_elsewhere_is_not_joined() -> None:
    a, b = torch.randn(6, 2), torch.randn(2, 6)

    def function(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        return product.sin() + (product + a @ b.cos())

    assert rewritten(function, a, b)["aten.mm.default"] == 2


def test_a_product_added_to_itself_stays() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        return product + product

    assert rewritten(function, torch.randn(6, 2), torch.randn(2, 6))["aten.mm.default"] == 1


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_products_of_which_one_is_broadcast_are_not_joined(shape: tuple[int, int]) -> None:
    a, b, c, d = torch.randn(6, 2), torch.randn(2, 6), torch.randn(shape[0], 2), torch.randn(2, shape[1])
    assert rewritten(lambda a, b, c, d: a @ b + c @ d, a, b, c, d)["aten.mm.default"] == 2


def test_products_of_different_precision_are_not_joined() -> None:
    a, b = torch.randn(6, 2), torch.randn(2, 6)
    assert rewritten(lambda a, b: a @ b + a.float() @ b.float(), a, b)["aten.mm.default"] == 2


@pytest.mark.parametrize("left", [True, False])
def test_zeros_are_not_added(left: bool) -> None:
    def function(x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        return (zeros + x if left else x + zeros).sin()

    assert set(rewritten(function, torch.randn(3))) == {"aten.sin.default"}


@pytest.mark.parametrize("other", [torch.ones(()), torch.ones(3, dtype=torch.float32), torch.ones(1, 3)])
def test_zeros_that_change_shape_or_precision_are_added(other: Tensor) -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    assert rewritten(lambda x, y: y + torch.zeros_like(x), x, other)["aten.add.Tensor"] == 1


@pytest.mark.parametrize("term", [lambda x: x.t(), lambda x: x.sum().expand(3, 4)], ids=["turned", "one"])
def test_zeros_that_change_the_layout_are_added(term: Any) -> None:
    """Without them, there was no such view, nor what a stride says."""
    rewritten(lambda x: (torch.zeros(3, 4) + term(x)).view(-1), torch.randn(4, 3))
    rewritten(lambda x: (torch.zeros(3, 4) + term(x)).as_strided((2,), (5,)), torch.randn(4, 3))


WAYS = [products._Way(turned, linear) for turned in (False, True) for linear in (False, True)]


@pytest.mark.parametrize(
    "follow", [lambda y: y.view(100, -1), lambda y: y.as_strided((9,), (7,))], ids="view stride".split()
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_follows_a_turned_product_reads_it_as_it_was(
    follow: Any, bias: bool, way: products._Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_fastest", lambda *shape: way)
    x, w, b = (torch.randn(shape, dtype=torch.float32) for shape in ((2000, 60), (10, 60), (10,)))
    rewritten(lambda x, w, b: follow(torch.nn.functional.linear(x, w, b if bias else None)), x, w, b)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_long_product_goes_the_way_that_was_measured_to_be_fastest(
    way: products._Way, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_fastest", lambda *shape: way)
    x, w, b = (torch.randn(shape, dtype=torch.float32) for shape in ((2000, 60), (10, 60), (10,)))
    calls = rewritten(lambda x, w, b: torch.nn.functional.linear(x, w, b if bias else None), x, w, b)
    assert calls["metaopt.linear.default"] == int(way.linear)
    assert calls["aten.t.default"] == 1 + 3 * way.turned + way.linear
    assert calls["aten.mm.default"] == int(not way.linear and (way.turned or not bias))


def test_what_is_fastest_is_measured_and_not_where_results_must_not_vary() -> None:
    strides = (60, 1), (1, 60)
    for dtype in (torch.float32, torch.float64):
        way = products._fastest(dtype, (2000, 60, 10), *strides, torch.get_num_threads())
        assert way in WAYS
        assert not way.linear or dtype is torch.float32
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        calls = rewritten(lambda x, w: x @ w, torch.randn(2000, 600), torch.randn(600, 10))
        assert not {"aten.t.default", "metaopt.linear.default"} & set(calls)
    finally:
        torch.use_deterministic_algorithms(before)


def test_compiled_code_calls_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies nothing that the product can read as it lies."""
    x, w = torch.randn(64, 2000, dtype=torch.float32), torch.randn(64, 10, dtype=torch.float32)
    monkeypatch.setattr(products, "_fastest", lambda *shape: products._Way(False, True))
    graph = make_fx(lambda x, w: (x.t() @ w).sin())(x, w)
    simplify(graph.graph)
    graph.recompile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        found: Any = torch._inductor.compile(graph, [x, w])(x, w)
    torch.testing.assert_close(found[0] if isinstance(found, (list, tuple)) else found, (x.t() @ w).sin())


@pytest.fixture
def sharing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product takes the same time, whatever its width, and the direct way is the fastest."""
    monkeypatch.setattr(sharing, "least_seconds", lambda *shape: 1.0)
    monkeypatch.setattr(products, "_fastest", lambda *shape: products._DIRECT)


@pytest.mark.usefixtures("sharing_pays")
@pytest.mark.parametrize("turned", [False, True])
def test_products_that_share_a_long_factor_are_one(turned: bool) -> None:
    """However each is written: as the long one times a narrow one, the narrow one times it, or with a bias."""
    x, w, v, u, b = (torch.randn(shape) for shape in ((2000, 300), (10, 300), (6, 300), (300, 5), (5,)))
    x = x.t().contiguous() if turned else x

    def function(x: Tensor, w: Tensor, v: Tensor, u: Tensor, b: Tensor) -> Tensor:
        long = x.t() if turned else x
        first = long @ w.t()
        second = (v @ long.t()).sin()
        third = torch.addmm(b, long, u)
        return torch.cat([first, second.t(), third], 1)

    calls = rewritten(function, x, w, v, u, b)
    assert calls["aten.mm.default"] + calls["aten.addmm.default"] == 1


@pytest.mark.usefixtures("sharing_pays")
def test_a_product_that_needs_another_is_not_joined_with_it() -> None:
    """Nor are two, each of which is computed from one of two others that were joined the other way round."""
    x, w = torch.randn(2000, 300), torch.randn(10, 300)

    def chain(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w.t()
        z = x @ (y.t() @ x).sin().t()
        return (y + z).view(-1)

    calls = rewritten(chain, x, w)
    assert calls["aten.mm.default"] == 3

    def crossed(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        first, other = x @ u, y @ u
        second, last = x @ other[:300].sin(), y @ first[:300].sin()
        return torch.cat([first, other, second, last], 1)

    assert rewritten(crossed, x, x + 1, torch.randn(300, 7))["aten.mm.default"] == 3


@pytest.mark.usefixtures("sharing_pays")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_short_products_and_other_precisions_are_not_joined(dtype: torch.dtype) -> None:
    x, w, v = torch.randn(300, 300, dtype=dtype), torch.randn(10, 300, dtype=dtype), torch.randn(100, 300, dtype=dtype)
    assert rewritten(lambda x, w, v: torch.cat([x @ w.t(), x @ v.t()], 1), x, w, v)["aten.mm.default"] == 2


def test_whether_sharing_pays_is_measured_once() -> None:
    shape = torch.float32, (2000, 300, 10), (300, 1), (1, 300), torch.get_num_threads()
    assert 0 < products.least_seconds(*shape) == products.least_seconds(*shape)
