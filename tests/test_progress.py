# SPDX-License-Identifier: Apache-2.0
"""What a long run tells while it works."""

import io

import pytest
import torch

from quantkit.report.terminal import progress
from quantkit.report.terminal.progress import Display
from quantkit.report.terminal.screen import Screen


class Clock:
    """A clock that is moved by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def begun(layers: int) -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    display = Display(Screen(file=text, width=200), torch.device("cpu"))
    display.start(layers, 100, {})
    return display, text


def test_the_time_left_is_told_within_the_first_layer(clock: Clock) -> None:
    display, text = begun(10)
    display.layer(0, 10)
    display.stage("read")
    assert display.left() == "?"
    clock.now += 50
    display.stage("calibrate q_proj")  # a tenth of the layer in 50 s
    assert "calibrate" not in text.getvalue()
    clock.now += 50
    display.stage("quantize q_proj")
    assert display.left() == "1:21:40"  # 10 layers of 500 s, less 100 s
    assert "layer 1 of 10: quantize q_proj (20% of it)  about 1:21:40 left" in text.getvalue()


def test_the_time_left_falls_within_a_layer(clock: Clock) -> None:
    display, _ = begun(3)
    for index in range(2):
        display.layer(index, 2)
        display.stage("read")
        clock.now += 100
        display.finished(index, 0.0, False)
    assert display.left() == "1:40"
    display.layer(2, 2)
    clock.now += 40
    assert display.left() == "1:00"


def test_a_title_is_told_once_for_all_its_layers(clock: Clock) -> None:
    display, text = begun(3)
    for layer in range(1, 4):
        display.ending(f"see what matters: layer {layer}")
    display.ending("compare the logits")
    assert text.getvalue().splitlines()[1:] == ["see what matters ...", "compare the logits ..."]
    clock.now += 61
    display.ending("compare the logits")
    assert len(text.getvalue().splitlines()) == 4
