"""Minimized networks in ONNX: onnxruntime computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sapwood.minimize import minimize
from tests.minimize.models import CASES
from tests.minimize.planting import mask_randomly
from tests.minimize.test_minimized_models import STREAMS

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's notes on its own dependencies
@pytest.mark.parametrize(
    ("name", "border"),
    [("lenet300", "table"), ("any_size_resnet", "table"), ("any_size_convnet", "ones")]
    + [(name, "table") for name in ("convnext", "vit", "small_gpt")],
)
def test_onnx(name: str, border: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.make(0, torch.float32)
    mask_randomly(model, 0)
    if name in STREAMS:
        STREAMS[name][0](model)
    x = case.inputs(2)
    x = x.float() if x.is_floating_point() else x
    small, report = minimize(model, x, border=border)
    assert report.plan.edits
    torch.onnx.export(small, (x,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(x), rtol=1e-4, atol=1e-5)
