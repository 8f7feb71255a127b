"""The `pdserve` command.

Owns the command line and exit statuses: 0 done, 1 could not be done here, 2 the input is wrong,
130 interrupted.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ClusterError, ConfigError, StartError
from engine.errors import ModelUnavailable

if TYPE_CHECKING:
    from cluster.placement import Node


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except ClusterError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except (OSError, ModelUnavailable) as error:
        print(f"pdserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pdserve: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdserve",
        formatter_class=_Help,
        description="Serves a language model through separate prefill and decode pools on Ray "
        "Serve.",
        epilog="examples:\n"
        "  pdserve check cluster/configs/demo.yaml    what would run where; starts nothing\n"
        "  pdserve up cluster/configs/demo.yaml       serve it on this machine until Ctrl-C\n"
        "  pdserve COMMAND --help                     more of one command",
    )
    version = f"pdserve {metadata.version('pdserve')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = _command(commands, "check", _check, "validate a config and print what would run where")
    check.description = (
        "Validates a Serve config file and prints what it would run where. Needs no GPU and starts "
        "nothing; with RAY_DASHBOARD_ADDRESS set, that cluster is asked whether a node is large "
        "enough for each replica, and if not, the exit status is 1. A wrong value gets one line "
        "that names the field and what it may be, and exit status 2."
    )
    check.epilog = (
        "examples:\n"
        "  pdserve check cluster/configs/demo.yaml\n"
        "  RAY_DASHBOARD_ADDRESS=http://127.0.0.1:8265 pdserve check my.yaml"
    )
    _add_file(check)

    serve = _command(commands, "up", _up, "serve a config on this machine until Ctrl-C")
    serve.description = (
        "Starts Ray and Serve on this machine, waits until the API can be used, and stays in the "
        "foreground. Ctrl-C ends everything it started; a second one at once."
    )
    serve.epilog = (
        "examples:\n"
        "  pdserve up cluster/configs/demo.yaml    a small chat model on two CPU cores\n"
        "  pdserve up cluster/configs/tiny.yaml    random weights; needs no network"
    )
    _add_file(serve)

    fetch = _command(commands, "fetch-model", _fetch_model, "make a built-in model ready")
    fetch.description = (
        "Makes a built-in model ready in this user's cache, as the first start would: on each "
        "node before `serve run`, so that replicas start sooner, or while there is a network."
    )
    fetch.epilog = (
        "examples:\n"
        "  pdserve fetch-model            SmolLM2-135M-Instruct: downloads 93 MB, keeps 270 MB\n"
        "  pdserve fetch-model demo       the tiny model with random weights; needs no network"
    )
    fetch.add_argument(
        "model", metavar="MODEL", nargs="?", default="smollm2", help="smollm2 (default) or demo"
    )

    demo = _command(commands, "demo-model", _demo_model, "write the small model of the demo")
    demo.description = (
        "Writes a small Llama checkpoint with random weights, the same bytes every time."
    )
    demo.epilog = (
        "examples:\n"
        "  pdserve demo-model               into this user's cache, where `model: demo` finds it\n"
        "  pdserve demo-model /tmp/model    into a folder of your choice"
    )
    demo.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, help="where to; default: the user's cache"
    )

    config = _command(
        commands, "config-reference", _config_reference, "print the table of all config fields"
    )
    config.description = "Prints a Markdown table of every field a config may have."
    _add_into(config, "docs/configuration.md")

    metrics = _command(
        commands, "metrics-reference", _metrics_reference, "print the tables of all metrics"
    )
    metrics.description = "Prints Markdown tables of every metric, with its labels and meaning."
    _add_into(metrics, "docs/metrics.md")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, formatter_class=_Help)
    parser.set_defaults(run=run)
    return parser


class _Help(argparse.HelpFormatter):
    """Fills a description, and leaves an epilog's examples in their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="a Serve config file, e.g. in cluster/configs/"
    )


def _add_into(parser: argparse.ArgumentParser, page: str) -> None:
    name = parser.prog.split()[-1]
    parser.epilog = f"examples:\n  pdserve {name}\n  pdserve {name} --into {page}"
    parser.add_argument(
        "--into", metavar="FILE", type=Path, help="write it between the markers in FILE instead"
    )


# Each command imports what it needs: Ray and vLLM take seconds.


def _check(options: argparse.Namespace) -> None:
    from cluster.check import describe
    from cluster.placement import placement_problem, replica_needs
    from cluster.serve_file import load_serve_file

    file = load_serve_file(options.file)
    nodes = seen_nodes()
    print(describe(file, nodes))
    if nodes and (problem := placement_problem(replica_needs(file.config), nodes)):
        raise StartError(problem)


def seen_nodes() -> "Sequence[Node]":
    """The nodes of the cluster that this shell talks to; none where it talks to none."""
    from cluster.nodes import known_dashboard, observe_nodes

    dashboard_url = known_dashboard()
    return observe_nodes(dashboard_url) if dashboard_url else ()


def _up(options: argparse.Namespace) -> None:
    from cluster.up import up

    up(options.file)


def _demo_model(options: argparse.Namespace) -> None:
    from engine.demo_model import write_demo_model
    from engine.models import model_folder

    folder = options.folder or model_folder("demo")
    write_demo_model(folder)
    print(f"wrote the demo model to {folder}")


def _fetch_model(options: argparse.Namespace) -> None:
    from engine.models import BUILT_IN, resolve_model

    if options.model not in BUILT_IN:
        names = " and ".join(BUILT_IN)
        raise ConfigError(f"{options.model!r} is not a built-in model; they are {names}")
    print(f"{options.model} is in {resolve_model(options.model, print)}")


def _config_reference(options: argparse.Namespace) -> None:
    from cluster.reference import CONFIG, config_reference

    _tell(options.into, CONFIG, config_reference())


def _metrics_reference(options: argparse.Namespace) -> None:
    from cluster.metrics_reference import metrics_reference
    from cluster.reference import METRICS

    _tell(options.into, METRICS, metrics_reference())


def _tell(into: Path | None, name: str, part: str) -> None:
    from cluster.reference import write_part

    if into is None:
        print(part)
    else:
        write_part(into, name, part)


if __name__ == "__main__":
    sys.exit(main())
