"""The cost model counts what the format and the teachers are, and docs/cluster.md says what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cost
from benchmarks.cost import CORPORA, TEACHERS, Config, bytes_of, price, rows_of
from noise.sketch import Codec
from pipeline.config import Packing

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "cluster.md").read_text()


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", Config().recipes)
def test_the_page_has_the_figures_of_the_command(path: str) -> None:
    row, faster = price(Config(), path), price(Config(tflops=989), path)
    cells = [
        row["recipe"],
        f"{row['positions_with_noise'] / 1e9:.2f} G",
        f"{row['bytes_a_token']:.1f}",
        f"{row['bytes'] / 1e9:,.0f} GB",
        f"{row['flops']:.1e}".replace("e+", "e"),
        f"{row['gpu_hours']:,.0f} h",
        f"{faster['gpu_hours']:.1f} h",
        f"{row['shards']:,}",
        f"{row['seconds_a_shard']:,.0f} s",
        f"{row['requests']['put']:,}",
        f"{row['requests']['get']:,}",
    ]
    assert f"| {' | '.join(cells)} |" in DOCS


def test_bytes_are_those_of_the_format() -> None:
    assert bytes_of(Codec(50_257), 1024, 1, 1023, 3.64) == pytest.approx(7 * 1024 + 28.25 + 1023 * 3 * 3.64)
    assert bytes_of(Codec(151_936), 1024, 1, 1023, 3.99) == pytest.approx(9 * 1024 + 20.125 + 1023 * 4 * 3.99)
    assert "rows (7 L + 28.25) + positions 3 kept" in DOCS and "rows (9 L + 20.125) + positions 4 kept" in DOCS


def test_wrapped_rows_hold_every_token_and_padded_ones_a_document() -> None:
    text, teacher = CORPORA["dvruette/lm1b"], TEACHERS["openai-community/gpt2"]
    wrapped = rows_of(text, Packing(block_length=128, block_end="eos", tail="drop"))
    padded = rows_of(text, Packing(block_length=128, policy="pad", block_end="eos", long_documents="cut"))
    assert wrapped[0] * 126 == pytest.approx(text.tokens + text.documents)
    assert padded == (text.documents, text.tokens + text.documents)
    sizes = [bytes_of(Codec(50_257), 128, rows, noise, 3.64) for rows, noise in (wrapped, padded)]
    flops = [rows * 128 * teacher.layer_flops(128) + noise * teacher.head_flops for rows, noise in (wrapped, padded)]
    said = f"{padded[0] / wrapped[0]:.1f} times the rows: {sizes[1] / padded[1]:.1f} bytes a token, {sizes[1] / 1e9:.0f} GB"
    assert f"{said}, and {flops[1] / flops[0]:.1f} times the FLOPs" in DOCS


@pytest.mark.parametrize("name", TEACHERS)
def test_weights_are_those_of_the_architecture(name: str) -> None:
    """Of the modules that multiply, in a model of the same shape without memory."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    teacher = TEACHERS[name]
    if "gpt2" in name:
        shape = GPT2Config(n_layer=teacher.layers, n_embd=teacher.hidden, n_head=teacher.hidden // 64)
    else:
        inner, key_value_heads = {896: (4864, 2), 1536: (8960, 2)}[teacher.hidden]
        heads = teacher.hidden // (64 if teacher.hidden == 896 else 128)
        shape = Qwen2Config(
            vocab_size=teacher.vocab_size, hidden_size=teacher.hidden, num_hidden_layers=teacher.layers, intermediate_size=inner,
            num_attention_heads=heads, num_key_value_heads=key_value_heads,
        )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    matrices = [module.weight.numel() for module in model.base_model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert sum(matrices) == teacher.layers * teacher.layer_weights
    assert 2 * model.get_output_embeddings().weight.numel() == teacher.head_flops


def encode_json(path: Path, layers: int) -> Path:
    """Figures as benchmarks.encode writes them, as far as they are read."""
    rates = [{"vocab_size": 50_257, "tokens_a_second": {"forward": 2000.0, "sketch": 1000.0}}]
    settings = {"layers": layers, "hidden": 1280, "block_length": 512}
    path.write_text(json.dumps({"settings": settings, "hardware": {"gpus": ["Some GPU"]}, "vocabularies": rates}))
    return path


def test_a_measured_rate_is_used_for_its_own_teacher_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = "recipes/owt_gpt2_large.yaml"
    config = Config(recipes=[large], rates=str(encode_json(tmp_path / "a.json", 36)), output=str(tmp_path / "cost.json"))
    cost.show(config)
    row = json.loads((tmp_path / "cost.json").read_text())["datasets"][0]
    assert row["measured"]["hours"] == pytest.approx(row["positions_with_noise"] / 1000 / 3600)
    assert "measured by benchmarks.encode on Some GPU: 1,000 tokens/s in blocks of 512" in capsys.readouterr().out
    assert price(Config(rates=str(encode_json(tmp_path / "b.json", 24))), large)["measured"] is None
    assert price(Config(rates=str(tmp_path / "absent.json")), large)["measured"] is None


def test_a_given_rate_takes_the_place_of_the_estimate() -> None:
    row = price(Config(tokens_a_second=5000, gpus=4), "recipes/owt_gpt2.yaml")
    assert row["gpu_hours"] == pytest.approx(row["positions_with_noise"] / 5000 / 3600) and row["hours"] == pytest.approx(row["gpu_hours"] / 4)


def test_other_corpora_and_unknown_ones(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("corpus: {files: 'x/*.txt'}\npacking: {block_length: 1024}\nteacher: {model: openai-community/gpt2}\n")
    assert price(Config(tokens=1e6, documents=1e3, characters=4e6), str(mine))["rows"] == pytest.approx(1.001e6 / 1023)
    with pytest.raises(ValueError, match="not known here; give tokens, documents and characters"):
        price(Config(), str(mine))
    with pytest.raises(ValueError, match="tokens is given, but not all"):
        Config(tokens=1e6)
    other = tmp_path / "other.yaml"
    other.write_text("teacher: {model: somebody/else}\n")
    with pytest.raises(ValueError, match="'somebody/else', whose size is not known here"):
        price(Config(), str(other))
    with pytest.raises(ValueError, match=r"draws were not measured here; give kept"):
        cost.measured_kept(Codec(50_257, 0.1))
