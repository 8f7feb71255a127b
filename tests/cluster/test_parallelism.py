"""Which parallelism goes together, and the reason where it does not."""

import pytest

from cluster.config import parse_args
from cluster.errors import ConfigError
from cluster.parallelism import Parallelism, transfer_problem


@pytest.mark.parametrize(
    ("connector", "prefill", "decode", "reason"),
    [
        pytest.param("nixl", (1, 1), (1, 1), None, id="one rank each"),
        pytest.param("nixl", (4, 1), (2, 1), None, id="decode reads two ranks"),
        pytest.param("nixl", (2, 1), (8, 1), None, id="four ranks read one"),
        pytest.param("nixl", (2, 1), (3, 1), "one must be a multiple", id="broken heads"),
        pytest.param("nixl", (6, 1), (4, 1), "one must be a multiple", id="no multiple"),
        pytest.param("nixl", (1, 2), (1, 1), "prefill.engine.pipeline", id="prefill stages"),
        pytest.param("nixl", (1, 2), (1, 2), "prefill.engine.pipeline", id="stages on both"),
        pytest.param("nixl", (1, 1), (1, 2), "decode.engine.pipeline", id="decode stages"),
        pytest.param("nccl", (2, 2), (2, 2), None, id="rank by rank"),
        pytest.param("nccl", (2, 1), (1, 1), "engine.tensor_parallel_size: 2", id="nccl ranks"),
        pytest.param("nccl", (1, 1), (1, 2), "engine.pipeline_parallel_size: 1", id="nccl stages"),
    ],
)
def test_transfer_problem(
    connector: str, prefill: tuple[int, int], decode: tuple[int, int], reason: str | None
) -> None:
    sides = [Parallelism(tensor=tensor, pipeline=stages) for tensor, stages in (prefill, decode)]
    problem = transfer_problem(connector, prefill=sides[0], decode=sides[1])
    if reason is None:
        assert problem is None
    else:
        assert problem is not None
        assert reason in problem


@pytest.mark.parametrize(
    ("connector", "line"),
    [
        ("nixl", "engine.tensor_parallel_size: 2 in prefill and 3 in decode; one must be"),
        ("nccl", "engine.tensor_parallel_size: 2 in prefill and 3 in decode must be the same"),
    ],
)
def test_a_config_is_refused_with_the_reason(connector: str, line: str) -> None:
    args = {
        "transfer": {"connector": connector},
        "prefill": {"engine": {"tensor_parallel_size": 2}},
        "decode": {"engine": {"tensor_parallel_size": 3}},
    }
    with pytest.raises(ConfigError, match=line):
        parse_args(args)


def test_other_parallelism_on_each_side_is_taken() -> None:
    config = parse_args({"prefill": {"engine": {"tensor_parallel_size": 4}}})
    assert config.parallelism("prefill") == Parallelism(tensor=4, pipeline=1)
    assert config.num_ranks("decode") == 1
