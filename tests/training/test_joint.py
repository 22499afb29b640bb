"""Joint training: it learns, only answers count, broken runs end like unbroken ones, the result serves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="needs gorgon-serve[train]")
from accelerate import Accelerator

from cli.main import main
from engine.model.loader import load_decoder
from engine.text.tokenizer import load_chat_tokenizer
from heads.base import DraftHeads, ProjectionKind
from heads.checkpoint import load_heads
from heads.hydra import HydraHeads, PrefixLayer
from heads.medusa import MedusaHeads
from tests.training.tiny_checkpoint import EOS, VOCAB, counting_documents, save_checkpoint, save_text
from training.backbone import Backbone, JointTrainingError, load_model
from training.conversations import make_batch
from training.dataset import Document
from training.document_rows import DenseCausalAttention
from training.joint import JointConfig, JointModel, JointTrainer
from training.joint_losses import distillation_loss
from trees.family import TreeFamily

CONFIG = JointConfig(
    lm_loss="ce", heads_first_steps=6, epochs=2, batch=8, accumulate=2, lr=5e-3, warmup=3, checkpoint_every=5
)
HEADS = 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), tied=request.param)


def backbone_of(checkpoint: Path, *, lora: bool = True, **options: Any) -> Backbone:
    torch.manual_seed(1)
    return Backbone(load_model(checkpoint, torch.float32), lora=lora, **options)


def fresh_heads(token_map: Tensor | None = None) -> MedusaHeads:
    return MedusaHeads(HEADS, 1, 32, VOCAB, token_map, root_input=True)


def trainer_of(
    checkpoint: Path, out: Path, config: JointConfig = CONFIG, *, lora: bool = True, **options: Any
) -> JointTrainer:
    backbone = backbone_of(checkpoint, lora=lora, **options)
    return JointTrainer(config, counting_documents(80), backbone, fresh_heads(), out, Accelerator(cpu=True))


def losses(directory: Path) -> list[list[float]]:
    rows = (directory / "log.csv").read_text().splitlines()[1:]
    return [[float(x) for x in row.split(",")[1 : 2 + HEADS]] for row in rows]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_both_losses_fall(checkpoint: Path, tmp_path: Path, lora: bool) -> None:
    config = dataclasses.replace(CONFIG, epochs=6, full=not lora)
    trainer_of(checkpoint, tmp_path, config, lora=lora).run()
    rows = losses(tmp_path)
    assert all(row[0] == 0 for row in rows[: config.heads_first_steps])
    joint = rows[config.heads_first_steps :]
    first, last = (torch.tensor(part).mean(dim=0) for part in (joint[:4], joint[-4:]))
    assert (last < 0.7 * first).all()


def test_the_warm_up_of_the_heads_leaves_the_backbone_alone(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(checkpoint, tmp_path, dataclasses.replace(CONFIG, heads_first_steps=3))
    before = {name: p.detach().clone() for name, p in trainer.joint.backbone.trained().items()}
    heads = [p.detach().clone() for p in trainer.joint.heads.parameters()]
    for _ in range(3):
        assert not trainer.is_joint
        trainer.train_step()
    assert all(torch.equal(before[name], p) for name, p in trainer.joint.backbone.trained().items())
    assert not all(torch.equal(a, b) for a, b in zip(heads, trainer.joint.heads.parameters(), strict=True))
    trainer.train_step()
    assert not all(torch.equal(before[name], p) for name, p in trainer.joint.backbone.trained().items())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_untouched_backbone_is_its_own_teacher(checkpoint: Path, lora: bool) -> None:
    backbone = backbone_of(checkpoint, lora=lora)
    tokens = make_batch(counting_documents(4), HEADS).token_ids

    def loss() -> float:
        hidden, teacher = backbone.hidden(tokens), backbone.teacher_hidden(tokens)
        return distillation_loss(backbone, hidden, teacher).item()

    assert abs(loss()) < 1e-5
    with torch.no_grad():
        for parameter in backbone.trained().values():
            parameter.add_(0.05)
    assert loss() > 1e-2


def test_adapters_are_where_they_can_be_merged(checkpoint: Path) -> None:
    names = backbone_of(checkpoint).trained()
    tied = json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    assert all("lora_" in name for name in names)
    assert any("lm_head" in name for name in names) == (not tied)
    for linear in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert sum(linear in name for name in names) == 4  # two layers, two matrices


def test_only_answers_count(checkpoint: Path) -> None:
    """Text of the user and padding change neither the losses' targets nor their number."""
    batch = make_batch([Document([4, 5, 6, 7, 8, 9, 10], [(2, 4), (6, 7)], True, False)], HEADS)
    assert batch.rows.tolist() == [1, 2, 5]
    assert batch.next_tokens.tolist() == [6, 7, 10]
    assert batch.targets.tolist() == [[7, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    short, long = counting_documents(2)
    joint = JointModel(backbone_of(checkpoint), fresh_heads(), "ce").eval()
    apart = sum(joint(make_batch([document], HEADS), True) for document in (short, long))
    torch.testing.assert_close(joint(make_batch([short, long], HEADS), True), apart)
    behind = dataclasses.replace(short, token_ids=[*short.token_ids, 9, 9, 9])
    torch.testing.assert_close(
        joint(make_batch([behind], HEADS), True), joint(make_batch([short], HEADS), True)
    )


def test_losses_are_those_of_the_formula(checkpoint: Path) -> None:
    """Against cross-entropies of the engine's own decoder, one position at a time, a reduced vocabulary."""
    kept = torch.arange(0, VOCAB, 2)
    heads = fresh_heads(kept)
    torch.manual_seed(0)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    document = counting_documents(3)[2]
    sums = JointModel(backbone_of(checkpoint), heads, "ce")(make_batch([document], HEADS), True)

    decoder = load_decoder(checkpoint, torch.float32, torch.device("cpu"))
    tokens = torch.tensor(document.token_ids)
    hidden = decoder(tokens, torch.arange(len(tokens)), DenseCausalAttention(1, len(tokens)))
    heads.bind(decoder.lm_head.weight, decoder.embedding)
    expected = torch.zeros(1 + HEADS)
    [(start, end)] = document.spans
    for place in range(start - 1, end - 1):
        row = hidden[place : place + 1]
        expected[0] -= decoder.logits(row)[0].log_softmax(dim=0)[tokens[place + 1]]
        guesses = heads.logits(row, tokens[place + 1 : place + 2], HEADS)[:, 0].log_softmax(dim=1)
        for head in range(HEADS):
            target = place + 2 + head
            if target < end and tokens[target] % 2 == 0:
                expected[1 + head] -= guesses[head, tokens[target] // 2]
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projection", ["shared", "own", "low_rank"])
@pytest.mark.parametrize("architecture", ["medusa", "hydra"])
def test_heads_of_every_kind_learn_with_their_backbone(
    checkpoint: Path, tmp_path: Path, architecture: str, projection: ProjectionKind
) -> None:
    torch.manual_seed(0)
    kind: dict[str, Any] = {"projection": projection, "rank": 16 if projection == "low_rank" else 0}
    kind["token_map"] = torch.arange(2, VOCAB)
    if architecture == "medusa":
        heads: DraftHeads = MedusaHeads(HEADS, 1, 32, VOCAB, **kind)
    else:
        heads = HydraHeads(HEADS, VOCAB, PrefixLayer(32, 4, 2, 8, 48), **kind)
    backbone = backbone_of(checkpoint)
    heads.start_from(backbone.projection())
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    config = dataclasses.replace(CONFIG, heads_first_steps=0, epochs=4)
    trainer = JointTrainer(config, counting_documents(80), backbone, heads, tmp_path, Accelerator(cpu=True))
    trainer.run()
    rows = torch.tensor(losses(tmp_path))
    assert (rows[-4:].mean(dim=0) < 0.8 * rows[:4].mean(dim=0)).all()
    assert not any(torch.equal(before[name], p) for name, p in heads.named_parameters())


def test_passes_and_checkpointing_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, heads_first_steps=0, lm_loss="distill")
    ends = []
    for accumulate, checkpointing in ((1, False), (4, True)):
        changed = dataclasses.replace(config, accumulate=accumulate)
        trainer = trainer_of(
            checkpoint, tmp_path / str(accumulate), changed, gradient_checkpointing=checkpointing
        )
        for module in trainer.joint.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # drawn by pass, so that it does depend on how a step is cut
        trainer.train_step()
        gradients = trainer.train_step()
        ends.append([gradients.loss_lm, *gradients.loss_heads])
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_ends_like_an_unbroken_one(checkpoint: Path, tmp_path: Path) -> None:
    whole = trainer_of(checkpoint, tmp_path / "whole")
    whole.run()

    broken = trainer_of(checkpoint, tmp_path / "broken")
    real_step = broken.train_step

    def killed() -> Any:
        if broken.step == 13:  # past the checkpoint of step 10, whose later steps are lost
            raise KeyboardInterrupt
        return real_step()

    broken.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    torch.manual_seed(99)
    resumed = trainer_of(checkpoint, tmp_path / "broken")
    assert resumed.step == 10
    resumed.run()

    assert resumed.num_steps == whole.num_steps > 15
    ends = [trainer.joint.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_loss_that_is_not_finite_stops_and_can_go_on_with_a_lower_rate(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = trainer_of(checkpoint, tmp_path)
    for _ in range(3):
        run.train_step()
    run.save()
    with torch.no_grad():
        run.joint.heads.biases[0][0, 0] = torch.nan
    with pytest.raises(JointTrainingError, match=r"not finite at step 3 .*trainer\.pt: run again"):
        run.run()
    again = trainer_of(checkpoint, tmp_path, dataclasses.replace(CONFIG, lr=1e-3))
    assert again.step == 3
    assert all(p.isfinite().all() for p in again.joint.parameters())


def test_other_settings_do_not_take_up_a_run(checkpoint: Path, tmp_path: Path) -> None:
    trainer_of(checkpoint, tmp_path).save()
    with pytest.raises(JointTrainingError, match="other settings"):
        trainer_of(checkpoint, tmp_path, dataclasses.replace(CONFIG, seed=1))


def test_another_token_map_or_start_of_equal_shape_does_not_take_up_a_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    kept = torch.arange(16)

    def run(tokens: Tensor, start: str | None) -> JointTrainer:
        heads, documents = fresh_heads(tokens), counting_documents(80)
        parts = backbone_of(checkpoint), heads, tmp_path, Accelerator(cpu=True)
        return JointTrainer(CONFIG, documents, *parts, start)

    run(kept, "a").save()
    assert run(kept, "a").step == 0
    for tokens, start in ((kept + 1, "a"), (kept, "b"), (kept, None)):
        with pytest.raises(JointTrainingError, match="other settings, data or weights"):
            run(tokens, start)


def test_a_batch_that_cannot_be_shared_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(JointTrainingError, match="a multiple of 3"):
        trainer_of(checkpoint, tmp_path, dataclasses.replace(CONFIG, accumulate=3))


def test_the_result_is_a_model_and_heads_that_are_served_together(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = save_text(tmp_path / "text.jsonl", 120), tmp_path / "out"
    command = ["train", "medusa2", "--model", str(checkpoint), "--data", str(data), "--out", str(out)]
    command += ["--heads-first-steps", "20", "--epochs", "6", "--lr", "5e-3", "--lm-loss", "ce"]
    command += ["--batch", "8", "--accumulate", "1", "--mixed-precision", "no", "--cost-prompts", "2"]
    assert main(command) == 0
    assert f"gorgon serve {out / 'model'} --heads {out / 'heads'}" in capsys.readouterr().out

    decoder = load_decoder(out / "model", torch.float32, torch.device("cpu"))
    assert decoder.config.eos_token_ids == (EOS,)
    heads = load_heads(out / "heads").bind(decoder.embedding, decoder.lm_head.weight)
    assert TreeFamily.load(out / "heads" / "tree.json").max_depth <= heads.num_heads
    messages = [{"role": "user", "content": "w1 w2 w3"}]
    original, merged = (load_chat_tokenizer(folder) for folder in (checkpoint, out / "model"))
    assert merged.encode_chat(messages) == original.encode_chat(messages)
    assert merged.eos_token == original.eos_token

    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["hit_rates"][0][0] > 0.5
    cost = report["cost_in_output"]
    assert cost["perplexity_merged"] < cost["perplexity_original"]  # it learned the text
    assert 0 <= cost["identical_continuations"] <= cost["common_tokens"] <= 1
