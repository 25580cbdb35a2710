"""The pool device agrees with plain CPU on PyTorch's own databases of operators, modules and optimizers."""

from pathlib import Path

import pytest

from pool.conformance.sweep import COMPILED, KINDS, LACKING, PAGE, Site, page, sweep

WRITE_PAGE = "python tests/pool/conformance/sweep.py --dtype … --samples 4 --page, with the dtypes that the page has"


def failures(results):
    return {
        (result["kind"], result["name"]): f"{result['outcome']}: {result['message']}"
        for result in results
        if result["outcome"] not in ("pass", "skipped")
    }


def test_a_fixed_tenth_agrees_with_plain_cpu(tmp_path: Path):
    with Site(tmp_path) as site:
        results = [result for kind in KINDS for result in sweep(site, kind, "float32", percent=10, samples=2)]
        results += [result for kind in COMPILED for result in sweep(site, kind, "float32", percent=4, samples=1)]
    assert {case: why for case, why in failures(results).items() if case not in LACKING} == {}
    assert sum(result["outcome"] == "pass" for result in results) > 60


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "complex64", "int64", "bool"])
def test_half_of_the_operators_of_other_dtypes_agree_with_plain_cpu(tmp_path: Path, dtype: str):
    """Half a minute at most for each; all of them are run for the page."""
    with Site(tmp_path) as site:
        results = sweep(site, "operator", dtype, percent=50, samples=4)
    assert {case: why for case, why in failures(results).items() if case not in LACKING} == {}
    assert sum(result["outcome"] == "pass" for result in results) > 150


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_agrees_with_plain_cpu_but_what_the_page_names(tmp_path: Path):
    """At most four samples per case: 3 minutes on two busy cores, where all 18,000 take 15."""
    with Site(tmp_path) as site:
        results = [result for kind in KINDS for result in sweep(site, kind, "float32", samples=4)]
    failed = failures(results)
    assert {case: why for case, why in failed.items() if case not in LACKING} == {}
    assert set(failed) == {case for case in LACKING if case[0] in KINDS}, "what works by now leaves the list"
    assert all(not why.startswith(("wrong", "crash")) for why in failed.values())
    assert set(page(results).splitlines()) <= set(PAGE.read_text().splitlines()), WRITE_PAGE


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_modules_and_optimizers_agree_with_plain_cpu(tmp_path: Path):
    """One sample each, which takes more than a minute; four are run for the page."""
    with Site(tmp_path) as site:
        results = [result for kind in COMPILED for result in sweep(site, kind, "float32", samples=1)]
    assert failures(results) == {}
    assert len(results) > 120


def test_lazy_modules_move_before_their_first_batch(device_process):
    device_process.call(move_lazy_modules)


def move_lazy_modules():
    import torch

    outputs = []
    for move in (lambda module: module.to("cpu"), lambda module: module.float().to("pool")):
        torch.manual_seed(2)
        module = move(torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d()))
        inputs = torch.arange(8.0).reshape(2, 4).to(module[0].weight.device)
        outputs.append(module(inputs).cpu())
        assert type(module[0].weight) is torch.nn.Parameter
    torch.testing.assert_close(outputs[1], outputs[0])
