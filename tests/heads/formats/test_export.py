"""What is exported has the keys the other project reads, and comes back as the heads it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heads.base import ProjectionKind
from heads.errors import HeadsError
from heads.formats.export import FORMATS, export_heads
from heads.formats.load import load_foreign
from heads.hydra import HydraHeads
from heads.medusa import MedusaHeads
from heads.prefix import PrefixLayer
from tests.heads.formats.checkpoints import HEADS, HIDDEN, TOKEN_MAP, VOCAB, base_lm_head


def random_heads(
    layers: int = 2,
    token_map: Tensor | None = None,
    projection: ProjectionKind = "shared",
    root_input: bool = False,
) -> MedusaHeads:
    """In bfloat16, like a set that was stored in it."""
    torch.manual_seed(0)
    rank = 4 if projection == "low_rank" else 0
    module = MedusaHeads(HEADS, layers, HIDDEN, VOCAB, token_map, projection, rank, root_input)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.25)
    return module.bfloat16().requires_grad_(False)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("projection", ["shared", "own"])
@pytest.mark.parametrize(
    ("format_name", "token_map"),
    [("medusa", None), ("tgi", None), ("vllm", None), ("vllm", TOKEN_MAP)],
)
def test_what_goes_out_comes_back(
    tmp_path: Path, format_name: str, token_map: Tensor | None, projection: ProjectionKind, layers: int
) -> None:
    module = random_heads(layers, token_map, projection)
    export_heads(format_name, module, "base", base_lm_head(), tmp_path)
    foreign = load_foreign(tmp_path, base_lm_head())
    assert foreign.warnings == ()
    assert foreign.dtype == torch.bfloat16
    state, expected = foreign.module.state_dict(), module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


def test_medusa_is_one_pickle_of_tensors_with_every_projection(tmp_path: Path) -> None:
    path = export_heads("medusa", random_heads(), "org/base", base_lm_head(), tmp_path)
    assert path == tmp_path / "medusa_lm_head.pt"
    tensors = torch.load(path, weights_only=True)
    expected = {f"{i}.{j}.linear.{kind}" for i in range(HEADS) for j in (0, 1) for kind in ("weight", "bias")}
    assert tensors.keys() == expected | {f"{i}.2.weight" for i in range(HEADS)}
    assert torch.equal(tensors["4.2.weight"], base_lm_head().bfloat16())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "base_model_name_or_path": "org/base",
        "medusa_num_heads": HEADS,
        "medusa_num_layers": 2,
    }


class ResBlock(nn.Module):
    """The paper's block as a module: its parameters have the names that Medusa's code gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


def test_modules_built_as_medusa_builds_them_take_the_file_whole(tmp_path: Path) -> None:
    module = random_heads().float()
    path = export_heads("medusa", module, "base", base_lm_head(), tmp_path)
    theirs = nn.ModuleList(
        nn.Sequential(ResBlock(), ResBlock(), nn.Linear(HIDDEN, VOCAB, bias=False)) for _ in range(HEADS)
    )
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    hidden = torch.randn(3, HIDDEN)
    module.bind(base_lm_head(), base_lm_head())
    logits = module.logits(hidden, torch.arange(3), HEADS)
    for head, answer in zip(theirs, logits, strict=True):
        torch.testing.assert_close(head(hidden), answer)


@pytest.mark.parametrize(("layers", "shares"), [(1, True), (2, False)])
def test_tgi_shares_the_projection_where_it_reads_that(tmp_path: Path, layers: int, shares: bool) -> None:
    path = export_heads("tgi", random_heads(layers), "base", base_lm_head(), tmp_path)
    assert path.name == "medusa_lm_head.safetensors"
    tensors = load_file(path)
    assert (f"0.{layers}.weight" not in tensors) == shares
    assert ("version" in json.loads((tmp_path / "config.json").read_text())) == shares


def test_vllm_is_told_of_biases_and_writes_a_shared_projection_once(tmp_path: Path) -> None:
    path = export_heads("vllm", random_heads(1, TOKEN_MAP), "base", base_lm_head(), tmp_path)
    tensors = load_file(path)
    blocks = {f"blocks.{i}.layers.0.{kind}" for i in range(HEADS) for kind in ("weight", "bias")}
    assert tensors.keys() == blocks | {"lm_heads.0.weight", "token_map"}
    assert torch.equal(tensors["lm_heads.0.weight"], base_lm_head()[TOKEN_MAP].bfloat16())
    config = json.loads((tmp_path / "config.json").read_text())
    facts = {"num_heads": HEADS, "num_hidden_layers": 1, "vocab_size": VOCAB, "hidden_size": HIDDEN}
    facts |= {"truncated_vocab_size": 6, "medusa_fc_bias": True, "original_lm_head": True}
    assert {name: config[name] for name in facts} == facts


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_root_input_fits_no_format(tmp_path: Path, format_name: str) -> None:
    with pytest.raises(
        HeadsError, match=f"the {format_name} format has no heads that see the committed root"
    ):
        export_heads(format_name, random_heads(root_input=True), "base", base_lm_head(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_name", ["medusa", "tgi"])
def test_a_token_map_fits_vllm_only(tmp_path: Path, format_name: str) -> None:
    with pytest.raises(HeadsError, match=r"no token map.*export to vllm"):
        export_heads(format_name, random_heads(1, TOKEN_MAP), "base", base_lm_head(), tmp_path)


def test_an_unknown_format_and_another_base(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="'eagle' is not known; there are medusa, tgi, vllm"):
        export_heads("eagle", random_heads(), "base", base_lm_head(), tmp_path)
    with pytest.raises(HeadsError, match="40 tokens by 16; this one has 41 by 16"):
        export_heads("tgi", random_heads(), "base", torch.zeros(VOCAB + 1, HIDDEN), tmp_path)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_projection_of_low_rank_is_multiplied_out(tmp_path: Path, format_name: str) -> None:
    module = random_heads(projection="low_rank").float()
    export_heads(format_name, module, "base", base_lm_head(), tmp_path)
    theirs = load_foreign(tmp_path, base_lm_head()).module
    hidden, roots = torch.randn(3, HIDDEN), torch.arange(3)
    for heads in (module, theirs):
        heads.bind(base_lm_head(), base_lm_head())
    torch.testing.assert_close(theirs.logits(hidden, roots, HEADS), module.logits(hidden, roots, HEADS))


def test_heads_that_see_their_path_fit_no_format(tmp_path: Path) -> None:
    module = HydraHeads(HEADS, VOCAB, PrefixLayer(HIDDEN, 2, 1, 8, 24))
    with pytest.raises(HeadsError, match="the vllm format holds Medusa heads only, no hydra heads"):
        export_heads("vllm", module, "base", base_lm_head(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_stay_in_the_precision_they_were_stored_in(tmp_path: Path, dtype: torch.dtype) -> None:
    path = export_heads("tgi", random_heads().to(dtype), "base", base_lm_head(), tmp_path)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
