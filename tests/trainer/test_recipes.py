"""Every training recipe parses, has a student whose shapes fit, and differs from its twin in the one thing that it is about."""

from __future__ import annotations

import copy
import functools
import re
import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from noise.identity import differences
from trainer import flops
from trainer.__main__ import parse
from trainer.config import NoiseConfig, TrainConfig
from trainer.estimate import positions
from trainer.recipe import recipe_of
from trainer.students import build

FILES = sorted(Path("recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if "student" in yaml.safe_load(path.read_text()) and "judge" not in yaml.safe_load(path.read_text())]
PAPER = [path for path in RECIPES if path.parent.name == "paper"]
MEDUSA = [path for path in RECIPES if path.stem.startswith("medusa_")]
VOCABULARY = 50_257
INPUT = {"student.noise.kind", "student.noise.input"}
PARTS = INPUT | {f"student.noise.{name}" for name in ("projection", "prior", "readout", "drafts")}
RESTART = {"student.noise.draft_restart"}
BLOCKS = {"student.kind", "student.block_size", "student.clip_search"}
TWINS = [
    *((corpus, "mdlm", row, changed) for corpus in ("lm1b", "owt") for row, changed in (
        ("mdlm_gumbel", INPUT),
        ("mdlm_all", PARTS | RESTART | {"student.noise.stream"}),
        ("bd3lm_stage1", {"optim.steps"}),
        ("ar", {"student.kind", "student.backbone"}),
    )),
    *((corpus, "bd3lm", row, changed) for corpus in ("lm1b", "owt") for row, changed in (
        ("bd3lm_gumbel", INPUT),
        ("bd3lm_stage1", BLOCKS | {"student.init_from", "optim.steps", "eval_every", "eval_rows"}),
    )),
    *(("lm1b", "mdlm_gumbel", f"mdlm_{kind}", {"student.noise.kind"}) for kind in ("gaussian", "uniform", "independent")),
    ("lm1b", "mdlm_gumbel", "mdlm_sequential", {"data.path", "data.heldout"}),
    ("lm1b", "mdlm", "sequence_kd", {"data.path", "data.heldout"}),
    ("lm1b", "mdlm", "token_kd", {"student.objective.nelbo", "student.objective.token_kd"}),
]  # fmt: skip
DEMO_TWINS = [
    ("mdlm", "mdlm_gumbel", PARTS | RESTART),
    ("mdlm_gumbel", "mdlm_independent", {"student.noise.kind"}),
    ("bd3lm", "bd3lm_gumbel", PARTS | RESTART),
    ("mdlm", "token_kd", {"student.objective.nelbo", "student.objective.token_kd"}),
    ("mdlm", "sequence_kd", {"data.path", "data.heldout"}),
    ("mdlm", "ar", {"student.kind", "student.shift", "student.init_from"}),
    ("medusa", "medusa_gumbel", PARTS),
    ("mtp", "mtp_gumbel", PARTS | RESTART),
]
MEDUSA_TWINS = [
    ("_none", "_input", INPUT),
    ("_none", "", PARTS | {"student.noise.stream"}),
]


@functools.cache
def read(path: Path | str) -> TrainConfig:
    return parse(["--config", str(path)])


def of(corpus: str, row: str) -> TrainConfig:
    return read(f"recipes/paper/{corpus}_{row}.yaml")


def settings(config: TrainConfig) -> dict[str, Any]:
    """All that decides a run's numbers, and its data."""
    return recipe_of(config) | {"data": asdict(config.data)}


def changed(one: TrainConfig, other: TrainConfig) -> set[str]:
    return {re.split(r"[:\s]", line)[0] for line in differences(settings(one), settings(other))}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses(path: Path) -> None:
    config = read(path)
    assert config.output and config.data.path


def test_overrides_reach_nested_settings() -> None:
    config = parse(["--output", "x", "--student.noise.drafts", "[1, 3]", "--optim.betas", "[0.9, 0.95]"])
    assert config.student.noise.drafts == [1, 3] and tuple(config.optim.betas) == (0.9, 0.95)


@pytest.mark.parametrize("kind", ["mdlm", "bd3lm", "mtp", "medusa"])
def test_one_flag_gives_a_recipe_without_noise_what_the_recipe_with_all_parts_names(kind: str) -> None:
    given = parse(["--config", f"recipes/demo_{kind}.yaml", "--student.noise.kind", "gumbel"])
    assert given.student.noise == read(f"recipes/demo_{kind}_gumbel.yaml").student.noise
    deeper = parse(["--config", "recipes/demo_mdlm.yaml", "--student.noise.kind", "gumbel", "--student.layers", "12"])
    assert deeper.student.noise.drafts == [6]


@pytest.mark.parametrize(
    "off", [["readout", "false"], ["drafts", "[]"], ["projection", "own"], ["input", "none"], ["draft_restart", "false"]], ids=str
)
def test_parts_that_are_only_switched_off_beside_a_kind_are_refused(off: list[str]) -> None:
    override = [f"--student.noise.{off[0]}", off[1]]
    with pytest.raises(ValueError, match=f"student.noise.{off[0]} .* switch parts of the noise off"):
        parse(["--config", "recipes/demo_mdlm.yaml", "--student.noise.kind", "gumbel", *override])
    assert parse(["--config", "recipes/demo_mdlm_gumbel.yaml", *override]).student.noise.kind == "gumbel", "some that are on are named there"
    assert parse(["--config", "recipes/demo_mdlm.yaml", *override]).student.noise == NoiseConfig()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_recipe_has_the_published_set_up(path: Path) -> None:
    config = read(path)
    student, optim = config.student, config.optim
    assert (student.layers, student.hidden, student.heads, student.dropout, student.tied) == (12, 768, 12, 0.1, True)
    assert (optim.global_batch, optim.lr, optim.betas, optim.weight_decay, optim.warmup) == (512, 3e-4, (0.9, 0.999), 0.0, 2500)
    assert (optim.schedule, optim.clip, optim.ema, config.precision) == ("constant", 1.0, 0.9999, "bfloat16")
    stage_one, stage_two = path.stem.endswith("stage1"), student.kind == "bd3lm"
    assert optim.steps == (850_000 if stage_one else 150_000 if stage_two else 1_000_000)
    if stage_two:
        assert student.block_size == 4 and student.init_from == of(path.stem.split("_")[0], "bd3lm_stage1").output


def length_of(path: Path) -> int:
    return 128 if path.stem.startswith("lm1b") else 1024


def shape_of(path: Path) -> tuple[object, ...]:
    """What tells a student's shapes apart from those of other rows."""
    student = read(path).student
    return length_of(path), student.kind, student.noise.input, student.noise.projection, student.noise.readout, tuple(student.noise.drafts)


@pytest.mark.parametrize("path", {shape_of(path): path for path in PAPER}.values(), ids=lambda path: path.stem)
def test_paper_recipe_fits_on_the_meta_device_and_costs_what_the_estimate_says(path: Path) -> None:
    """Its student at full size, forward over one row, without a byte of weights."""
    student, length = copy.deepcopy(read(path).student), length_of(path)
    if student.noise.kind != "none":
        student.noise.kind = "gumbel"  # another marginal has the same shapes, and looks at numbers
    slots, _, most = positions(student, length)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made = build(student, VOCABULARY, length)
        ids_BM = torch.empty(1, slots, dtype=torch.int64)
        if student.kind == "ar":
            logits_NV = made.logits(ids_BM)[0]
        else:
            g_NV = torch.empty(most, VOCABULARY) if student.noise.kind != "none" else None
            mask = torch.empty(slots, slots, dtype=torch.bool)
            logits_NV, _ = made.through(ids_BM, torch.empty(most, dtype=torch.int64), g_NV, made.model.rotary(slots), mask)
    assert logits_NV.shape == (most, VOCABULARY)
    assert counter.get_total_flops() == flops.forward(student, VOCABULARY, slots, most)


@pytest.mark.parametrize(("corpus", "row", "twin", "what"), TWINS, ids=lambda part: part if isinstance(part, str) else "")
def test_paper_twins_differ_in_one_thing(corpus: str, row: str, twin: str, what: set[str]) -> None:
    assert changed(of(corpus, row), of(corpus, twin)) == what


@pytest.mark.parametrize(("row", "twin", "what"), DEMO_TWINS, ids=lambda part: part if isinstance(part, str) else "")
def test_demo_twins_differ_in_one_thing(row: str, twin: str, what: set[str]) -> None:
    assert changed(read(f"recipes/demo_{row}.yaml"), read(f"recipes/demo_{twin}.yaml")) == what


@pytest.mark.parametrize("backbone", ["gpt2", "vicuna_7b"])
@pytest.mark.parametrize(("row", "twin", "what"), MEDUSA_TWINS, ids=lambda part: part if isinstance(part, str) else "")
def test_medusa_twins_differ_in_one_thing(backbone: str, row: str, twin: str, what: set[str]) -> None:
    assert changed(read(f"recipes/medusa_{backbone}{row}.yaml"), read(f"recipes/medusa_{backbone}{twin}.yaml")) == what


def test_no_two_recipes_write_to_the_same_folder() -> None:
    of = Counter(Path(yaml.safe_load(path.read_text())["output"]) for path in FILES)
    assert [str(folder) for folder, recipes in of.items() if recipes > 1] == []


@pytest.mark.parametrize("path", [*PAPER, *MEDUSA], ids=lambda path: path.stem)
def test_the_commands_in_a_paper_recipes_head_parse(path: Path) -> None:
    head = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    own = next(line for line in head if "-m trainer" in line)
    assert own.endswith(f"--config {path}")
    for options in re.findall(r"(?:^|   )(--student\.[^#]*?)(?=$|   )", "\n".join(head).replace("\n--", " --"), re.MULTILINE):
        parse(["--config", str(path), *shlex.split(options)])
