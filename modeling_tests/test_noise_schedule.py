"""Claims about the forward noise (paper Eq. 1-3)."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from mdm_hf.noise_schedule import (
    BETA_SCHEDULES,
    add_noise,
    alpha_bar,
    alpha_bar_table,
    noise_from,
    posterior,
    snr,
)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_table_equals_diffusers(schedule, steps):
    expected = DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule).alphas_cumprod
    table = alpha_bar_table(steps, beta_schedule=schedule)
    assert table[0] == 1
    torch.testing.assert_close(table[1:].float(), expected, atol=1e-6, rtol=1e-4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="must be one of linear, scaled_linear, squaredcos_cap_v2"):
        alpha_bar_table(beta_schedule="cosine")


@pytest.mark.parametrize("ends", [(0.0, 0.02), (0.03, 0.02), (1e-4, 1.0), (1e-4, math.nan)])
def test_betas_that_are_no_shares_of_variance_are_refused(ends):
    with pytest.raises(ValueError, match="`beta_start` and `beta_end` are .*; need 0 < beta_start <= beta_end < 1"):
        alpha_bar_table(1000, *ends)


def test_more_noise_than_float32_holds_is_refused():
    with pytest.raises(ValueError, match=r"`beta_end` 0.2 over 1000 steps .* leaves alpha_bar = .*e-47 at t = 1"):
        alpha_bar_table(1000, beta_end=0.2)
    assert bool((alpha_bar_table(100, beta_end=0.2).float() > 0).all())


def test_alpha_bar_meets_the_table_and_falls_in_between():
    table = alpha_bar_table()
    t = torch.arange(1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(alpha_bar(t, table), table)
    fine = alpha_bar(torch.linspace(0, 1, 9999, dtype=torch.float64), table)
    assert bool((fine.diff() < 0).all())
    assert alpha_bar(torch.zeros(2, 3), table.float()).shape == (2, 3)
    assert float(alpha_bar(torch.zeros(1), table.float())) == 1


@pytest.mark.parametrize("of_table", [torch.float64, torch.float32, torch.bfloat16])
def test_alpha_bar_is_float32_unless_t_is_float64(of_table):
    exact = alpha_bar_table()
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for of_t, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32)):
        got = alpha_bar(t.to(of_t), exact.to(of_table))
        assert got.dtype == expected
        torch.testing.assert_close(got.double(), exact, atol=2e-3 if of_table == torch.bfloat16 else 1e-6, rtol=0)
    assert alpha_bar(t.bfloat16(), exact.to(of_table)).dtype == torch.float32


def test_alpha_bar_compiles_into_one_graph():
    table, t = alpha_bar_table().float(), torch.rand(3, 4)
    compiled = torch.compile(alpha_bar, fullgraph=True, backend="eager")
    assert torch.equal(compiled(t, table), alpha_bar(t, table))


def test_a_timestep_of_diffusers_has_the_alpha_bar_that_diffusers_gives_it():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(20)
    t = (scheduler.timesteps + 1) / 1000  # as generation_mdm.py counts
    expected = scheduler.alphas_cumprod[scheduler.timesteps]
    torch.testing.assert_close(alpha_bar(t, alpha_bar_table().float()), expected, atol=1e-6, rtol=1e-4)


def test_noisy_latents_have_the_variance_of_eq_2():
    z_0, noise = torch.full((200_000, 1), 3.0), torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    z_t = add_noise(z_0, noise, torch.full((200_000,), 0.36))
    assert abs(float(z_t.mean()) - 0.6 * 3) < 0.01
    assert abs(float(z_t.var()) - 0.64) < 0.01


def test_the_implied_noise_inverts_the_forward_process():
    z_0, noise = torch.randn(2, 50, 4, dtype=torch.float64).unbind(0)
    level = torch.rand(50, dtype=torch.float64) * 0.99
    torch.testing.assert_close(noise_from(z_0, add_noise(z_0, noise, level), level), noise)
    assert torch.isfinite(noise_from(z_0, z_0, torch.ones(50, dtype=torch.float64))).all()


@pytest.mark.parametrize(("s", "t"), [(0.9, 0.2), (0.5, 0.49), (0.999, 0.01)])
def test_the_posterior_is_bayes_theorem(s, t):
    """q(z_s | z_t, z_0) ~ q(z_t | z_s) q(z_s | z_0), on a fine grid in one dimension."""
    z_0, z_t = 0.7, -0.4
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    log_density = -((grid - s**0.5 * z_0) ** 2) / (2 * (1 - s))
    log_density += -((z_t - (t / s) ** 0.5 * grid) ** 2) / (2 * (1 - t / s))
    weight = log_density.softmax(0)
    mean, variance = (weight * grid).sum(), (weight * grid**2).sum() - (weight * grid).sum() ** 2
    levels = (torch.tensor([v], dtype=torch.float64) for v in (s, t))
    values = (torch.tensor([[v]], dtype=torch.float64) for v in (z_0, z_t))
    got_mean, got_variance = posterior(*values, *levels)
    torch.testing.assert_close(got_mean.squeeze(), mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got_variance.squeeze(), variance, atol=1e-6, rtol=1e-6)


def test_the_posterior_is_finite_in_fp32_at_every_pair_of_times_and_a_point_where_t_is_clean():
    table = alpha_bar_table().float()
    t = torch.linspace(0, 1, 101)
    s = t[:, None] * torch.tensor([0.0, 1e-3, 0.5, 1.0])
    level_s, level_t = alpha_bar(s, table), alpha_bar(t[:, None].expand_as(s), table)
    z_0 = torch.randn(101, 4, 3, generator=torch.Generator().manual_seed(0))
    mean, variance = posterior(z_0, add_noise(z_0, torch.ones_like(z_0), level_t), level_s, level_t)
    assert torch.isfinite(mean).all()
    assert bool(((variance >= 0) & (variance < 1)).all())
    torch.testing.assert_close(mean[:, 0], z_0[:, 0])  # s = 0: the clean latent itself
    torch.testing.assert_close(mean[0], z_0[0])  # t = 0: nothing to undo


def test_snr_is_finite_at_both_ends():
    assert torch.isfinite(snr(torch.tensor([0.0, 0.5, 1.0]))).all()
    assert float(snr(torch.tensor(0.5))) == 1
