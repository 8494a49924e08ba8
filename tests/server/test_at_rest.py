"""What a server process does without while nobody uploads or trains: torch, and what comes with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server.base.tokenizer import load_tokenizer
from tests.server.base.tiny import save_tiny

# What transformers' own models need and a plain one does not.
_HEAVY_IN_ENGINE = (
    "{'sympy', 'accelerate', 'torch._dynamo', 'torch.distributed.tensor', "
    "'transformers.modeling_utils'}"
)
_HEAVY = "{'torch', 'numpy', 'numba', 'pandas', 'scipy'}"


def test_server_process_at_rest_has_no_torch() -> None:
    code = (
        "import sys, server.cli.main, server.app, server.http.uvicorn_server\n"
        f"print(sorted({_HEAVY} & set(sys.modules)))"
    )
    assert _told(code) == "[]"


def test_tokenizer_whose_files_leave_no_doubt_loads_without_torch(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path)
    code = (
        "import sys\n"
        "from server.base.tokenizer import load_tokenizer\n"
        "from server.text.tokenizer import TextTokenizer\n"
        f"text = TextTokenizer(load_tokenizer({str(tmp_path)!r}))\n"
        "print(text.encode('b a'), 'torch' in sys.modules)"
    )
    assert _told(code) == "(2, 1) False"


def test_tokenizer_is_the_one_that_transformers_chooses(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _write_tokenizer(tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_engine_on_a_plain_base_has_no_models_of_transformers(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    code = (
        "import sys\n"
        "from server.engine.config import EngineConfig\n"
        "from server.engine.process import _start\n"
        f"config = EngineConfig({str(base)!r}, '', dtype='float32', kv_bytes=1 << 20)\n"
        "engine, ready = _start(config)\n"
        "engine.close()\n"
        f"print(sorted({_HEAVY_IN_ENGINE} & set(sys.modules)))"
    )
    assert _told(code) == "[]"


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    LlamaConfig().save_pretrained(directory)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    fast.save_pretrained(directory)


def _told(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()
