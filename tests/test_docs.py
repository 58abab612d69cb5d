# SPDX-License-Identifier: Apache-2.0
"""LOG.md keeps its order and its index."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOG = (ROOT / "LOG.md").read_text(encoding="utf-8")
VERDICTS = ("kept", "negative", "measured", "mended", "open")


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def log_titles() -> list[str]:
    return [line[3:] for line in LOG.splitlines() if re.match(r"## \d{4}", line)]


def test_every_title_of_the_log_has_a_date_and_a_verdict_and_the_newest_is_first() -> None:
    dates = []
    for title in log_titles():
        parts = re.fullmatch(r"(\d{4}-\d\d-\d\d): .+ \((\w+)\)", title)
        assert parts, f"{title}: expected 'YYYY-MM-DD: what (verdict)'"
        assert parts[2] in VERDICTS, title
        dates.append(parts[1])
    assert dates == sorted(dates, reverse=True)


def test_the_index_of_the_log_names_every_entry() -> None:
    anchors = [anchor(title) for title in log_titles()]
    assert len(set(anchors)) == len(anchors)
    index = LOG[: LOG.index(f"## {log_titles()[0]}")]
    assert set(re.findall(r"\]\(#([^)]+)\)", index)) == set(anchors)
