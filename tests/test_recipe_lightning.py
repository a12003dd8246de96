"""docs/recipes/lightning.md: the LightningModule, run by Lightning's own Trainer."""

from __future__ import annotations

import copy
import runpy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import oracle
import pytest
import recipes
import torch
from helpers import assert_close, numpy64
from pages import EXAMPLES
from torch.utils.checkpoint import checkpoint

pytest.importorskip("lightning.pytorch")


@pytest.fixture
def recipe() -> ModuleType:
    return recipes.example("with_lightning")


def trainer_for(recipe: ModuleType, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return recipe.pl.Trainer(**quiet, enable_model_summary=False, accelerator="cpu", devices=1, **options)


def loader_of(recipe: ModuleType) -> Any:
    return torch.utils.data.DataLoader(recipe.RandomViews(8), batch_size=4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_first_step(recipe: ModuleType, checkpointed: bool) -> None:
    model = recipe.DenseCL(momentum=0.9, queue_size=10)
    if checkpointed:
        model.criterion.forward = partial(checkpoint, model.criterion.forward, use_reentrant=False)
    recipes.disturb(model.backbone, model.head)
    queues = recipes.truth_of(model.image_queue), recipes.truth_of(model.dense_queue)
    weights = recipes.parameters_of(model.head), recipes.parameters_of(model.head_k)
    before = recipes.parameters_of(model.backbone_k), recipes.parameters_of(model.head_k)
    networks = [copy.deepcopy(module).double() for module in (model.backbone, model.backbone_k)]
    trainer = trainer_for(recipe, max_steps=1, precision="64-true")
    with recipes.inputs_of(model.head) as maps_q, recipes.inputs_of(model.head_k) as maps_k:
        trainer.fit(model, loader_of(recipe))
    for seen, network, view in zip((maps_q, maps_k), networks, next(iter(loader_of(recipe))), strict=True):
        recipes.check_maps(seen, (network(view.double()),))
    query, key, image, dense = recipes.moco_terms(weights, (maps_q, maps_k), queues)
    # float32 views of the metrics; the queues are float64
    assert_close(trainer.callback_metrics["image_loss"], image.loss, 1e-6, "image term")
    assert_close(trainer.callback_metrics["dense_loss"], dense.loss, 1e-6, "dense term")
    recipes.check_queue(model.image_queue, queues[0], key.image)
    recipes.check_queue(model.dense_queue, queues[1], key.pooled)
    recipes.check_momentum(model.backbone, model.backbone_k, before[0])
    recipes.check_momentum(model.head, model.head_k, before[1])

    # SGD's first step from the loss's gradient: lr = 0.03, weight decay 1e-4, half of each term.
    grads = oracle.head_gradients(weights[0], query, 0.5 * image.query[:, :, 0], 0.5 * dense.query)
    for name, parameter in model.head.named_parameters():
        step = 0.03 * (grads[name] + 1e-4 * weights[0][name])
        assert_close(weights[0][name] - numpy64(parameter), step, 1e-9, name)


def test_keys_move_once_per_accumulated_step(recipe: ModuleType) -> None:
    model = recipe.DenseCL(momentum=0.9, queue_size=10).double()
    recipes.disturb(model.head)
    before = recipes.parameters_of(model.head_k)
    trainer = trainer_for(recipe, max_steps=1, precision="64-true", accumulate_grad_batches=2)
    trainer.fit(model, loader_of(recipe))
    recipes.check_momentum(model.head, model.head_k, before)
    assert int(model.dense_queue.position) == 8


def fit(recipe: ModuleType, seed: int = 0, checkpoint: Path | None = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = recipe.DenseCL(momentum=0.9, queue_size=10)
    if options["precision"] == "64-true":
        model.double()  # as a callback copies it at once
    trainer = trainer_for(recipe, **options)
    trainer.fit(model, loader_of(recipe), ckpt_path=checkpoint)
    return trainer, model


def test_averaging_weights_leaves_the_queues(recipe: ModuleType) -> None:
    """The run ends with the averaged weights, and with the queues of the last update."""
    averaging = recipe.pl.callbacks.EMAWeightAveraging(decay=0.75, update_every_n_steps=1, use_buffers=False)
    plain, model = (fit(recipe, max_epochs=2, precision="64-true", callbacks=x)[1] for x in (None, [averaging]))
    assert not torch.equal(model.head.dense_mlp[0].weight, plain.head.dense_mlp[0].weight)
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert_close(model.dense_queue.rows.norm(dim=1), torch.ones(10), 1e-12, "length of the rows")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumes_bit_for_bit(recipe: ModuleType, tmp_path: Path, precision: str) -> None:
    trainer, half = fit(recipe, max_epochs=1, precision=precision)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rows = half.dense_queue.rows.clone()
    assert int(half.dense_queue.position) == 8
    runs = ({}, {"seed": 1, "checkpoint": tmp_path / "half.ckpt"})
    whole, resumed = (fit(recipe, **run, max_epochs=2, precision=precision)[1].state_dict() for run in runs)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert int(whole["dense_queue.position"]) == 16 % 10
    assert not torch.equal(whole["dense_queue.rows"], rows)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_command_runs(precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["with_lightning.py", "--steps", "1", "--precision", precision])
    runpy.run_path(str(EXAMPLES / "with_lightning.py"), run_name="__main__")
    assert "dense_loss" in capsys.readouterr().out
