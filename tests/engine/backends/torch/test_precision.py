"""What auto picks, what is refused, and what becomes of each layer."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from engine.backends.torch.packing import PackedLinear
from engine.backends.torch.precision import quantize_linears, resolve_quantization
from engine.backends.torch.quantization import Int4Linear, Int8Linear
from engine.config import Quantization
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from tests.engine.tiny import CPU, tiny_config
from tests.fakes import DenseCausalAttention

ENOUGH = 1 << 30


def test_auto_leaves_other_number_formats_and_devices_alone() -> None:
    assert resolve_quantization("auto", torch.bfloat16, CPU) == "auto"
    for dtype in (torch.float32, torch.float16):
        assert resolve_quantization("auto", dtype, CPU) == "none"
    assert resolve_quantization("auto", torch.bfloat16, torch.device("cuda")) == "none"
    for device in (CPU, torch.device("cuda")):
        assert resolve_quantization("none", torch.bfloat16, device) == "none"


@pytest.mark.parametrize("asked", ["int8", "int4"])
def test_what_cannot_be_had_is_refused_with_what_to_do(
    asked: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--quantization: .*not float32.*--dtype bfloat16"):
        resolve_quantization(asked, torch.float32, CPU)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if asked == "int8":
        with pytest.raises(ConfigError, match="VNNI"):
            resolve_quantization(asked, torch.bfloat16, CPU)
    else:
        assert resolve_quantization(asked, torch.bfloat16, CPU) == "int4"


def test_gpus_have_formats_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, bfloat16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_quantization("int8", bfloat16, cuda) == "int8"
    assert resolve_quantization("fp8", bfloat16, cuda) == "fp8"
    for asked in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=r"--quantization: .*not float16.*--dtype bfloat16"):
            resolve_quantization(asked, torch.float16, cuda)
    with pytest.raises(ConfigError, match=r"--quantization: int4 runs on CPUs.*--device cpu"):
        resolve_quantization("int4", bfloat16, cuda)
    with pytest.raises(ConfigError, match=r"--quantization: fp8 runs on GPUs alone"):
        resolve_quantization("fp8", bfloat16, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"--quantization: fp8 needs a GPU of compute capability 8\.9"):
        resolve_quantization("fp8", bfloat16, cuda)


def random_decoder(**changes: int) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config(**changes))
    for name, parameter in decoder.named_parameters():
        parameter.data = torch.randn_like(parameter).mul(0.1).add("norm" in name).bfloat16()
    return decoder.eval()


def as_stored_in_4_bits(decoder: Decoder) -> Decoder:
    """The decoder with weights of 16 values for each group, ends in use."""
    for name, parameter in decoder.layers.named_parameters():
        if "norm" in name:
            continue
        codes = torch.randint(16, parameter.shape).unflatten(1, (-1, 32))
        codes[..., 0], codes[..., 1] = 0, 15
        parameter.data = ((codes - 8) * 0.0125).flatten(1).bfloat16()
    return decoder


@torch.inference_mode()
def logits(decoder: Decoder) -> Tensor:
    ids = torch.arange(20) * 5
    return decoder.logits(decoder(ids, torch.arange(20), DenseCausalAttention(decoder.config))).float()


def kinds(decoder: Decoder) -> dict[str, type[nn.Module]]:
    layer = decoder.layers[0]
    return {"lm_head": type(decoder.lm_head)} | {
        name: type(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")
    }


def test_int4_leaves_the_vocabulary_projection_in_bfloat16() -> None:
    decoder = as_stored_in_4_bits(random_decoder())
    expected = logits(decoder)
    assert quantize_linears(decoder, "int4", ENOUGH) == "int4"
    found = kinds(decoder)
    assert found.pop("lm_head") is PackedLinear and set(found.values()) == {Int4Linear}
    assert (logits(decoder) - expected).norm() < 0.02 * expected.norm()


def test_layers_whose_shape_the_operator_cannot_take_stay_in_bfloat16() -> None:
    decoder = random_decoder(hidden_size=72, intermediate_size=96)
    expected = logits(decoder)
    quantize_linears(decoder, "int4", ENOUGH)
    found = kinds(decoder)
    assert found["qkv"] is found["gate_up"] is PackedLinear  # from 72 columns
    assert found["down"] is PackedLinear and found["o"] is PackedLinear  # to 72 rows
    torch.testing.assert_close(logits(decoder), expected, rtol=0.05, atol=0.05)


def test_copies_are_made_only_where_there_is_memory() -> None:
    rich, poor = as_stored_in_4_bits(random_decoder()), as_stored_in_4_bits(random_decoder())
    poor.load_state_dict(rich.state_dict())
    quantize_linears(rich, "int4", ENOUGH)
    quantize_linears(poor, "int4", 1000)
    assert any(isinstance(m, PackedLinear) for m in rich.layers.modules())
    assert not any(isinstance(m, PackedLinear) for m in poor.layers.modules())
    torch.testing.assert_close(logits(rich), logits(poor), rtol=0.05, atol=0.05)


def test_auto_says_in_the_log_what_it_came_to_and_why(caplog: pytest.LogCaptureFixture) -> None:
    decoder = as_stored_in_4_bits(random_decoder())
    with caplog.at_level(logging.INFO):
        assert quantize_linears(decoder, "auto", ENOUGH) == "int4+bfloat16"
    assert "int4 in 8 matrices, bfloat16 in 1 matrices; each matrix has the smallest" in caplog.text
    assert "no more than 1.5 %" in caplog.text
    assert kinds(decoder)["down"] is Int4Linear


def test_auto_looks_at_each_matrix_alone_and_at_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock() -> float:
        raise AssertionError("the choice must not depend on a timing")

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(f"time.{name}", no_clock)
    found = set()
    for _ in range(3):
        decoder = as_stored_in_4_bits(random_decoder())
        down = decoder.layers[0].get_submodule("down")
        down.weight.data = torch.randn_like(down.weight)
        assert quantize_linears(decoder, "auto", ENOUGH) == "int4+bfloat16"
        found.add(tuple(kind.__name__ for kind in kinds(decoder).values()))
    assert found == {("PackedLinear", "Int4Linear", "Int4Linear", "Int4Linear", "PackedLinear")}


def test_auto_changes_no_weights_that_4_bits_do_not_hold() -> None:
    decoder = random_decoder()
    assert quantize_linears(decoder, "auto", ENOUGH) == "none"
    assert set(kinds(decoder).values()) == {PackedLinear}


def test_auto_leaves_a_machine_without_vectors_its_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert resolve_quantization("auto", torch.bfloat16, CPU) == "none"


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs AVX-512 VNNI")
def test_int8_layers() -> None:
    decoder = random_decoder()
    expected = logits(decoder)
    quantize_linears(decoder, "int8", ENOUGH)
    assert Int8Linear in kinds(decoder).values()
    assert (logits(decoder) - expected).norm() < 0.05 * expected.norm()
