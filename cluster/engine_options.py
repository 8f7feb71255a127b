"""Which engine options vLLM has, and whether it would take their values.

Owns the comparison of a config's `engine` and `router.frontend` sections with vLLM's own arguments;
it needs vLLM, but no GPU. vLLM takes seconds to import, so nothing here does before it must.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.parsing import did_you_mean, shown
from kvtransfer.phase import PHASES


def check_engine_options(config: ClusterConfig, *, whole: bool = False) -> None:
    """Refuses options that vLLM does not have, and values that it would not take.

    With `whole`, vLLM is also asked about all options of an engine beside its model, where it can
    be: that takes a few seconds more, and where it starts, vLLM does it anyway.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    sections = {
        "engine": config.engine,
        **{f"{name}.engine": config.pool(name).engine for name in PHASES},
    }
    if not (config.router.frontend or any(sections.values())):
        return  # spares the seconds that importing vLLM takes
    with _leaving_no_trace():
        _import_plugins(config)
        for section, options in sections.items():
            _check_section(section, options)
        _check_together(config)
        _check_drafts(config)
        if whole:
            from cluster.engine_config import check_whole_engines

            check_whole_engines(config)


def _import_plugins(config: ClusterConfig) -> None:
    from cluster.frontend_options import import_plugins

    import_plugins(config.router.frontend, config.pool_engine("decode"))


def _check_together(config: ClusterConfig) -> None:
    from cluster.engine_values import check_together
    from cluster.frontend_options import check_frontend

    for name in PHASES:
        check_together(f"{name}.engine", config.pool_engine(name))
    check_frontend(config.router.frontend, config.pool_engine("decode"))


def _check_drafts(config: ClusterConfig) -> None:
    for name in PHASES:
        if not config.pool(name).gpus and config.pool_engine(name).get("speculative_config"):
            raise ConfigError(
                f"{name}.engine.speculative_config: is for pools on GPUs; vLLM's build for CPUs "
                "ends with the first sampled request that it checks a draft for"
            )


@contextlib.contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """vLLM and torch log and warn while they are asked, and set environment variables for engines.

    The answer is one line, or a report; and Ray and its workers inherit the environment.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with mock.patch.dict(os.environ), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_section(section: str, options: Mapping[str, Any]) -> None:
    from cluster.engine_values import check_value
    from engine.arguments import option_types

    known = option_types()
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), known)
            raise ConfigError(f"{section}.{shown(name)}: vLLM has no such engine option; {hint}")
        check_value(section, name, value, known[name])
