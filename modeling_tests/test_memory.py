"""Claims about the estimate of a training run: it counts what is counted, and foretells what a process then holds."""

from functools import partial

import pytest
import torch
from _measure import peak_memory
from tiny import tiny_config

from benchmarks.training_memory import SMALL, estimate, work
from mdm_hf import MDMConfig, MDMForMultiModalGeneration
from mdm_hf.training.memory import GIB, TrainingEstimate, _LiveBytes, estimate_training, largest_batch


def make_batch(config, rows):
    return largest_batch(config, rows, (2, 3), 5)


def test_the_batch_that_is_made_up_is_one_that_the_model_trains_on():
    config = tiny_config()
    out = MDMForMultiModalGeneration(config).train()(**make_batch(config, 3))
    assert all(
        float(part) > 0 for part in (out.loss_rec_image, out.loss_rec_text, out.loss_se_image, out.loss_se_text)
    )


def test_weights_gradients_optimizer_and_average_are_counted_exactly():
    config = tiny_config(num_hidden_layers=5)
    found = estimate_training(config, partial(make_batch, config), 2)
    model = MDMForMultiModalGeneration(config)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert (found.parameters, found.trainable) == (model.num_parameters(), model.num_parameters())
    assert (found.weights, found.gradients, found.optimizer, found.average) == (size, size, 2 * size, size)
    assert found.tokens_per_step == make_batch(config, 2)["input_ids"].numel()
    assert found.seconds_per_step > 0


def test_what_is_frozen_has_no_gradient_no_optimizer_state_and_no_average():
    config = tiny_config()

    def freeze(model):
        model.requires_grad_(False)
        model.latent_head.requires_grad_(True)
        return model

    found = estimate_training(config, partial(make_batch, config), 2, prepare=freeze)
    assert found.gradients == found.average == found.optimizer // 2 == 4 * found.trainable
    assert found.trainable == sum(p.numel() for p in MDMForMultiModalGeneration(config).latent_head.parameters())


@pytest.mark.parametrize("rows", [4, 9])
def test_activations_of_a_deeper_model_and_a_larger_batch_are_those_that_it_then_holds(rows):
    config = tiny_config(num_hidden_layers=6)
    found = estimate_training(config, partial(make_batch, config), rows)
    model = MDMForMultiModalGeneration(config).train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with _LiveBytes() as live:
        model(**make_batch(config, rows)).loss.backward()
    assert found.activations == pytest.approx(live.peak, rel=0.05)


def test_gradient_checkpointing_lowers_the_estimate():
    config = tiny_config(num_hidden_layers=8)

    def checkpointing(model):
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        return model

    plain = estimate_training(config, partial(make_batch, config), 4)
    light = estimate_training(config, partial(make_batch, config), 4, prepare=checkpointing)
    assert light.activations < 0.6 * plain.activations


def test_live_bytes_are_the_most_that_lived_at_one_time():
    with _LiveBytes() as live:
        a = torch.ones(1000)
        b = a.view(10, 100) + 1  # a view holds nothing of its own
        del a
        b.add_(1)
        c = torch.ones(500)
    assert live.peak == 4 * 2000
    assert live.now == 4 * 1500
    del b, c
    assert live.now == 0


def test_shards_share_what_is_kept_and_gather_blocks():
    sizes = {"parameters": 1, "trainable": 1, "tokens_per_step": 1, "seconds_per_step": 1.0}
    alone = TrainingEstimate(weights=8, gradients=8, optimizer=16, average=8, activations=5, one_block=3, **sizes)
    shared = TrainingEstimate(
        weights=8,
        gradients=8,
        optimizer=16,
        average=8,
        activations=5,
        one_block=3,
        processes=4,
        largest_block=1,
        **sizes,
    )
    assert (alone.peak, shared.peak) == (32 + 8 + 3, 8 + 2 + 5)


def test_a_7b_model_is_estimated_without_being_built():
    config = MDMConfig.from_preset("mdm-7b", hidden_size=64, head_dim=32, state_size=8)
    found = estimate_training(config, partial(make_batch, config), 1)
    assert found.parameters > 10**7
    assert found.weights / GIB < 0.5


def test_the_estimate_of_a_process_is_within_15_percent_of_what_a_run_of_the_trainer_takes():
    """benchmarks/training_memory.py does the same for larger presets."""
    [shape] = SMALL.values()
    found = estimate(*shape)
    measured = found.own + peak_memory(work, *shape) * 2**20
    assert found.peak == pytest.approx(measured, rel=0.15)
