"""How good is the text, for how many function evaluations, against whom?

    python -m eval report --config recipes/demo_report.yaml
    python -m eval sample --student runs/demo/students/mdlm --output runs/demo --nfe 4
    python -m eval perplexity --student runs/demo/students/mdlm --output runs/demo --nfe 4 --judge runs/demo/judge
    python -m eval reconstruct --student runs/demo/students/mdlm-gumbel --heldout runs/demo/heldout
    python -m eval chain --config recipes/demo_chain.yaml

Every finished piece is a file: the same command continues where it was stopped, and is quick when all is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.chain import ChainConfig
from eval.config import PerplexityConfig, ReconstructConfig, ReportConfig, SampleConfig

CONFIGS: dict[str, type] = {
    "report": ReportConfig,
    "sample": SampleConfig,
    "perplexity": PerplexityConfig,
    "reconstruct": ReconstructConfig,
    "chain": ChainConfig,
}


def parse(arguments: list[str] | None = None) -> tuple[str, Any]:
    """(command, its config) from a recipe with dotted overrides; unknown keys end with a message and status 2."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subcommands(dest="command")
    for name, config in CONFIGS.items():
        command = ArgumentParser(description=config.__doc__)
        command.add_argument("--config", action="config", help="A recipe: YAML with the settings below.")
        command.add_class_arguments(config)
        commands.add_subcommand(name, command, help=(config.__doc__ or "").strip())
    parsed = parser.parse_args(arguments)
    settings = parser.instantiate(parsed)[parsed.command]
    settings.pop("config", None)
    return parsed.command, CONFIGS[parsed.command](**vars(settings))


def report(config: ReportConfig) -> None:
    """Write report.json, report.md and report.png, and print the table and the verdicts."""
    from eval import page, plot
    from eval.report import build
    from eval.show import show_report
    from noise.storage import write_json, write_text

    built = build(config)
    folder = Path(config.output)
    write_json(folder / "report.json", built)
    plot.draw(built, folder / "report.png")
    write_text(folder / "report.md", page.markdown(built, "report.png"))
    show_report(built, folder)


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


def main(arguments: list[str] | None = None) -> int:
    from eval import single

    try:
        command, config = parse(arguments)
        run: dict[str, Callable[[Any], None]] = {
            "report": report,
            "sample": single.sample_one,
            "perplexity": single.perplexity_one,
            "reconstruct": single.reconstruct_one,
            "chain": chain,
        }
        run[command](config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
