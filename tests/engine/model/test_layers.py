"""Decoders of all kinds of layers: built from what their specifications say, refused where they cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native.decoder import NativeDecoder, can_take
from engine.backends.native.library import kernels
from engine.backends.native.matrix import Kind
from engine.errors import ModelError
from engine.model.config import DecoderConfig, NormSpec, RopeSpec
from engine.model.decoder import LAYER_KINDS, Decoder
from engine.model.layers import Attention, DecoderLayer, Rotation
from engine.model.loader import load_config, load_decoder
from tests.engine.backends.native.decoders import random_decoder, wide_config
from tests.engine.tiny import CONFIG, CPU, save_tiny_model
from tests.fakes import DenseCausalAttention

IDS, POSITIONS = torch.arange(20) * 5, torch.arange(20)


def changed(config: DecoderConfig = CONFIG, only: int | None = None, **changes: Any) -> DecoderConfig:
    """The same with other fields of its layers, or of one of them, or of its attention or feed-forward."""
    layers = list(config.layers)
    for number, layer in enumerate(layers):
        for name, value in changes.items():
            if only not in (None, number):
                continue
            if hasattr(layer, name):
                layer = replace(layer, **{name: value})
            else:
                part = "attention" if hasattr(layer.attention, name) else "feed_forward"
                layer = replace(layer, **{part: replace(getattr(layer, part), **{name: value})})
        layers[number] = layer
    return replace(config, layers=tuple(layers))


def float_decoder(config: DecoderConfig) -> Decoder:
    return random_decoder(config).float()


@torch.inference_mode()
def run(decoder: Decoder, taps: tuple[int, ...] = (), positions: Tensor = POSITIONS) -> Tensor:
    hidden: Tensor = decoder(IDS, positions, DenseCausalAttention(decoder.config), taps)
    return hidden


# --- a kind of layer is one class and one line in the table


class ParallelLayer(DecoderLayer):
    """Attention and feed-forward read the same normalized row."""

    def forward(self, x: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        normed = self.input_norm(x)
        return x + self.attend(normed, rotation, attention) + self.feed_forward(normed)


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_KINDS, "parallel", ParallelLayer)


@pytest.mark.usefixtures("parallel")
def test_a_kind_of_layer_needs_a_line_in_the_table() -> None:
    decoder = float_decoder(changed(kind="parallel", only=1))
    first, second = decoder.layers
    assert type(first) is DecoderLayer and type(second) is ParallelLayer
    hidden, inner, last = run(decoder, taps=(0, 1)).chunk(3, dim=1)
    with torch.inference_mode():
        rotation = decoder.ropes[0](POSITIONS, inner.dtype)
        expected = second(inner, rotation, DenseCausalAttention(CONFIG))
        torch.testing.assert_close(last, expected)
        torch.testing.assert_close(hidden, decoder.norm(expected))
    assert not torch.allclose(hidden, run(float_decoder(CONFIG)), atol=0.1)


@pytest.mark.usefixtures("parallel")
def test_a_kind_of_layer_is_loaded_by_the_places_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path)
    config = changed(load_config(tmp_path), kind="parallel")
    monkeypatch.setattr("engine.model.loader.read_hf_config", lambda folder: config)
    decoder = load_decoder(tmp_path, torch.float32, CPU)
    assert {type(layer) for layer in decoder.layers} == {ParallelLayer}


@pytest.mark.usefixtures("parallel")
def test_the_kernels_for_cpus_leave_another_kind_to_torch() -> None:
    decoder = random_decoder(changed(wide_config(), kind="parallel"))
    assert not can_take(decoder)
    with pytest.raises(ModelError, match=r"kernels for CPUs cannot run.*layers of kind 'parallel'"):
        NativeDecoder(decoder, lambda name, weight: Kind.BF16)


# --- what cannot be run is refused by name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 100}, "a sliding window"),
        ({"softcap": 50.0}, "a softcap on attention scores"),
        ({"scale": 0.5}, "a scale on attention scores"),
        ({"sinks": True}, "attention sinks"),
        ({"norm_after": True}, "norms after"),
        ({"norm_before": False}, "layers without norms before"),
        ({"norm": NormSpec(eps=1e-5, kind="layer")}, "norms of kind 'layer'"),
        ({"kind": "mamba"}, "layers of kind 'mamba'"),
        (
            {"feed_forward": replace(CONFIG.layers[0].feed_forward, kind="relu2")},
            "feed-forward of kind 'relu2'",
        ),
    ],
)
def test_what_no_decoder_does_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"the decoder cannot run this LlamaForCausalLM: it has {message}"):
        Decoder(changed(only=1, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(wide_config(), rope=None), "layers without rotary embedding"),
        (changed(wide_config(), rope=RopeSpec(theta=5.0), only=1), "several rotary embeddings"),
        (changed(wide_config(), width=64, only=1), "several widths of feed-forward"),
        (changed(wide_config(), norm=NormSpec(eps=0.1), only=1), "several epsilons of norms"),
        (replace(wide_config(), embedding_scale=8.0), "a scale on embeddings"),
        (replace(wide_config(), logit_scale=0.5), "a scale on logits"),
        (replace(wide_config(), logit_softcap=30.0), "a softcap on logits"),
    ],
)
def test_what_the_kernels_for_cpus_do_not_do_is_refused(
    config: DecoderConfig, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = random_decoder(config)
    with caplog.at_level("INFO"):
        assert not can_take(decoder)
    assert kernels() is None or f"the kernels for CPUs lack {message}" in caplog.text
    with pytest.raises(ModelError, match=f"the kernels for CPUs cannot run.*it has {message}"):
        NativeDecoder(decoder, lambda name, weight: Kind.BF16)


def test_a_window_that_no_text_exceeds_is_none() -> None:
    Decoder(changed(window=CONFIG.max_positions))


def test_heads_that_differ_between_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="layer 1 has 4 query heads and 4 KV heads of size 16, not"):
        Decoder(changed(num_kv_heads=4, only=1))


# --- what the decoder does of what no family of today has


def test_scales_and_softcaps() -> None:
    plain = float_decoder(CONFIG)
    scaled = float_decoder(replace(CONFIG, embedding_scale=3.0, logit_scale=0.5, logit_softcap=2.0))
    hidden = run(scaled)
    plain.embedding.data *= 3
    torch.testing.assert_close(hidden, run(plain))
    with torch.inference_mode():
        expected = 2 * torch.tanh(plain.logits(hidden) * 0.5 / 2)
        torch.testing.assert_close(scaled.logits(hidden), expected)


def test_layers_rotate_by_their_own_embedding_or_not_at_all() -> None:
    other = RopeSpec(theta=50.0)
    decoder = float_decoder(changed(rope=other, only=1))
    assert decoder.config.ropes == (CONFIG.layers[0].attention.rope, other)
    _, first, second = run(decoder, taps=(0, 1)).chunk(3, dim=1)
    torch.testing.assert_close(first, run(float_decoder(CONFIG), taps=(0,))[:, CONFIG.hidden_size :])
    with torch.inference_mode():
        rotation = decoder.ropes[1](POSITIONS, first.dtype)
        expected = decoder.layers[1](first, rotation, DenseCausalAttention(CONFIG))
    torch.testing.assert_close(second, expected)

    at_one_place = torch.zeros_like(POSITIONS)  # where rotation changes nothing
    unrotated = run(float_decoder(changed(rope=None)))
    torch.testing.assert_close(unrotated, run(float_decoder(CONFIG), positions=at_one_place))


def test_feed_forward_has_the_activation_and_width_of_its_layer() -> None:
    feed_forward = replace(CONFIG.layers[0].feed_forward, kind="gelu", width=32)
    decoder = float_decoder(changed(feed_forward=feed_forward, only=1))
    layer = decoder.layers[1]
    assert isinstance(layer, DecoderLayer)
    x = torch.randn(3, CONFIG.hidden_size)
    with torch.inference_mode():
        gate, up = (x @ layer.gate_up.weight.T).split(32, dim=1)
        torch.testing.assert_close(layer.feed_forward(x), (F.gelu(gate) * up) @ layer.down.weight.T)


def test_windows_stay_with_their_layers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 100}
    content["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = load_config(tmp_path)
    assert [layer.attention.window for layer in config.layers] == [None, 100]
    assert config.max_positions == 100  # inside of the narrowest window all see everything
    (tmp_path / "config.json").write_text(json.dumps({**content, "layer_types": ["full_attention"]}))
    with pytest.raises(ModelError, match=r"layer_types.*one for each of 2 layers"):
        load_config(tmp_path)
