"""What a person with a GPU runs first, here on a CPU, which agrees with itself."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_part_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    output = tmp_path / "first.json"
    program = importlib.import_module("first_gpu")
    program.main(["--device", "cpu", "--quick", "--output", str(output)])
    result = json.loads(output.read_text())
    assert not [name for name, value in result.items() if "Error" in str(value)]
    equal = result["agreement fp32"]
    assert equal["groups"] == equal["labels"] == 1.0
    assert all(equal[name] == 0 for name in ("teacher", "total", "gradient"))
    rounded = result["agreement bf16"]
    assert 0 < rounded["gradient"] < 0.1 and rounded["groups"] > 0.8
    assert result["waits"] == "none" and all(result["repeats"].values())
    assert result["step segformer_nano, 2 crops"]["ms"] > 0
