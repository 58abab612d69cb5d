# SPDX-License-Identifier: Apache-2.0
"""A FAIL and a weak PASS name the next command in full; it is one that the command line takes."""

import shlex
from typing import Any

import pytest

from quantkit.records import Foreign, Result
from quantkit.settings.advice import next_step, usage
from tests.result_document import example


def result(command: str, figures: dict[str, Any] | None = None, **changes: Any) -> Result:
    document = example(command=command, **changes)
    document["verification"] |= figures or {"perplexity_fp16": 8.0, "perplexity": 8.3, "verdict": "pass", "reasons": []}
    return Result.model_validate(document)


def step(found: Result) -> str:
    return next_step(found, "out")[-1].removeprefix("try next: ")


def test_a_good_pass_needs_no_advice() -> None:
    good = {"perplexity_fp16": 8.0, "perplexity": 8.01, "kl_divergence": 0.01, "top1_agreement": 0.97}
    assert next_step(result("quantkit awq m", good), "out") == []


def test_a_weak_pass_says_which_limit_is_near() -> None:
    lines = next_step(result("quantkit rtn m", method="rtn", calibration=None), "out")
    assert lines[0] == "close to a limit: perplexity rose by 3.75%, of 5% allowed"


@pytest.mark.parametrize(
    ("command", "changes", "better"),
    [
        ("quantkit rtn m --w-bit 4 --out o --fresh", {"method": "rtn"}, "quantkit awq m --w-bit 4 --out out-awq"),
        ("quantkit awq m --out=o", {}, "quantkit awq m --quality best --out out-best"),
        (
            "quantkit awq 'my model' --group 128 --quality best",
            {"options": {"tune": True}},
            "quantkit awq 'my model' --quality best --group 32 --out out-g32",
        ),
    ],
)
def test_the_next_command_is_the_last_one_with_what_loses_less(
    command: str, changes: dict[str, Any], better: str
) -> None:
    assert step(result(command, **changes)) == better


def test_bits_follow_the_finest_groups() -> None:
    scheme = {"bits": 3, "group_size": 32, "symmetric": True}
    assert step(result("quantkit gptq m --w-bit 3", method="gptq", options={"tune": True}, scheme=scheme)) == (
        "quantkit gptq m --w-bit 4 --out out-w4"
    )


def test_what_differs_from_the_original_is_no_matter_of_another_run() -> None:
    other = {"differences": ["config.json: rms_norm_eps is 0.1, and 1e-06 in the original"], "verdict": "fail"}
    (line,) = next_step(result("quantkit awq m", other, model="m"), "out")
    assert line.endswith("; then: quantkit verify out --against m")


def test_few_samples_come_first() -> None:
    few = example()["calibration"] | {"samples": 16}
    assert step(result("quantkit awq m --samples 16", calibration=few)) == (
        "quantkit awq m --samples 128 --out out-128-samples"
    )


def test_a_broken_folder_is_made_again() -> None:
    strange = [{"name": "model.layers.0.mlp.up_proj", "error": 0.98, "expected": 0.01}]
    found = result("quantkit awq m --out out", {"verdict": "fail", "reasons": ["x"], "strange_linears": strange})
    assert step(found) == "quantkit awq m --out out --fresh"


def test_what_fails_for_its_size_alone_is_planned_again() -> None:
    good = {"perplexity_fp16": 8.0, "perplexity": 8.01, "kl_divergence": 0.01, "top1_agreement": 0.97}
    document = result("quantkit awq m", good)
    assert document.verification is not None
    assert document.verification.fit is not None
    large = document.verification.having(
        verdict="fail", reasons=["too large"], fit=document.verification.fit.having(fits=False)
    )
    assert shlex.split(step(document.having(verification=large)))[:2] == ["quantkit", "fit"]


def test_of_another_tools_checkpoint_the_original_is_quantized() -> None:
    weak = result("quantkit awq m").verification
    foreign = Foreign(out="o", model="org/name", format="gptq", bits_per_weight=4.1, total_bytes=1, verification=weak)
    assert next_step(foreign, "o")[-1] == "try next: quantkit awq org/name"


def test_a_folder_that_passed_says_what_to_do_with_it() -> None:
    rows = dict(usage(result("quantkit awq m"), "my out"))
    assert rows == {
        "talk to it": "quantkit chat 'my out'",
        "serve it": "quantkit serve 'my out'",
        "publish it": "quantkit push 'my out' ORG/NAME",
    }
    failed = result("quantkit awq m", {"verdict": "fail", "reasons": ["x"]})
    assert usage(failed, "out") == []
