# SPDX-License-Identifier: Apache-2.0
"""The figures against a naive float64 oracle, whatever the batching, and every way a verdict can go."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import InputError
from quantkit.pipeline import metrics
from quantkit.pipeline.metrics import Comparison
from quantkit.records import Fit, Limits
from quantkit.verdict import DEFAULT_LIMITS, asked_limits, choose_limits, objections, parse_percent
from tests.result_document import example


def random_batch(
    samples: int, seqlen: int, vocabulary: int, seed: int = 0, noise: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(samples, seqlen, vocabulary, generator=generator)
    logits = reference + noise * torch.randn(samples, seqlen, vocabulary, generator=generator)
    return reference, logits, torch.randint(0, vocabulary, (samples, seqlen), generator=generator)


def oracle(reference: Tensor, logits: Tensor, input_ids: Tensor) -> dict[str, float | list[float]]:
    """One token at a time, in float64, from the definitions."""
    nll_p, nll_q, kls, agreed = [], [], [], 0
    for sample in range(len(input_ids)):
        for t in range(input_ids.shape[1] - 1):
            p = torch.softmax(reference[sample, t].double(), 0)
            q = torch.softmax(logits[sample, t].double(), 0)
            token = int(input_ids[sample, t + 1])
            nll_p.append(-math.log(p[token]))
            nll_q.append(-math.log(q[token]))
            kls.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            agreed += int(p.tolist().index(max(p)) == q.tolist().index(max(q)))
    count = len(kls)
    return {
        "perplexity": math.exp(sum(nll_q) / count),
        "perplexity_fp16": math.exp(sum(nll_p) / count),
        "kl_divergence": sum(kls) / count,
        "top1_agreement": agreed / count,
        "tokens": count,
        "kl": sorted(kls),
    }


def result_of(*batches: tuple[Tensor, Tensor, Tensor]) -> dict[str, object]:
    comparison = Comparison()
    for batch in batches:
        comparison.add(*batch)
    return comparison.result()


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_figures_are_those_of_the_oracle_however_positions_are_cut(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(3, 11, 57)
    monkeypatch.setitem(metrics.CHUNK_BYTES, "cpu", rows * 57 * 4)
    result, expected = result_of(batch), oracle(*batch)
    for name in ("perplexity", "perplexity_fp16", "kl_divergence", "top1_agreement"):
        assert result[name] == pytest.approx(expected[name], rel=1e-5), name
    assert result["tokens"] == 30
    ranked = expected["kl"]
    assert isinstance(ranked, list)
    at = {"p50": 14, "p90": 26, "p99": 29, "max": 29}  # nearest rank among 30
    assert result["kl_percentiles"] == pytest.approx({name: ranked[i] for name, i in at.items()}, rel=1e-4)


@given(
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(2, 40),
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up_to_the_whole(
    samples: int, seqlen: int, vocabulary: int, seed: int, dtype: torch.dtype
) -> None:
    reference, logits, input_ids = random_batch(samples, seqlen, vocabulary, seed)
    reference, logits = reference.to(dtype), logits.to(dtype)
    before = reference.clone(), logits.clone()
    whole = result_of((reference, logits, input_ids))
    parts = result_of(*((reference[i : i + 1], logits[i : i + 1], input_ids[i : i + 1]) for i in range(samples)))
    assert whole.pop("kl_percentiles") == parts.pop("kl_percentiles")
    assert whole == pytest.approx(parts, rel=1e-12)
    expected = oracle(reference, logits, input_ids)
    assert whole["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    # float32 logarithms near 1 are right to some 1e-7, and of two tokens and four entries they are not averaged away
    assert whole["kl_divergence"] == pytest.approx(expected["kl_divergence"], rel=1e-4, abs=1e-6)
    assert torch.equal(reference, before[0])
    assert torch.equal(logits, before[1])


def test_a_model_compared_with_itself_differs_in_nothing() -> None:
    reference, _, input_ids = random_batch(2, 5, 40)
    result = result_of((reference, reference.clone(), input_ids))
    assert result["kl_divergence"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity"] == result["perplexity_fp16"]
    shifted = result_of((reference, reference + 7, input_ids))  # a constant added to all logits is no difference
    assert shifted["kl_divergence"] == pytest.approx(0, abs=1e-5)


def test_kl_goes_from_fp16_to_quantized() -> None:
    """KL(p || q) with p = (1/2, 1/2), q = (3/4, 1/4) is ln 2 - ln 3 / 2; the other way round it is another number."""
    p, q = torch.tensor([[[0.5, 0.5]] * 2]).log(), torch.tensor([[[0.75, 0.25]] * 2]).log()
    result = result_of((p, q, torch.zeros(1, 2, dtype=torch.int64)))
    assert result["kl_divergence"] == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert result["perplexity"] == pytest.approx(4 / 3)
    assert result["perplexity_fp16"] == pytest.approx(2)


def test_large_logits_and_impossible_tokens_stay_exact() -> None:
    """A token of probability e^-1000 makes perplexity overflow, not fail."""
    reference = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    logits = torch.tensor([[[1000.0, 0.0], [0.0, 0.0]]])
    result = result_of((reference, logits, torch.tensor([[0, 1]])))
    assert result["perplexity"] == math.inf
    assert result["perplexity_fp16"] == pytest.approx(2)
    assert result["kl_divergence"] == pytest.approx(500 - math.log(2), rel=1e-6)


def test_nan_logits_show_in_every_figure() -> None:
    reference, logits, input_ids = random_batch(1, 6, 9)
    logits[0, 2, 3] = math.nan
    result = result_of((reference, logits, input_ids))
    assert math.isnan(float(str(result["kl_divergence"])))
    assert math.isnan(float(str(result["perplexity"])))
    assert isinstance(result["kl_percentiles"], dict)
    assert math.isnan(result["kl_percentiles"]["max"])
    assert objections(result, DEFAULT_LIMITS)


def test_memory_for_a_large_vocabulary_is_bounded() -> None:
    """With a vocabulary of 152064, no temporary of 48 positions is made: the largest block is CHUNK_BYTES."""
    vocabulary, seqlen = 152_064, 48
    reference = torch.zeros(1, 1, vocabulary).expand(1, seqlen, vocabulary)
    logits = torch.arange(vocabulary).div(vocabulary).expand(1, seqlen, vocabulary)
    input_ids = torch.full((1, seqlen), 7)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = result_of((reference, logits, input_ids))
    peak = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < peak <= metrics.CHUNK_BYTES["cpu"]
    assert result["perplexity_fp16"] == pytest.approx(vocabulary, rel=1e-4)
    assert result["kl_divergence"] == pytest.approx(math.log(math.e - 1) - 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("reference", "logits", "input_ids", "says"),
    [
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 9), torch.zeros(1, 4, dtype=torch.int64), "share one vocabulary"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1, 3, dtype=torch.int64), r"\[1, 3\]"),
        (torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), "expected logits"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), torch.full((1, 4), 8), "from 0 to 7, got 8"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    reference: Tensor, logits: Tensor, input_ids: Tensor, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Comparison().add(reference, logits, input_ids)


def test_no_predicted_token_is_an_error() -> None:
    comparison = Comparison()
    comparison.add(torch.zeros(3, 1, 8), torch.zeros(3, 1, 8), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="at least 2 tokens"):
        comparison.result()


# --- the verdict ----------------------------------------------------------------------------------------------------

GOOD = {"perplexity": 8.3, "perplexity_fp16": 8.0, "kl_divergence": 0.03}
FITS = Fit.model_validate(
    example()["verification"]["fit"] | {"total_bytes": 20 * 2**30, "budget_bytes": 22 * 2**30, "fits": True}
)


def test_a_good_checkpoint_passes_without_reasons() -> None:
    assert objections(GOOD, DEFAULT_LIMITS, FITS) == []
    assert objections({**GOOD, "perplexity": 7.9}, Limits(max_ppl_increase=0)) == []


def test_each_limit_fails_alone_and_says_its_figures() -> None:
    high = objections({**GOOD, "perplexity": 9.0}, DEFAULT_LIMITS)
    assert high == ["perplexity 9 is 12.50% above FP16's 8; the limit is 5%"]
    assert objections(GOOD, Limits(max_kl=0.02)) == ["KL divergence 0.03 nats is above the limit of 0.02"]
    assert objections(GOOD, Limits(max_kl=0.03)) == []
    (heavy,) = objections(GOOD, DEFAULT_LIMITS, FITS.having(total_bytes=23 * 2**30, fits=False))
    assert "23.00 GiB at a context of 8192 tokens, 1.00 GiB more than the budget of 22.00 GiB" in heavy


def test_reasons_add_up() -> None:
    limits = choose_limits(Limits(max_kl=0.0))
    assert len(objections({**GOOD, "perplexity": 9.0}, limits, FITS.having(total_bytes=2**40, fits=False))) == 3


def test_of_each_limit_the_first_that_is_given_counts() -> None:
    asked, recipe = Limits(max_kl=0.1), Limits(max_ppl_increase=0.5, max_kl=0.2)
    assert choose_limits(asked, recipe) == Limits(max_ppl_increase=0.5, max_kl=0.1)
    assert choose_limits(asked, Limits()).max_ppl_increase == DEFAULT_LIMITS.max_ppl_increase


@pytest.mark.parametrize("name", ["perplexity", "perplexity_fp16", "kl_divergence"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_figure_that_is_no_number_fails(name: str, value: float | None) -> None:
    (reason,) = objections({**GOOD, name: value}, DEFAULT_LIMITS)
    assert name in reason


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), (" 0.5 %", 0.005), ("0%", 0), ("150%", 1.5)])
def test_percentages(text: str, value: float) -> None:
    assert parse_percent(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "0.05", "%", "-1%", "nan%", "inf%", "5%%", "5% more", "five%"])
def test_what_is_no_percentage_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="such as 5%"):
        parse_percent(text)


@pytest.mark.parametrize("limits", [{"max_ppl_increase": math.nan}, {"max_ppl_increase": -0.1}, {"max_kl": math.inf}])
def test_limits_that_limit_nothing_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="0 or more"):
        asked_limits(limits.get("max_ppl_increase"), limits.get("max_kl"))


def test_the_limit_on_kl_goes_with_that_on_perplexity() -> None:
    assert choose_limits() == DEFAULT_LIMITS == Limits(max_ppl_increase=0.05, max_kl=0.2)
    assert choose_limits(Limits(max_ppl_increase=0.1)).max_kl == 0.38
    assert choose_limits(Limits(max_ppl_increase=0.001)).max_kl == 0.2  # none too tight for any model
    recorded = choose_limits(Limits(max_ppl_increase=0.1))
    assert choose_limits(Limits(max_ppl_increase=0.05), recorded).max_kl == 0.2  # not the one of another limit
    assert choose_limits(Limits(), recorded) == recorded


@pytest.mark.parametrize(("kl", "top1"), [(0.0004, 0.99), (0.03, 0.92), (0.0579, 0.88), (0.109, 0.83)])
def test_what_sound_four_bit_runs_measure_passes(kl: float, top1: float) -> None:
    assert objections({**GOOD, "kl_divergence": kl, "top1_agreement": top1}, DEFAULT_LIMITS) == []


@pytest.mark.parametrize(("kl", "top1"), [(0.44, 0.68), (0.05, 0.61), (0.05, 0.34), (0.67, 0.9)])
def test_what_broken_linears_measure_fails_at_any_perplexity(kl: float, top1: float) -> None:
    assert objections({**GOOD, "kl_divergence": kl, "top1_agreement": top1}, DEFAULT_LIMITS)


def test_an_original_that_predicts_nothing_never_passes() -> None:
    guesses = {**GOOD, "perplexity": 116514.0, "perplexity_fp16": 116514.0, "vocabulary": 4096}
    (reason,) = objections(guesses, DEFAULT_LIMITS)
    assert "worse than guessing among its 4,096 tokens" in reason
    assert objections({**guesses, "perplexity": 4700.0, "perplexity_fp16": 4700.0}, DEFAULT_LIMITS) == []
