"""The benchmark's instruments and its bookkeeping; not what it measures."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist

from tools.bench import alternatives, cases, cli, report, worker
from tools.bench.measure import (
    Collectives,
    LiveBytes,
    LiveStorages,
    Pairs,
    bootstrap_median,
    storage_bytes,
    time_pairs,
    visited,
)
from tools.bench.pages import fill
from tools.bench.references import Truths, dense_truth

SMALL = cases.Shape(tokens=12, hidden=8, vocab=96, chunk=5)


def test_live_bytes_counts_storages_once_and_releases_them():
    kept = []
    with LiveBytes() as live:
        a = torch.empty(1000)
        kept.append(a.view(10, 100)[2:])
        live.mark("one")
        b = torch.empty(500, dtype=torch.float64)
        live.mark("two")
        del b
        live.mark("freed")
        torch.empty(100)
    assert live.at == {"one": 4000, "two": 8000, "freed": 4000}
    assert (live.peak, live.end) == (8000, 4000)


def test_live_bytes_sees_backward_and_temporaries_but_no_inputs():
    x = torch.randn(64, 32, requires_grad=True)
    nbytes = x.numel() * 4
    with LiveBytes() as live:
        y = x.exp()
        live.mark("forward")
        y.backward(y.detach())
    assert live.at["forward"] == nbytes
    assert live.end == 2 * nbytes  # y and x.grad
    assert live.peak >= 2 * nbytes


def test_live_storages_follow_views_saved_tensors_and_the_end_of_both():
    x = torch.randn(64, 32, requires_grad=True)
    nbytes = x.numel() * 4
    with LiveStorages() as live:
        live.mark("forward")
        y = (x * 1.0).exp()  # exp saves its result, the product is freed
        view = y.view(-1)[5:]
        live.mark("held")
        del y
        live.mark("view")
        view.sum().backward()
        del view
        live.mark("end")
    assert live.at == {"forward": 0, "held": nbytes, "view": nbytes, "end": nbytes}  # x.grad
    assert live.peaks["forward"] == 2 * nbytes and live.peak >= 2 * nbytes


def test_storage_bytes_takes_views_once():
    base = torch.zeros(4, 8)
    assert storage_bytes([base, base[1], None, torch.zeros(3)]) == 128 + 12


def test_collectives_are_counted_once_with_what_a_rank_contributes(monkeypatch):
    def all_reduce(tensor, op=None, group=None):
        return None

    def all_gather(tensor_list, tensor, group=None):
        dist.all_reduce(tensor)  # one that calls another is one call

    def scatter(tensor, scatter_list=None, src=0, group=None):
        return None

    for function in (all_reduce, all_gather, scatter):
        monkeypatch.setattr(dist, function.__name__, function)
    with Collectives() as traffic:
        dist.all_reduce(torch.zeros(3, 16), group=None)
        dist.all_gather(tensor=torch.zeros(5, 2, dtype=torch.int64), tensor_list=[])
        dist.all_reduce(torch.zeros(16, 16))
        dist.scatter(torch.zeros(2), [torch.zeros(2), torch.zeros(2)])
        dist.scatter(torch.zeros(2))
    assert dist.all_reduce is all_reduce
    assert [call.nbytes for call in traffic.calls] == [192, 80, 1024, 16, 0]
    scalars, states = traffic.split(hidden=16, rows=16)
    assert [call.shape for call in states] == [(16, 16)]
    assert len(scalars) == 4


def test_bootstrap_interval_holds_the_median_and_is_repeatable():
    values = [1.0, 1.1, 0.9, 1.05, 3.0, 0.95, 1.02]
    interval = bootstrap_median(values)
    assert interval.median == 1.02
    assert 0.9 <= interval.low < interval.median < interval.high <= 3.0
    assert interval == bootstrap_median(values)
    assert dataclasses.astuple(bootstrap_median([2.0])) == (2.0, 2.0, 2.0)


def test_pairs_are_interleaved_in_random_order():
    seen = []
    steps = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    result = time_pairs(steps, lambda: seen.append("-"), 20, before=lambda: None)
    assert {name: len(pairs.step) for name, pairs in result.items()} == {"a": 20, "b": 20}
    blocks = ["".join(seen[i : i + 2]) for i in range(0, len(seen), 2)]
    assert set(blocks) == {"a-", "-a", "b-", "-b"}
    rounds = [blocks[i][0] + blocks[i][1] + blocks[i + 1] for i in range(0, len(blocks), 2)]
    assert all("a" in r and "b" in r for r in rounds)
    assert Pairs([2.0, 3.0], [1.0, 2.0]).ratios() == [2.0, 1.5]
    seen.clear()
    result = time_pairs(steps, lambda: seen.append("-"), 6, fewer={"b": 2})
    assert {name: len(pairs.yardstick) for name, pairs in result.items()} == {"a": 6, "b": 2}
    assert visited(2, 6) == [2, 5] and visited(9, 3) == [0, 1, 2] and len(seen) == 16


def test_unchunked_ratio_divides_neighbours_of_the_same_round():
    def record(name, step, products):
        return {"method": name, "samples": {"step": step, "yardstick": products}}

    records = [
        record(worker.UNCHUNKED, [2.0, 8.0], [1.0, 4.0]),
        record("x", [3.0, 6.0], [1.0, 2.0]),
    ]
    worker.summarise(records)
    assert records[1]["ratio"]["median"] == 3.0
    assert records[1]["ratio_unchunked"]["median"] == 1.5
    assert records[0]["ratio_unchunked"]["median"] == 1.0


def test_truth_is_autograd_on_full_logits(tmp_path):
    inputs = cases.Inputs.make(SMALL, torch.float64)
    objective = cases.CASES["rkl"]
    truths = Truths(tmp_path)
    assert truths.load(inputs, objective) is None
    truths.prepare(inputs, objective)
    alternatives._dense(inputs)().loss.backward()  # rounds its log-softmax to fp32
    truth = truths.load(inputs, objective)
    torch.testing.assert_close(inputs.hidden.grad, truth.hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inputs.weight.grad, truth.weight, rtol=1e-4, atol=1e-6)
    half = cases.Inputs.make(SMALL, torch.float64, rank=1, ranks=2)
    torch.testing.assert_close(truths.load(half, objective).weight, truth.weight[48:])
    assert dense_truth(inputs, objective).loss == truth.loss


def test_shards_are_slices_of_the_same_inputs():
    whole = cases.Inputs.make(SMALL, torch.float32)
    parts = [cases.Inputs.make(SMALL, torch.float32, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([p.weight for p in parts]), whole.weight)
    assert all(torch.equal(p.hidden, whole.hidden) for p in parts)


def test_products_are_the_same_in_chunks_and_at_once():
    inputs = cases.Inputs.make(SMALL, torch.float32)
    chunked, whole = (cases.Products(inputs, chunked) for chunked in (True, False))
    chunked()
    whole()
    torch.testing.assert_close(chunked.hidden_gradient, whole.hidden_gradient)
    torch.testing.assert_close(chunked.weight_gradient, whole.weight_gradient)
    assert whole.memory()["peak_bytes"] - whole.memory()["output_bytes"] == 2 * 12 * 96 * 4


@pytest.mark.parametrize("forward_is_first", [True, False])
def test_reverse_kl_setting_finds_the_direction(forward_is_first):
    def loss(student, teacher, beta):
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        if (beta == 0) == forward_is_first:
            return (log_q.exp() * (log_q - log_p)).sum()
        return (log_p.exp() * (log_p - log_q)).sum()

    assert alternatives.reverse_kl_setting(loss) == (1.0 if forward_is_first else 0.0)
    with pytest.raises(ValueError, match="neither"):
        alternatives.reverse_kl_setting(lambda s, t, beta: (s - t).square().sum())


def test_one_command_measures_and_writes_one_document(tmp_path):
    out = tmp_path / "bench"
    sizes = ["--tokens", "12", "--hidden", "8", "--vocab", "96", "--chunk", "5"]
    options = [*sizes, "--no-alternatives", "--pairs", "2", "--out", str(out)]
    assert cli.main([*options, "--cases", "rkl"]) == 0
    assert cli.main([*options, "--cases", "fkl", "--merge"]) == 0
    records = {r["method"]: r for r in json.loads(out.with_suffix(".json").read_text())["records"]}
    assert records.keys() == {worker.CHUNKED, worker.UNCHUNKED, "rkl", "fkl"}
    assert records["rkl"]["hidden_error"] < 1e-5 and records["rkl"]["weight_error"] < 1e-5
    assert records["rkl"]["output_bytes"] >= (12 * 8 + 96 * 8) * 4
    assert records["rkl"]["peak_bytes"] >= records["rkl"]["held_bytes"]
    assert records["rkl"]["pairs"] == 2
    page = out.with_suffix(".md").read_text()
    assert "| rkl |" in page and str(tmp_path) not in page
    assert out.with_suffix(".png").stat().st_size > 0


def test_wrong_gradients_and_what_was_left_out_are_named():
    job = worker.Job(SMALL, torch.float32, ranks=2, pairs=0, methods=("Liger",))
    record = worker._record(job, "x") | {"hidden_error": 1.0, "weight_error": 1e-6}
    cells = dict(zip(report.HEADER, report.row(record), strict=True))
    assert cells["error of hidden.grad"] == "**wrong** (1)"
    assert cells["error of weight.grad"] == "1.0e-06"
    assert "ranks" in worker.unfit(worker.all_methods()["Liger"], job)
    left_out = worker._record(job, "Liger") | {"skipped": "reason"}
    page = report.markdown([record, left_out], {**report.environment()}, "command", "bench")
    assert "left out: Liger: reason" in page


@pytest.mark.parametrize(
    "options", [["--cases", "nosuch"], ["--tp", "3"], ["--pairs", "-1"], ["--preset", "one"]]
)
def test_bad_options_end_before_anything_is_measured(options, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(options)
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_yardstick_that_sums_the_hidden_gradient(monkeypatch):
    """Each chunk's part is on its way before the weight gradient, and waited for."""
    inputs, parts, waited = cases.Inputs.make(SMALL, torch.float32), [], []

    class Work:
        def wait(self):
            waited.append(len(parts))

    def all_reduce(tensor, group=None, async_op=False):
        assert async_op
        parts.append(tensor.shape[0])
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    cases.Products(inputs, chunked=True, summed=True)()
    assert parts == [5, 5, 2] and waited == [3, 3, 3]
    cases.Products(inputs, chunked=True)()
    assert len(parts) == 3


def test_ratios_to_every_yardstick():
    record = {"method": "ours", "samples": {"step": [1.2, 1.2], "yardstick": [1.0, 1.0]}}
    summed = {"method": worker.SUMMED, "samples": {"step": [1.1, 1.2], "yardstick": [1.0, 1.0]}}
    worker.summarise([record, summed])
    assert record["ratio"]["median"] == pytest.approx(1.2)
    assert record["ratio_summed"]["low"] == pytest.approx(1.0)
    assert record["ratio_summed"]["high"] == pytest.approx(1.2 / 1.1)
    assert "ratio_unchunked" not in record


def test_a_table_goes_between_its_marks_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- one -->\nold\nold\n<!-- end of one -->\n\nrest\n")
    for text in ("| a |", "| b |\n"):
        fill(page, "one", text)
    assert page.read_text() == "# A\n\n<!-- one -->\n| b |\n<!-- end of one -->\n\nrest\n"
    before = page.read_text()
    with pytest.raises(SystemExit, match="end of two"):
        fill(page, "two", "lost")
    assert page.read_text() == before
