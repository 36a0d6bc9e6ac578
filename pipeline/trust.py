"""`inspect --trust`: one verdict, and what of it is proven, what was measured here, and what is only claimed.

proven     follows from the bytes that are here and the published root hash: nobody has to be believed
measured   was tried here, on so many random rows; holds for the rest as far as a sample does
claimed    the authors say so; nothing in the dataset can show it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.lineage import roots
from noise.storage import DatasetError
from pipeline import deep
from pipeline.config import DamageError
from pipeline.verify import Findings, examine, uncovered_in_words

HEADER = 2**16
"""Bytes of a card that are looked at for its licence."""


@dataclass
class Verdict:
    """What a person can rely on."""

    verdict: str
    proven: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    claimed: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        sections = (("proven", self.proven), ("measured", self.measured), ("claimed", self.claimed), ("damaged", self.damage))
        return "\n".join([self.verdict, *(f"  {name:<10}{line}" for name, lines in sections for line in lines)])


def judge(where: Where, processes: int | None = None, rows: int | None = None, model: str | None = None, seed: int | None = None) -> Verdict:
    """Verify everything, and run the teacher on `rows` rows where that is asked for.

    Raises DatasetError where there is no finished dataset, or no such teacher.
    """
    folder = Folder.of(where)
    try:
        found = examine(folder, processes)
    except DamageError as error:
        return Verdict(f"{folder}: DAMAGED, not to be used", damage=error.lines)
    if found.damage:
        return Verdict(f"{folder}: DAMAGED, not to be used as it is", damage=found.damage, claimed=claims(folder, found.manifest, measured=False))
    report = deep.again(folder, rows, model, seed) if rows else None
    damage = [f"{folder}: the teacher's own noise is another at {report.failures:,} positions, first: {report.first_failure}"] if report else []
    if report and report.failures:
        return Verdict(f"{folder}: WHOLE, BUT NOT WHAT IT SAYS: its noise is not this teacher's", proofs(found), measurements(report), damage=damage)
    say = (
        f"SOUND, measured on {report.rows:,} rows" if report else "SOUND as far as it can be without its teacher; --deep 100 --teacher.model asks it"
    )
    return Verdict(f"{folder}: {say}", proofs(found), measurements(report), claims(folder, found.manifest, report is not None))


def proofs(found: Findings) -> list[str]:
    """What a verification without findings has shown."""
    manifest = found.manifest
    identity, totals = manifest.identity, manifest.totals
    lines = [
        f"these {len(manifest.receipts):,} shards, {totals['bytes']:,} bytes, are those of root hash {manifest.root_hash}: "
        "compare it with where you heard of the dataset, or pin it (data.root_hash)",
        f"{totals['rows']:,} rows and {totals['tokens']:,} positions with noise, counted; ids, lengths, padding and order are in their ranges",
    ]
    if identity["extraction"] == "parallel":
        lines.append(
            f"all {totals['kept']:,} kept entries are ones that the noise stream of their shard's seed keeps, at the probabilities that they "
            "store, and none beats its token"
        )
    elif identity["extraction"] == "sequential":
        lines.append("tokens, log-probs and noise stream belong together, by the distribution that they must have")
    whole = "the manifest, card, plan and tokenizer are as they were sealed" if found.sealed else "the tokenizer's rules are the identity's"
    return [*lines, whole, *(f"but {line}" for line in uncovered_in_words(found))]


def measurements(report: Any) -> list[str]:
    if report is None:
        return ["nothing: the teacher was not asked (--deep N --teacher.model PATH)"]
    lines = ["the teacher that ran here has the weights and configuration that the identity names (sha256)", report.in_words()]
    return [*lines, f"fit of teacher and corpus: {report.fit_in_words()}"] if isinstance(report, deep.Report) and report.positions else lines


def claims(folder: Folder, manifest: Manifest, measured: bool) -> list[str]:
    """What the authors say and nothing here shows."""
    identity, environment = manifest.identity, _environment(folder)
    lines = []
    if teacher := identity.get("teacher"):
        weights = str(teacher.get("weights_sha256"))[:16] if isinstance(teacher, dict) else "?"
        named = f"the teacher's name, {_brief(environment.get('teacher'))} (weights sha256 {weights})"
        lines.append(f"{named}, and its licence: {licence(folder, 'teacher_license')}")
    if teacher and not measured:
        lines.append("that log-probs and kept entries are that teacher's, and that no entry that should have been kept is missing")
    files = sum(len(part["corpus"]["files"]) for part in roots(identity) if _has_files(part))
    if files:
        lines.append(
            f"that the text is that of {files:,} corpus files, which the identity names with their hashes; where it is from, and its licence: "
            + licence(folder, "license")
        )
    lines.append("hardware, versions and timings (environment, run.jsonl)")
    return lines


def licence(folder: Folder, field: str) -> str:
    """As the card's header has it, of the text (`license`) or the teacher (`teacher_license`)."""
    import yaml

    try:
        header = folder.read("README.md")[:HEADER].decode(errors="replace").split("---")[1]
        said = yaml.safe_load(header)
        return f"{_brief(said[field])}, the card says" if isinstance(said, dict) and said.get(field) else "not stated"
    except (OSError, IndexError, DatasetError, yaml.YAMLError, RecursionError, ValueError):
        return "not stated"


def _environment(folder: Folder) -> dict[str, Any]:
    try:
        return Plan.read(folder).environment
    except DatasetError:
        return {}


def _has_files(part: Any) -> bool:
    return isinstance(part.get("corpus"), dict) and isinstance(part["corpus"].get("files"), list)


def _brief(value: Any) -> str:
    return str(value)[:100].replace("\n", " ")
