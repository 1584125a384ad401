"""What survives: killed writers, failing disks, many writers at once, mutated files.

    python benchmarks/reliability.py                                # everything, about 15 minutes
    python benchmarks/reliability.py --parts kills --kills 2000
    python benchmarks/reliability.py --docs docs/reliability.md     # the table again

The work is done by ``tests/reliability/saving.py`` (each kind of artefact in a process of its own)
and ``tests/reliability/fuzz.py``; tests run the same with small counts. What has been measured is
kept part by part in ``--results``. Exit code 1 where anything was lost.

* **kills**: writers killed (SIGKILL) after random delays, ``--kills`` in all over the kinds.
* **faults**: each call that changes files fails in turn, with EIO once and with ENOSPC from then on
  (Linux with a C compiler).
* **writers**: ``--writers`` processes with ``--saves`` saves each of one path, and a reader.
* **inputs**: ``--mutated`` mutated files through the readers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import markdown, write_report
from lorasmith.progress import bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("kills", "faults", "writers", "inputs")
KINDS = (
    "adapter",
    "adapter, two renames",
    "merged adapter",
    "fleet",
    "router",
    "fused model",
    "GGUF export",
    "checkpoint",
    "report",
)
#: Those that several may write at a time, and that have a reader or one open directory.
SHARED = ("adapter", "fleet", "router", "report", "fused model", "GGUF export")
#: Those of which a second writer is refused (``tests/training/test_one_run.py``).
ALONE = {"checkpoint": "one run at a time"}


def work(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of a part, one by one."""
    from tests.reliability import saving

    if part == "inputs":
        yield inputs(options.mutated, options.seed)
        return
    for kind in SHARED if part == "writers" else KINDS:
        yield from saving.run(
            part,
            [kind],
            count=-(-options.kills // len(KINDS)),
            number=options.writers,
            saves=options.saves,
        )


def inputs(count: int, seed: int) -> dict[str, Any]:
    """Mutated files: how many were tried, refused and read, and what did something else."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.reliability.fuzz", "--count", str(count)]
    done = subprocess.run(
        [*command, "--seed", str(seed)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    totals = re.search(r"^all\s+(\d+)\s+(\d+)\s+(\d+)", done.stdout, re.MULTILINE)
    if totals is None:
        raise RuntimeError(done.stderr[-3000:])
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    tried, refused, read = map(int, totals.groups())
    return {
        "what": "inputs",
        "kind": "mutated files",
        "tried": tried,
        "refused": refused,
        "read": read,
        "lost": "; ".join(wrong) or None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """What was done to each kind of artefact, and what was lost."""
    by = {(part, r["kind"]): r for part, records in results.items() for r in records}
    rows = []
    for kind in KINDS:
        kills, faults, shared = (by.get((part, kind)) for part in ("kills", "faults", "writers"))
        found = [r for r in (kills, faults, shared) if r is not None]
        if not found:
            continue
        lost = [r["lost"] for r in found if r["lost"]]
        rows.append(
            [
                kind,
                "–"
                if kills is None
                else _kills(kills.get("kills", 0), kills.get("during_a_save", 0)),
                "–" if faults is None else f"{faults.get('faults', 0):,}",
                ALONE.get(kind, "–")
                if shared is None
                else f"{shared.get('saves', 0):,} saves, {shared.get('reads', 0):,} reads",
                "; ".join(lost) or "nothing",
            ]
        )
    head = (
        "Artefact",
        "Killed while saving",
        "Calls that failed",
        "Many writers, a reader",
        "Lost",
    )
    rows.append(_sum(results))
    text = markdown(head, rows)
    for one in results.get("inputs", []):
        text += (
            f"\n\nInputs: {one['tried']:,} mutated files tried, {one['refused']:,} refused, "
            f"{one['read']:,} read; {one['lost'] or 'none did anything else'}."
        )
    return text


def _kills(count: int, writing: int) -> str:
    return f"{count:,} ({writing:,} with files half written)"


def _sum(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    def total(part: str, key: str) -> int:
        return sum(r.get(key, 0) for r in results.get(part, []))

    saving = [r for part in ("kills", "faults", "writers") for r in results.get(part, [])]
    lost = sum(r["lost"] is not None for r in saving)
    return [
        "**all**",
        _kills(total("kills", "kills"), total("kills", "during_a_save")),
        f"{total('faults', 'faults'):,}",
        f"{total('writers', 'saves'):,} saves, {total('writers', 'reads'):,} reads",
        f"{lost}" if lost else "nothing",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--writers", type=int, default=10)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--mutated", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/reliability.json"
    )
    parser.add_argument("--docs", type=Path, help="write the table there, and measure only --parts")
    options = parser.parse_args(arguments)
    results: dict[str, list[dict[str, Any]]] = {}
    if options.results.is_file():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    parts = options.parts or (() if options.docs else PARTS)
    console = Console(stderr=True)
    with bar(console) as progress:
        for part in parts:
            made = []
            total = {"writers": len(SHARED), "inputs": 1}.get(part, len(KINDS))
            if progress is not None:
                progress(part, 0, total)
            for record in work(part, options):
                made.append(record)
                if progress is not None:
                    progress(part, len(made), total)
                else:
                    print(json.dumps(record), file=sys.stderr, flush=True)
                results[part] = made
                options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if options.docs:
        write_report(options.docs, "saving", table(results))
    return int(any(r["lost"] for records in results.values() for r in records))


if __name__ == "__main__":
    sys.exit(main())
