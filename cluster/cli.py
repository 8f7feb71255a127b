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
        description="Serves a language model through separate prefill and decode pools on Ray "
        "Serve.",
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
    _add_file(check)

    serve = _command(commands, "up", _up, "serve a config on this machine until Ctrl-C")
    serve.description = (
        "Starts Ray and Serve on this machine, waits until the API can be used, and stays in the "
        "foreground. Ctrl-C ends everything it started; a second one at once."
    )
    _add_file(serve)

    fetch = _command(commands, "fetch-model", _fetch_model, "make a built-in model ready")
    fetch.formatter_class = argparse.RawDescriptionHelpFormatter
    fetch.description = (
        "Makes a built-in model ready in this user's cache, as the first start would: on each "
        "node before\n`serve run`, so that replicas start sooner, or while there is a network."
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
    demo.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, help="where to; default: the user's cache"
    )

    reference = _command(
        commands, "config-reference", _config_reference, "print the table of all config fields"
    )
    reference.description = "Prints a Markdown table of every field a config may have."
    reference.add_argument(
        "--into", metavar="FILE", type=Path, help="write it between the markers in FILE instead"
    )
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary)
    parser.set_defaults(run=run)
    return parser


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="a Serve config file, e.g. in cluster/configs/"
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
    from cluster.reference import config_reference, write_reference

    if options.into is None:
        print(config_reference())
    else:
        write_reference(options.into)


if __name__ == "__main__":
    sys.exit(main())
