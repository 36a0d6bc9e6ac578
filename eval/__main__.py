"""How good is the text, for how many function evaluations, against whom?

    python -m eval report --config recipes/demo_report.yaml
    python -m eval report --students STUDENTS --heldout HELDOUT --judge JUDGE --output FOLDER      all students of a folder
    python -m eval report --students STUDENTS --datasets '[HELDOUT, OTHER]' ...                    of several datasets, a plot each
    python -m eval sample --student runs/demo/students/mdlm --output runs/demo --nfe 4
    python -m eval perplexity --student runs/demo/students/mdlm --output runs/demo --nfe 4 --judge runs/demo/judge
    python -m eval reconstruct --student runs/demo/students/mdlm-gumbel --heldout runs/demo/heldout
    python -m eval chain --config recipes/demo_chain.yaml
    python -m eval truth --config recipes/demo_truth.yaml
    python -m eval ablation --config recipes/demo_ablation.yaml
    python -m eval accept --student runs/demo/students/mdlm-gumbel --teacher runs/demo/teacher --output runs/demo
    python -m eval zero-shot --student runs/demo/students/mdlm --output runs/demo --tasks arc_easy,piqa
    python -m eval judge --samples A.arrow B.arrow --tokenizer runs/demo/tokenizer --endpoint https://host/v1 --model NAME --output runs/judged

Every finished piece is a file: the same command continues where it was stopped, and is quick when all is there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.ablation import AblationConfig
from eval.chain import ChainConfig
from eval.config import AcceptConfig, PerplexityConfig, ReconstructConfig, ReportConfig, SampleConfig
from eval.llm_judge import LlmJudgeConfig
from eval.truth import TruthConfig
from eval.zero_shot import ZeroShotConfig
from noise.secrets import redacted

CONFIGS: dict[str, type] = {
    "report": ReportConfig,
    "sample": SampleConfig,
    "perplexity": PerplexityConfig,
    "reconstruct": ReconstructConfig,
    "chain": ChainConfig,
    "truth": TruthConfig,
    "ablation": AblationConfig,
    "accept": AcceptConfig,
    "zero-shot": ZeroShotConfig,
    "judge": LlmJudgeConfig,
}


def parse(arguments: list[str] | None = None) -> tuple[str, Any]:
    """(command, its config) from a recipe with dotted overrides; unknown keys end with a message and status 2."""
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    from eval import accept, llm_judge, sample_set, zero_shot

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of a description."""

    guides = {"sample": sample_set.__doc__, "accept": accept.__doc__, "zero-shot": zero_shot.__doc__, "judge": llm_judge.__doc__}
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m eval", description=__doc__, formatter_class=Formatter)
    commands = parser.add_subcommands(dest="command")
    for name, config in CONFIGS.items():
        command = ArgumentParser(description=guides.get(name, config.__doc__), formatter_class=Formatter)
        command.add_argument("--config", action="config", help="A recipe: YAML with the settings below.")
        command.add_class_arguments(config)
        commands.add_subcommand(name, command, help=(config.__doc__ or "").strip())
    parsed = parser.parse_args(_listed(sys.argv[1:] if arguments is None else arguments, "--samples"))
    settings = parser.instantiate(parsed)[parsed.command]
    settings.pop("config", None)
    return parsed.command, CONFIGS[parsed.command](**vars(settings))


def _listed(arguments: list[str], name: str) -> list[str]:
    """`NAME A B` as the list that the parser takes: NAME=["A", "B"]."""
    if name not in arguments:
        return arguments
    start = arguments.index(name) + 1
    stop = next((at for at in range(start, len(arguments)) if arguments[at].startswith("--")), len(arguments))
    if stop == start or arguments[start].startswith("["):
        return arguments
    return [*arguments[: start - 1], f"{name}={json.dumps(arguments[start:stop])}", *arguments[stop:]]


def report(config: ReportConfig) -> None:
    """Write report.json, report.html, report.md and report.png, and print the table and the verdicts; of several datasets one each, and a page."""
    from eval import several
    from eval.study import Study

    if not config.datasets:
        _report(config)
        return
    parts, folder = several.parts(config), Path(config.output)
    for part in parts:
        Study(part, show_progress=False)  # refuses what does not fit before the first of them begins
    _write_page(several.page({part.output: _report(part) for part in parts}, folder), folder)
    print(f"all datasets: {folder / 'report.html'}, {folder / 'report.md'}")


def _report(config: ReportConfig) -> dict[str, Any]:
    from eval import page, plot
    from eval.report import build
    from eval.show import show_report
    from noise.storage import write_json

    built, folder = build(config), Path(config.output)
    write_json(folder / "report.json", built)
    plot.draw(built, folder / "report.png")
    _write_page(page.blocks(built, folder / "report.png"), folder)
    show_report(built, folder)
    return built


def _write_page(blocks: list[Any], folder: Path) -> None:
    from eval import render
    from noise.storage import write_text

    write_text(folder / "report.md", render.markdown(blocks, folder))
    write_text(folder / "report.html", render.html(blocks))


def chain(config: ChainConfig) -> None:
    """Write chain.json and chain.md, and print the tables."""
    from eval import chain_page
    from eval.chain import build
    from noise.storage import write_json, write_text

    built = build(config)
    write_json(config.folder / "chain.json", built)
    write_text(config.folder / "chain.md", chain_page.markdown(built))
    chain_page.show(built)
    print(f"table: {config.folder / 'chain.md'}")


def truth(config: TruthConfig) -> None:
    """Write truth.json, truth.md and the pictures, and print the tables."""
    from eval import truth_page, truth_plot
    from eval.truth import build
    from noise.storage import write_json, write_text

    built = build(config)
    write_json(config.folder / "truth.json", built)
    pictures = truth_plot.draw(config, built, Path(config.pictures or config.output))
    write_text(config.folder / "truth.md", truth_page.markdown(built, os.path.relpath(pictures[0], config.folder)))
    truth_page.show(built)
    print(f"table: {config.folder / 'truth.md'}; pictures: {', '.join(map(str, pictures))}")


def ablation(config: AblationConfig) -> None:
    """Write ablation.json and the page of tables, and print it."""
    from eval.ablation import build, markdown
    from noise.storage import write_json, write_text

    built = build(config)
    write_json(config.folder / "ablation.json", built)
    page = markdown(config, built)
    write_text(Path(config.page or config.folder / "ablation.md"), page)
    print(page)


def accept(config: AcceptConfig) -> None:
    """Write accept.json, and print the tables."""
    from eval.accept import build
    from eval.accept_figures import show

    show(build(config))
    print(f"figures: {Path(config.output) / 'accept.json'}")


def main(arguments: list[str] | None = None) -> int:
    from eval import llm_judge, single, zero_shot

    try:
        command, config = parse(arguments)
        run: dict[str, Callable[[Any], object]] = {
            "report": report,
            "sample": single.sample_one,
            "perplexity": single.perplexity_one,
            "reconstruct": single.reconstruct_one,
            "chain": chain,
            "truth": truth,
            "ablation": ablation,
            "accept": accept,
            "zero-shot": zero_shot.zero_shot,
            "judge": llm_judge.judge,
        }
        run[command](config)
    except (ValueError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
