"""The trainer: it learns, an interrupted run ends like an unbroken one, and a run gone wrong stops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from engine.model.decoder import Decoder
from heads.checkpoint import load_heads
from heads.medusa import MedusaHeads
from tests.training.tiny import VOCAB, tiny_decoder, tiny_documents
from training.calibrate import calibrate
from training.heads_log import EpochCost
from training.heads_loss import LATER_HEADS_EVERY
from training.heads_trainer import HeadsTrainer, TrainerConfig, TrainingError, token_map
from training.hidden_states import HiddenCache, extract
from training.sequences import SequenceBatch, Sequences
from training.vocabulary_loss import distributions, frozen_projection_loss, mean_rows, vocabulary_loss

CONFIG = TrainerConfig(targets="hard", epochs=20, batch=192, lr=2e-2, warmup=5, checkpoint_every=20)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def cache(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> HiddenCache:
    return extract(decoder, tiny_documents(120), tmp_path_factory.mktemp("cache"))


def trainer(
    cache: HiddenCache,
    decoder: Decoder,
    directory: Path,
    config: TrainerConfig = CONFIG,
    tokens: Tensor | None = None,
    start: str | None = None,
) -> HeadsTrainer:
    heads = MedusaHeads(3, 2, decoder.config.hidden_size, VOCAB, tokens, root_input=True)
    weights = decoder.embedding, decoder.lm_head.weight
    return HeadsTrainer(config, heads, cache, *weights, "tiny", directory, Accelerator(cpu=True), start)


def means(run: HeadsTrainer, batch: SequenceBatch) -> Tensor:
    """Mean loss of each head, over as many steps as it takes until every anchor has had its turn."""
    steps = range(LATER_HEADS_EVERY)
    sums = torch.stack([run.loss.sums(batch, step).detach() for step in steps]).sum(dim=0)
    return sums / torch.stack([run.loss.counts(batch, step) for step in steps]).sum(dim=0)


def test_heads_after_the_first_learn_at_every_anchor_in_turn(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    run = trainer(cache, decoder, tmp_path)
    batch = run.sequences.load(run.held_out)
    counts = torch.stack([run.loss.counts(batch, step) for step in range(LATER_HEADS_EVERY)])
    known = torch.stack([(batch.targets(head) >= 0).sum() for head in range(3)])
    assert (counts[:, 0] == known[0]).all()
    assert (counts[:, 1:].sum(dim=0) == known[1:]).all()
    assert (counts[:, 1:] < known[1:]).all()


def weights(directory: Path) -> list[Tensor]:
    return list(load_heads(directory).module.parameters())


def test_trained_heads_beat_random_ones_by_far(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    trainer(cache, decoder, tmp_path).run()
    trained = load_heads(tmp_path).bind(decoder.embedding, decoder.lm_head.weight)
    torch.manual_seed(0)
    random = MedusaHeads(3, 2, trained.hidden_size, VOCAB)
    for parameter in random.parameters():
        torch.nn.init.normal_(parameter)
    random.bind(decoder.lm_head.weight, decoder.embedding)

    def top1(heads: MedusaHeads) -> float:
        documents = torch.nonzero(cache.held_out).squeeze(1).tolist()
        return calibrate(heads, Sequences(cache), documents, decoder.embedding).hit_rates[0][0]

    assert top1(trained) > 0.9
    assert top1(random) < 0.2


def test_the_held_out_hits_in_the_log_are_those_of_calibration(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    run = trainer(cache, decoder, tmp_path)
    for _ in range(30):
        run.train_step()
    run.save()
    heads = load_heads(tmp_path).bind(decoder.embedding, decoder.lm_head.weight)
    measured = calibrate(heads, run.sequences, run.held_out, decoder.embedding).hit_rates
    for hits, rates in zip(run.held_out_hits(), measured, strict=True):
        assert hits == pytest.approx(rates[0], abs=0.03)  # one is in bfloat16


def test_soft_targets_bring_the_heads_near_what_the_base_says(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    run = trainer(cache, decoder, tmp_path, dataclasses.replace(CONFIG, targets="soft"))
    batch = run.sequences.load(run.held_out)
    before = means(run, batch)
    run.run()
    after = means(run, batch)
    says = distributions(batch.hidden.flatten(0, 1), run.loss.projection.bfloat16()).float()
    for head in range(3):
        known = batch.targets(head) >= 0
        wanted = says[batch.anchors[known] + 1 + head]
        entropy = -(wanted * wanted.log()).sum(dim=1).mean()
        # No loss is below the entropy of what is to be learned, but for bfloat16's rounding.
        assert -0.02 < after[head] - entropy < 0.5 * (before[head] - entropy)


def test_an_interrupted_run_ends_like_an_unbroken_one(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, epochs=5)
    whole = trainer(cache, decoder, tmp_path / "whole", config)
    whole.run()

    broken = trainer(cache, decoder, tmp_path / "broken", config)
    real_step = broken.train_step

    def killed() -> list[float]:
        if broken.step == 33:  # past the checkpoint of step 20, whose later steps are lost
            raise KeyboardInterrupt
        return real_step()

    broken.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = trainer(cache, decoder, tmp_path / "broken", config)
    assert resumed.step == 20
    resumed.run()

    assert resumed.num_steps == whole.num_steps > 40
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "whole"), weights(tmp_path / "broken"), strict=True)
    )
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "broken")]
    assert [line.split(",")[0] for line in logs[0]] == [line.split(",")[0] for line in logs[1]]


def test_another_token_map_or_start_of_equal_shape_does_not_take_up_a_run(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    kept = torch.arange(16)
    trainer(cache, decoder, tmp_path, tokens=kept, start="a").save()
    assert trainer(cache, decoder, tmp_path, tokens=kept, start="a").step == 0
    for tokens, start in ((kept + 1, "a"), (kept, "b"), (kept, None)):
        with pytest.raises(TrainingError, match="other settings, data or weights"):
            trainer(cache, decoder, tmp_path, tokens=tokens, start=start)


def test_pieces_change_nothing(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    """How a step is cut is a matter of memory: sums over the pieces are those of the whole."""
    ends = []
    for accumulate in (1, 3, 1000):  # the last is more than there are conversations
        run = trainer(
            cache, decoder, tmp_path / str(accumulate), dataclasses.replace(CONFIG, accumulate=accumulate)
        )
        losses = [run.train_step() for _ in range(5)][-1]
        ends.append(torch.tensor([*losses, *(p.detach().abs().sum() for p in run.heads.parameters())]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0.02, atol=0.02)


def test_a_run_says_what_an_epoch_and_the_cache_cost(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    run = trainer(cache, decoder, tmp_path, dataclasses.replace(CONFIG, epochs=2))
    assert run.epoch_cost() is None
    run.run()
    cost = run.epoch_cost()
    assert cost is not None and cache.seconds is not None and cost.backbone_seconds is not None
    assert cost.heads_seconds == pytest.approx(run.log.seconds / 2, rel=0.01)
    assert 0 < cost.backbone_seconds < cache.seconds  # which covers what is held out too
    line = EpochCost(heads_seconds=2.0, backbone_seconds=8.0).line()
    assert "takes 2.0 s" in line and "took 8.0 s, 4.0 times" in line and "5.0 times as long" in line
    assert "was not noted" in EpochCost(2.0, None).line()


def test_a_finished_run_changes_nothing(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    trainer(cache, decoder, tmp_path, config).run()
    before = weights(tmp_path)
    trainer(cache, decoder, tmp_path, config).run()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(tmp_path), strict=True))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    run = trainer(cache, decoder, tmp_path)
    for _ in range(3):
        run.train_step()
    run.save()
    before = weights(tmp_path)
    with torch.no_grad():
        run.heads.biases[0][0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"not finite at step 3 .*trainer\.pt: run again"):
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(tmp_path), strict=True))
    again = trainer(cache, decoder, tmp_path, dataclasses.replace(CONFIG, lr=1e-3))
    assert again.step == 3
    assert all(p.isfinite().all() for p in again.heads.parameters())


def test_a_first_step_gone_wrong_names_no_checkpoint(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    run = trainer(cache, decoder, tmp_path)
    with torch.no_grad():
        run.heads.biases[0][0, 0] = torch.nan
    with pytest.raises(TrainingError, match="no checkpoint yet"):
        run.run()


def test_other_settings_do_not_take_up_a_run(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    trainer(cache, decoder, tmp_path).save()
    with pytest.raises(TrainingError, match="other settings"):
        trainer(cache, decoder, tmp_path, dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(TrainingError, match="data or weights"):
        trainer(dataclasses.replace(cache, origin="other"), decoder, tmp_path)


def test_a_run_whose_log_is_gone_goes_on(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    trainer(cache, decoder, tmp_path, config).run()
    (tmp_path / "log.csv").unlink()
    trainer(cache, decoder, tmp_path, config).run()
    assert (tmp_path / "log.csv").read_text().startswith("step,lr,")


def test_nothing_to_train_on_is_an_error(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    none_left = dataclasses.replace(cache, held_out=torch.ones_like(cache.held_out))
    with pytest.raises(TrainingError, match="give more data"):
        trainer(none_left, decoder, tmp_path)


def test_nothing_held_out_is_trained_on(cache: HiddenCache, decoder: Decoder, tmp_path: Path) -> None:
    held_out = set(torch.nonzero(cache.held_out).squeeze(1).tolist())
    trained = {number for step in trainer(cache, decoder, tmp_path).plan for number in step}
    assert held_out and trained == set(range(len(cache.documents))) - held_out


def test_the_token_map_keeps_the_most_frequent_tokens(cache: HiddenCache) -> None:
    training = [i for i, held_out in enumerate(cache.held_out.tolist()) if not held_out]
    rows = torch.cat([torch.arange(*cache.answers[i].tolist()) for i in training])
    counts = torch.bincount(cache.token_ids[rows], minlength=VOCAB)
    chosen = token_map(cache, 8, VOCAB)
    assert chosen is not None
    others = [token for token in range(VOCAB) if token not in chosen.tolist()]
    assert chosen.tolist() == sorted(chosen.tolist())
    assert counts[chosen].min() >= counts[others].max()
    assert token_map(cache, VOCAB, VOCAB) is None


def test_targets_outside_the_token_map_do_not_count(
    cache: HiddenCache, decoder: Decoder, tmp_path: Path
) -> None:
    whole = trainer(cache, decoder, tmp_path / "whole")
    cut = trainer(cache, decoder, tmp_path / "cut", tokens=torch.arange(8))
    batch = cut.sequences.load(cut.plan[0])
    for head, loss in enumerate(means(cut, batch)):
        inside = (batch.targets(head) >= 0) & (batch.targets(head) < 8)
        features = whole.loss.features(batch)[head][inside]
        logits = features @ whole.loss.projection[:8].t()
        expected = F.cross_entropy(logits.float(), batch.targets(head)[inside])
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_of_a_projection_that_does_not_learn_equals_cross_entropy(soft: bool) -> None:
    torch.manual_seed(0)
    projection, rows = torch.randn(50, 16), torch.randn(700, 16)
    targets = torch.randint(0, 50, (700,))
    features = torch.randn(700, 16, requires_grad=True)
    reference = features.detach().clone().requires_grad_()
    means = mean_rows(rows, projection) if soft else projection[targets]
    loss = frozen_projection_loss(features, projection, means)
    wanted = distributions(rows, projection) if soft else targets
    expected = F.cross_entropy(reference @ projection.t(), wanted, reduction="sum")
    (loss / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(features.grad, reference.grad)


@pytest.mark.parametrize("soft", [False, True])
def test_the_blockwise_loss_and_its_gradient_equal_cross_entropy(soft: bool) -> None:
    torch.manual_seed(0)
    projection = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (700,))
    teacher = torch.randn(50, 50).softmax(dim=1) if soft else None
    features = torch.randn(700, 16, requires_grad=True)
    reference, weight = (x.detach().clone().requires_grad_() for x in (features, projection))
    loss = vocabulary_loss(features, projection, targets, teacher)
    wanted = targets if teacher is None else teacher[targets]
    expected = F.cross_entropy(reference @ weight.t(), wanted, reduction="sum")
    (loss / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(features.grad, reference.grad)
    torch.testing.assert_close(projection.grad, weight.grad)
