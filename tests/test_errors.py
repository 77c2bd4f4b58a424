"""What is said of a library that is there and cannot be imported."""

import sys

import pytest

from nova.errors import DependencyError
from nova.media.libraries import require
from nova.motion import require_opencv
from nova.text import TextEncoder
from nova.training.engine import make_accelerator
from nova.training.text_encoder import make_text_encoder
from nova.training.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    "module, use",
    [
        ("transformers", lambda folder: TextEncoder.from_folders(folder, folder, max_length=8)),
        ("transformers", lambda folder: make_text_encoder(["a cat"], folder)),
        ("tokenizers", lambda folder: train_tokenizer(["a cat"], 257)),
        ("accelerate", lambda folder: make_accelerator(None)),
        ("cv2", lambda folder: require_opencv()),
        ("av", lambda folder: require("av.video")),
        ("PIL", lambda folder: require("PIL.Image")),
    ],
)
def test_installing_it_again_is_no_advice(tmp_path, monkeypatch, module, use):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{module}.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError) as info:
        use(tmp_path)
    message = str(info.value)
    assert "No module named 'something_else_that_is_missing'" in message
    assert "is installed but cannot be imported" in message and "pip install" not in message
