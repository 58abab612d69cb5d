# SPDX-License-Identifier: Apache-2.0
"""No token and no signed address is shown, and of a bug only its own lines."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit import cli
from quantkit.text import LONGEST_LINE, clean_line, without_secrets

TOKEN = "hf_RECOGNISABLEfakeTOKEN0123456789"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN}, sent", "token ***, sent"),
        (f'{{"Authorization": "Bearer {TOKEN}"}}', '{"Authorization": ***'),
        ("authorization: Basic dXNlcjpwYXNz", "authorization: ***"),
        ("get https://user:pass@x.test/a/b?X-Amz-Signature=SIGNED&y=2#z now", "get https://x.test/a/b now"),
        ("X-Amz-Credential=SIGNED&a=1 sig=SIGNED", "X-Amz-Credential=***&a=1 sig=***"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM", "***"),
        ("one\n\ttwo\x1b[31m", "one two\ufffd[31m"),
        ("hf_quant_config.json and `hf_hub_download` stay", "hf_quant_config.json and `hf_hub_download` stay"),
    ],
)
def test_what_is_cleaned(text: str, shown: str) -> None:
    assert clean_line(text) == shown


def test_a_part_of_a_known_secret_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clean_line("it was ecret-of-o.", "the-secret-of-ours") == "it was ***"
    monkeypatch.setenv("HF_TOKEN", "another-form-of-token")
    assert without_secrets("a\n  form-of-token\nb") == "a\n  ***\nb"
    assert len(clean_line("x" * 1000)) == LONGEST_LINE


def test_a_bug_shows_no_error_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever escapes a command: its own traceback is shown, what it was raised from is not."""

    def read(path: Path) -> dict[str, object]:
        try:
            raise ConnectionError(f"request with {TOKEN}")
        except ConnectionError:
            return {"a": float(f"no number, {TOKEN}")}

    monkeypatch.setattr("quantkit.results.document.read_result", read)
    monkeypatch.setattr(sys, "argv", ["quantkit", "push", str(tmp_path), "org/name"])
    (tmp_path / "quantkit.json").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 1
    assert "ValueError: could not convert string to float" in shown
    assert "line" in shown
    assert "ConnectionError" not in shown
    assert TOKEN not in shown


def test_a_known_problem_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shown = CliRunner().invoke(cli.app, ["push", f"/nowhere/{TOKEN}", "org/name"])
    assert shown.exit_code == 1
    assert TOKEN[3:] not in shown.output
