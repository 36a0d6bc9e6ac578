"""Every training recipe parses against the dataclasses."""

from pathlib import Path

import pytest
import yaml

from trainer.__main__ import parse

RECIPES = [path for path in sorted(Path("recipes").glob("*.yaml")) if "student" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses(path):
    config = parse(["--config", str(path)])
    assert config.output and config.data.path


def test_overrides_reach_nested_settings():
    config = parse(["--output", "x", "--student.noise.drafts", "[1, 3]", "--optim.betas", "[0.9, 0.95]"])
    assert config.student.noise.drafts == [1, 3] and tuple(config.optim.betas) == (0.9, 0.95)
