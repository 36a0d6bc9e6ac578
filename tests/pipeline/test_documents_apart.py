"""Documents of one row that the teacher reads apart: each has the log-probs that it has alone."""

from pathlib import Path

import pytest
import torch

from noise.dataset import Manifest
from noise.storage import DatasetError
from pipeline import config
from pipeline.extract import Job
from pipeline.inspect import in_words
from pipeline.plan import documents_apart, make_plan, write_plan
from pipeline.teacher import Teacher
from pipeline.verify import verify
from pipeline.worker import Worker
from tests.pipeline.world import World, save_teacher

VOCAB, BOS, EOS = 90, 0, 1


def save(folder: Path, kind: str) -> str:
    """A tiny model whose tokens depend on each other strongly."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "llama": lambda: transformers.LlamaConfig(**common, initializer_range=0.5),
        "mistral": lambda: transformers.MistralConfig(**common, num_key_value_heads=2, sliding_window=4, initializer_range=0.5),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5),
        "mamba": lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, initializer_range=0.5),
    }[kind]()
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(str(folder))
    return str(folder)


DOCUMENTS = [[5, 6, 7, 8, 9, 10], [11], [], [12, 13, 14, 15, 16, 17, 18]]
ROW = [BOS, *DOCUMENTS[0], EOS, *DOCUMENTS[1], EOS, EOS, *DOCUMENTS[3], EOS, 20, 21]


def log_probs(teacher: Teacher, rows: list[list[int]]) -> torch.Tensor:
    """float32 [B, L - 1]: of each row's tokens from the second on."""
    ids_BL = torch.tensor(rows)
    at_BL = torch.arange(ids_BL.numel()).reshape(ids_BL.shape)[:, :-1]
    log_probs_NV = torch.cat([part for _, part in teacher.log_probs(ids_BL, at_BL.flatten())])
    return log_probs_NV.gather(1, ids_BL[:, 1:].flatten()[:, None]).reshape(at_BL.shape)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("bos", [BOS, EOS])
def test_each_document_of_a_row_has_the_log_probs_it_has_alone(tmp_path: Path, kind: str, attention: str, bos: int) -> None:
    recipe = config.Teacher(model=save(tmp_path / kind, kind), attention=attention)
    apart, across = Teacher(recipe, VOCAB, apart=(EOS, bos)), Teacher(recipe, VOCAB)
    row = [bos, *ROW[1:]]
    found = log_probs(apart, [row, row[::-1]])[0]  # beside a row that is cut elsewhere
    alone = [log_probs(across, [[bos, *document, EOS]])[0] for document in DOCUMENTS] + [log_probs(across, [[bos, 20, 21]])[0]]
    assert torch.allclose(found, torch.cat(alone), atol=1e-4)
    together = log_probs(across, [row])[0]
    assert torch.allclose(together[:7], found[:7], atol=1e-4) and not torch.allclose(together[7:], found[7:], atol=0.1)


def test_a_teacher_that_cannot_is_refused(tmp_path: Path) -> None:
    recipe = config.Teacher(model=save(tmp_path / "mamba", "mamba"), attention="eager")
    with pytest.raises(DatasetError, match=r"MambaForCausalLM.* does not keep the documents of a row apart .*attention_across_documents to true"):
        Teacher(recipe, VOCAB, apart=(EOS, BOS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("apart"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher")
    return made


def job(world: World, name: str, **changes: object) -> Job:
    recipe = world.recipe(output=world.root / name, teacher__model=world.root / "teacher", **changes)
    plan, corpus, tokenizer = make_plan(recipe)
    standing = write_plan(recipe, plan, tokenizer)
    return Job(
        Path(recipe.output), standing, corpus, tokenizer, Teacher(recipe.teacher, plan.identity["vocab_size"], apart=documents_apart(plan.identity))
    )


def test_a_dataset_says_how_its_documents_were_read_and_workers_read_them_so(world: World) -> None:
    apart, across = (job(world, name, packing__attention_across_documents=cut) for name, cut in (("apart", "false"), ("across", "true")))
    rule = {"attention_across_documents": False, "positions_restart": True, "documents_begin_with": "bos"}
    assert rule.items() <= apart.plan.identity["teacher"].items() and across.plan.identity["teacher"]["attention_across_documents"]
    receipts = [apart.extract(shard) for shard in range(len(apart.plan.shards))]
    assert receipts[0].nll_sum != across.extract(0).nll_sum
    Manifest.write(apart.folder, apart.plan)
    verify(apart.folder)
    assert "documents read apart" in in_words(apart.folder)
    (apart.folder / "shards" / "00000.json").unlink()
    recipe = world.recipe(output=apart.folder, teacher__model=world.root / "teacher", packing__attention_across_documents="false")
    worker = Worker(recipe, apart.corpus.roots)
    assert not worker.load().failure and worker.extract(0).receipt == receipts[0]


@pytest.mark.parametrize(
    ("rule", "dropped", "layout"),
    [
        ({"policy": "pad"}, False, "packing pad, long documents split"),
        ({"policy": "pad", "long_documents": "cut", "block_end": "eos"}, True, "packing pad, long documents cut, every block ends in EOS"),
        ({"block_end": "eos", "tail": "drop"}, True, "packing concat, every block ends in EOS, the last block of a shard dropped"),
    ],
)
def test_what_packing_leaves_out_is_in_the_receipts_and_the_totals(world: World, rule: dict[str, str], dropped: bool, layout: str) -> None:
    made = job(world, "-".join(rule.values()), **{f"packing.{name}": value for name, value in rule.items()})
    receipts = [made.extract(shard) for shard in range(len(made.plan.shards))]
    manifest = Manifest.write(made.folder, made.plan)
    assert verify(made.folder) == manifest == Manifest.read(made.folder)
    assert manifest.totals.get("tokens_dropped", 0) == sum(receipt.tokens_dropped for receipt in receipts)
    assert ("tokens_dropped" in manifest.totals) == dropped == ("left out by packing" in in_words(made.folder)) and layout in in_words(made.folder)
    documents = [document for shard in range(len(made.plan.shards)) for document in made.documents(shard)]
    tokens = sum(map(len, made.tokens(documents)))
    eos_of_blocks = sum(receipt.rows for receipt in receipts) if "block_end" in rule else 0
    eos_of_documents = 0 if rule == {"policy": "pad", "long_documents": "cut", "block_end": "eos"} else len(documents)
    assert manifest.totals["tokens"] - eos_of_blocks + manifest.totals.get("tokens_dropped", 0) == tokens + eos_of_documents
    assert manifest.totals["characters_in"] == sum(len(document.text) for document in documents)
