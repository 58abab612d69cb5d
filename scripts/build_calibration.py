# SPDX-License-Identifier: Apache-2.0
"""Build the bundled calibration sets and their manifest from two JSON-lines files, the same bytes every time.

    python scripts/build_calibration.py permissive-train.jsonl.xz permissive-heldout.jsonl.xz calibration

A line of the sources is `{"kind", "source", "license", "text" | "messages"}`. The calibration sets come from the first
file, `eval` from the second. A document gives at most one stretch, cut at lines, so that a set holds many documents.
Left out: documents whose licence is not plain from their own text, tables, and near-copies of what was chosen already;
for `eval` also near-copies of anything in the training file.
"""

import argparse
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Recipe(NamedTuple):
    """What a set is made of: the kind of its documents, how many characters in all, how many of one document."""

    kind: str
    characters: int
    per_document: int


TRAIN = {
    "general": Recipe("prose", 1_140_000, 8_000),
    "code": Recipe("code", 1_180_000, 8_000),
    "chinese": Recipe("chinese", 570_000, 3_500),
    "reasoning": Recipe("reasoning", 860_000, 8_000),
}
HELDOUT = (
    Recipe("prose", 180_000, 8_000),
    Recipe("code", 120_000, 12_000),
    Recipe("chinese", 80_000, 16_000),
    Recipe("reasoning", 100_000, 8_000),
)
LONG_LINE = 40  # characters: shorter lines repeat in unrelated documents
COPIED = 0.05  # a document with more than this share of its long lines seen before is a near-copy


def read(path: Path) -> list[Record]:
    """Read the records of an xz-compressed JSON-lines file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def text_of(record: Record) -> str:
    """All the words of a record."""
    return str(record["text"]) if "text" in record else "\n".join(m["content"] for m in record["messages"])


def licence_is_plain(record: Record) -> bool:
    """Whether nothing in the text contradicts the licence that the record names.

    PEPs and EIPs are public domain or CC0 only where they say so. Rust RFCs are under both licences since RFC 2044
    (end of 2017), older ones only in part. Elsewhere a notice may name another owner.
    """
    text = text_of(record).lower()
    if record["source"] in ("python/peps", "ethereum/EIPs"):
        dedicated = re.search(r"placed in the\s+public\s+domain|\bcc0\b", text)
        return dedicated is not None and "open publication license" not in text
    if record["source"] == "rust-lang/rfcs" and not re.search(r"start date:\W*20(1[89]|2\d)", text):
        return False
    return "copyright" not in text


def is_writing(text: str) -> bool:
    """Whether the text is written rather than generated: mostly words, few lines of the same form (tables)."""
    lines = [re.sub(r"\d|0x[0-9a-f]+", "", line.strip().lower())[:12] for line in text.splitlines() if line.strip()]
    return len(set(lines)) > len(lines) * 0.4 and sum(c.isalpha() for c in text) > len(text) * 0.5


def long_lines(record: Record) -> set[str]:
    """The lines by which copies are recognised."""
    return {line.strip() for line in text_of(record).splitlines() if len(line.strip()) >= LONG_LINE}


def stretch(text: str, limit: int, rng: random.Random) -> str:
    """Whole lines of a text, at most `limit` characters, from a random place."""
    if len(text) <= limit:
        return text
    start = rng.randrange(len(text) - limit)
    start = text.find("\n", start) + 1 if start else 0
    end = text.rfind("\n", start, start + limit) + 1
    return text[start:end].strip("\n") + "\n"


def choose(records: list[Record], recipe: Recipe, seen: set[str], rng: random.Random) -> Iterator[Record]:
    """Records of the recipe's kind in random order until it has its characters; `seen` grows by their lines."""
    candidates = [record for record in records if record["kind"] == recipe.kind]
    rng.shuffle(candidates)
    left = recipe.characters
    for record in candidates:
        if left <= 0:
            return
        lines = long_lines(record)
        if not licence_is_plain(record) or len(lines & seen) > COPIED * len(lines):
            continue
        if "text" in record:
            cut = stretch(record["text"], recipe.per_document, rng)
            if len(cut) < 400 or not is_writing(cut):
                continue
            body: Record = {"text": cut}
        else:
            body = {"messages": record["messages"]}
        seen |= lines
        left -= len(text_of(body))
        yield {**body, "source": record["source"], "license": record["license"]}


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records as xz-compressed JSON lines."""
    lines = (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records)
    path.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def describe(path: Path, records: list[Record], kinds: list[str], made: str) -> Record:
    """Give one set's entry in the manifest."""
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "kinds": kinds,
        "documents": len(records),
        "characters": sum(len(text_of(record)) for record in records),
        "sources": dict(sorted({record["source"]: record["license"] for record in records}.items())),
        "made": made,
    }


def build(train: list[Record], heldout: list[Record], out: Path) -> Record:
    """Write every set to `out` and return the manifest."""
    sets: Record = {}
    for name, recipe in TRAIN.items():
        records = list(choose(train, recipe, set(), random.Random(name)))
        write(out / f"{name}.jsonl.xz", records)
        made = f"training documents in random order, of each a stretch of at most {recipe.per_document} characters"
        sets[name] = describe(out / f"{name}.jsonl.xz", records, [recipe.kind], made)

    rng = random.Random("eval")
    seen = set().union(*map(long_lines, train))
    records = [record for recipe in HELDOUT for record in choose(heldout, recipe, seen, rng)]
    rng.shuffle(records)
    write(out / "eval.jsonl.xz", records)
    made = "held-out documents that share almost no line with a training document, all kinds shuffled together"
    sets["eval"] = describe(out / "eval.jsonl.xz", records, [recipe.kind for recipe in HELDOUT], made)
    return {"mix": {"of": list(TRAIN), "made": "composed when loaded: windows of the four sets in turn"}, "sets": sets}


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    manifest = build(read(args.train), read(args.heldout), args.out)
    text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
    (args.out / "manifest.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
