"""Claims about score entropy (paper Eq. 4-8, Theorems 1 and 2)."""

import pytest
import torch
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from mdm_hf.noise_schedule import add_noise, alpha_bar, alpha_bar_table, posterior, snr
from mdm_hf.score_entropy import (
    chunked_text_score_entropy,
    ddpm_epsilon_loss,
    image_score_entropy_exact,
    image_score_entropy_sampled,
    log_ratio,
    loss_weight,
    normaliser,
    score_entropy,
    text_score_entropy,
    theorem1_log_ratio,
    theorem2_log_score,
)


TABLE = alpha_bar_table()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_normaliser_is_a_log_a_minus_a():
    a = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = normaliser(a)
    expected = [0.0] + [x * (torch.tensor(x, dtype=torch.float64).log().item() - 1) for x in (0.5, 1.0, 3.0)]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))
    value.sum().backward()
    torch.testing.assert_close(a.grad[1:], a.detach()[1:].log())  # K'(a) = log a
    assert float(a.grad[0]) == 0


def test_score_entropy_is_the_literal_sum_of_eq_4():
    s, r, w = torch.rand(3, 50, 7, dtype=torch.float64).unbind(0)
    literal = (w * (s - r * s.log() + r * (r.log() - 1))).sum(-1)
    torch.testing.assert_close(score_entropy(s.log(), r.log(), w), literal)


def test_score_entropy_is_never_negative_and_zero_only_at_the_true_ratio():
    log_s, log_r = (3 * torch.randn(2, 10_000, 5, dtype=torch.float64)).unbind(0)
    assert float(score_entropy(log_s, log_r).min()) > 0
    torch.testing.assert_close(
        score_entropy(log_r, log_r), torch.zeros(10_000, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_score_entropy_stays_non_negative_and_precise_in_fp32_next_to_the_true_ratio():
    """Where Eq. 4 as written is nothing but rounding error: its value is 1e-10, its terms are of order one."""
    log_r = torch.randn(10_000, 8, dtype=torch.float64).log_softmax(-1).float()
    log_s = log_r + 1e-5 * torch.randn(10_000, 8)
    value = score_entropy(log_s, log_r)
    exact = score_entropy(log_s.double(), log_r.double())
    assert float(value.min()) >= 0
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
    assert bool((score_entropy(log_r, log_r) == 0).all())


def test_the_gradient_of_score_entropy_is_the_score_less_the_ratio():
    log_s, log_r = (2 * torch.randn(2, 500, 6, dtype=torch.float64)).unbind(0)
    log_s[:250] = log_r[:250] + 0.05 * log_s[:250]  # half of them close by, where e^u is expanded
    log_s.requires_grad_()
    (gradient,) = torch.autograd.grad(score_entropy(log_s, log_r).sum(), log_s)
    torch.testing.assert_close(gradient, log_s.detach().exp() - log_r.exp(), atol=1e-10, rtol=1e-7)


def test_the_minimiser_of_score_entropy_is_the_true_ratio():
    log_r = torch.randn(6, dtype=torch.float64)
    log_s = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_s], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = score_entropy(log_s, log_r)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(log_s.detach(), log_r, atol=1e-4, rtol=1e-4)


def test_a_ratio_of_zero_leaves_value_and_gradient_finite():
    log_s = torch.randn(4, requires_grad=True)
    log_r = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf], requires_grad=True)
    value = score_entropy(log_s, log_r)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(log_s.grad).all()
    assert torch.isfinite(log_r.grad).all()
    torch.testing.assert_close(score_entropy(torch.tensor([0.0, -torch.inf]), log_r[:2].detach()), torch.tensor(0.0))


def test_theorem_1_is_the_ratio_of_the_gaussian_densities():
    z_0, z_t = torch.randn(2, 9, 4, dtype=torch.float64).unbind(0)
    level = torch.rand(9, dtype=torch.float64) * 0.98 + 0.01
    given = Normal(level.sqrt()[:, None] * z_0, (1 - level).sqrt()[:, None]).log_prob(z_t).sum(-1)
    marginal = Normal(0.0, 1.0).log_prob(z_t).sum(-1)
    constant = -4 / 2 * torch.log(1 - level)
    torch.testing.assert_close(theorem1_log_ratio(z_t, z_0, level) + constant, given - marginal)


@pytest.mark.parametrize(("s", "t"), [(0.1, 0.3), (0.5, 0.9), (0.001, 1.0)])
def test_the_log_ratio_is_bayes_theorem_over_the_forward_kernels(s, t):
    """log q(y | z_t, z_0) = log q(z_t | y) + log q(y | z_0) - log q(z_t | z_0)."""
    z_0, noise = torch.randn(2, 7, 4, dtype=torch.float64).unbind(0)
    y = torch.randn(7, 5, 4, dtype=torch.float64)
    level_s, level_t = (alpha_bar(torch.full((7,), v, dtype=torch.float64), TABLE) for v in (s, t))
    z_t = add_noise(z_0, noise, level_t)

    def kernel(x, clean, level):
        return Normal(level.sqrt() * clean, (1 - level).sqrt()).log_prob(x).sum(-1)

    at_s, at_t = level_s[:, None, None], level_t[:, None, None]
    expected = kernel(z_t[:, None], y, at_t / at_s) + kernel(y, z_0[:, None], at_s)
    got = log_ratio(y, z_t, z_0, level_s, level_t)
    torch.testing.assert_close(got, expected - kernel(z_t[:, None], z_0[:, None], at_t))


def test_the_log_ratio_is_finite_and_takes_the_nearest_candidate_where_s_is_clean():
    z_0, z_t = torch.randn(2, 7, 4).unbind(0)
    y = torch.randn(7, 5, 4)
    got = log_ratio(y, z_t, z_0, torch.ones(7), torch.full((7,), 0.5))
    assert torch.isfinite(got).all()
    assert torch.equal(got.argmax(-1), ((y - z_0[:, None]) ** 2).sum(-1).argmin(-1))


def test_theorem_2_normalises_energies_over_the_candidates():
    energies = 50 * torch.randn(20, 8, dtype=torch.float64)
    score = theorem2_log_score(energies).exp()
    torch.testing.assert_close(score.sum(-1), torch.ones(20, dtype=torch.float64))
    shifted = theorem2_log_score(energies + 7).exp()
    torch.testing.assert_close(score, shifted)


def test_normalised_score_entropy_is_the_kl_divergence():
    log_s, log_r = torch.randn(2, 30, 8, dtype=torch.float64).log_softmax(-1).unbind(0)
    expected = kl_divergence(Categorical(logits=log_r), Categorical(logits=log_s))
    torch.testing.assert_close(score_entropy(log_s, log_r), expected)


def test_text_score_entropy_is_eq_4_over_the_vocabulary_and_the_cross_entropy():
    logits = torch.randn(3, 5, 11, dtype=torch.float64).float()
    labels = torch.randint(0, 11, (3, 5))
    one_hot = F.one_hot(labels, 11).float().log()
    by_eq_4 = score_entropy(theorem2_log_score(logits), one_hot)
    got = text_score_entropy(logits, labels)
    torch.testing.assert_close(got, by_eq_4)
    torch.testing.assert_close(got.mean(), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    labels[0, 0] = -100
    assert float(text_score_entropy(logits, labels)[0, 0]) == 0


@pytest.mark.parametrize(("s", "t"), [(0.1, 0.3), (0.5, 0.9), (0.89, 0.9)])
def test_the_exact_form_is_the_kl_divergence_of_the_posteriors(s, t):
    z_0, z0_hat, noise = torch.randn(3, 6, 4, dtype=torch.float64).unbind(0)
    level_s, level_t = (alpha_bar(torch.full((6,), v, dtype=torch.float64), TABLE) for v in (s, t))
    z_t = add_noise(z_0, noise, level_t)

    def gaussian(clean):
        mean, variance = posterior(clean, z_t, level_s, level_t)
        return MultivariateNormal(mean, torch.diag_embed(variance.expand_as(mean)))

    weight = 4 * (snr(level_s) - snr(level_t)) / 2  # undoes the mean over the four dimensions
    expected = kl_divergence(gaussian(z_0), gaussian(z0_hat))
    torch.testing.assert_close(image_score_entropy_exact(z_0, z0_hat, weight), expected)


def sampled_form(z_0, z0_hat, t, table, num_candidates=8):
    """The sampled form, with times and states drawn as a model draws them."""
    e = torch.randn(*z_0.shape[:-1], num_candidates, z_0.shape[-1], dtype=z_0.dtype)
    return image_score_entropy_sampled(z_0, z0_hat, t, table, torch.rand_like(t), e)


def test_the_sampled_form_is_eq_4_with_theorem_2_over_the_states_it_draws():
    """Rebuilt with the posterior itself: candidates, densities, softmax, Eq. 4."""
    z_0, z0_hat, noise = torch.randn(3, 40, 4, dtype=torch.float64).unbind(0)
    t = torch.rand(40, dtype=torch.float64) * 0.8 + 0.2
    uniform, e = torch.rand(40, dtype=torch.float64), torch.randn(40, 5, 4, dtype=torch.float64)
    got = image_score_entropy_sampled(z_0, z0_hat, t, TABLE, uniform, e)
    s = t * uniform
    level_s, level_t = alpha_bar(s, TABLE), alpha_bar(t, TABLE)
    z_t = add_noise(z_0, noise, level_t)
    mean, variance = posterior(z_0, z_t, level_s, level_t)
    y = mean[:, None] + variance.sqrt()[:, None] * e

    def energies(clean):
        mean, variance = posterior(clean, z_t, level_s, level_t)
        return Normal(mean[:, None], variance.sqrt()[:, None]).log_prob(y).sum(-1)

    literal = score_entropy(theorem2_log_score(energies(z0_hat)), theorem2_log_score(energies(z_0)))
    scale = got / literal
    torch.testing.assert_close(
        scale * (snr(level_s) - snr(level_t)),
        scale[:1].expand(40) * (snr(level_s) - snr(level_t))[:1],
        rtol=1e-6,
        atol=0,
    )


def test_the_sampled_form_is_zero_and_stationary_at_the_truth():
    z_0 = torch.randn(100, 6, dtype=torch.float64)
    z0_hat = z_0.clone().requires_grad_()
    value = sampled_form(z_0, z0_hat, torch.rand(100, dtype=torch.float64), TABLE)
    value.sum().backward()
    assert float(value.detach().abs().max()) < 1e-9
    assert float(z0_hat.grad.abs().max()) < 1e-9
    z_0 = z_0.float()
    away = sampled_form(z_0, z_0 + 0.3, torch.rand(100) * 0.9 + 0.1, TABLE.float())
    assert float(away.min()) > 0


def test_the_sampled_form_has_the_scale_and_direction_of_the_exact_one_near_the_truth():
    z_0 = torch.randn(20_000, 4)
    z0_hat = (z_0 + 1e-2 * torch.tensor([1.0, -2.0, 0.5, 0.0])).requires_grad_()
    t = torch.full((20_000,), 0.9)
    sampled = sampled_form(z_0, z0_hat, t, TABLE.float(), 8)
    exact = image_score_entropy_exact(z_0, z0_hat, torch.ones(20_000))
    (by_sampling,) = torch.autograd.grad(sampled.mean(), z0_hat, retain_graph=True)
    (by_formula,) = torch.autograd.grad(exact.mean(), z0_hat)
    assert F.cosine_similarity(by_sampling.sum(0), by_formula.sum(0), dim=0) > 0.99
    assert 0.8 < float(sampled.detach().mean() / exact.detach().mean()) < 1.1


@pytest.mark.parametrize(("latent_size", "cosine"), [(6, 0.999), (16, 0.998)])
def test_the_sampled_gradient_points_with_the_exact_one_on_average_far_from_the_truth(latent_size, cosine):
    """One position is noisy (0.7 at 6 dimensions, 0.4 at 16); the expectation over candidates and times is not."""
    z_0 = torch.randn(20_000, latent_size)
    z0_hat = (z_0 + torch.randn(latent_size)).requires_grad_()
    t = torch.rand(20_000)
    sampled = sampled_form(z_0, z0_hat, t, TABLE.float())
    exact = image_score_entropy_exact(z_0, z0_hat, torch.ones(20_000))
    by_sampling, by_formula = (torch.autograd.grad(loss.sum(), z0_hat)[0].sum(0) for loss in (sampled, exact))
    assert F.cosine_similarity(by_sampling, by_formula, dim=0) > cosine


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.9, 0.99, 1.0])
def test_the_sampled_form_is_never_negative_and_exactly_zero_at_the_truth_in_fp32(t):
    z_0, time = torch.randn(20_000, 6), torch.full((20_000,), t)
    away = sampled_form(z_0, z_0 + 0.3 * torch.randn_like(z_0), time, TABLE.float())
    assert float(away.min()) >= 0
    assert bool((sampled_form(z_0, z_0.clone(), time, TABLE.float()) == 0).all())
    assert bool((sampled_form(z_0, z_0 + 1, 0 * time, TABLE.float()) == 0).all())  # clean: no loss


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0])
def test_every_image_loss_is_finite_in_fp32_at_any_time(t):
    z_0, noise = torch.randn(2, 50, 6).unbind(0)
    time = torch.full((50,), t)
    level = alpha_bar(time, TABLE.float())
    z0_hat = torch.randn(50, 6).requires_grad_()
    z_t = add_noise(z_0, noise, level)
    losses = [
        sampled_form(z_0, z0_hat, time, TABLE.float()),
        ddpm_epsilon_loss(z0_hat, noise, z_t, level),
        *(image_score_entropy_exact(z_0, z0_hat, loss_weight(level, w)) for w in ("unit", "snr_plus_one", "min_snr")),
    ]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss.sum(), z0_hat)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()


def test_the_sampled_form_of_a_position_is_the_same_whatever_others_there_are():
    z_0, z0_hat = torch.randn(2, 10, 4).unbind(0)
    t, uniform, e = torch.full((10,), 0.5), torch.rand(10), torch.randn(10, 8, 4)
    together = image_score_entropy_sampled(z_0, z0_hat, t, TABLE.float(), uniform, e)
    first = (value[:1] for value in (z_0, z0_hat, t))
    alone = image_score_entropy_sampled(*first, TABLE.float(), uniform[:1], e[:1])
    torch.testing.assert_close(together[:1], alone)


def test_the_epsilon_loss_is_zero_at_the_truth_and_the_squared_noise_error_elsewhere():
    z_0, noise, wrong = torch.randn(3, 30, 4, dtype=torch.float64).unbind(0)
    level = torch.rand(30, dtype=torch.float64) * 0.9
    z_t = add_noise(z_0, noise, level)
    torch.testing.assert_close(
        ddpm_epsilon_loss(z_0, noise, z_t, level), torch.zeros(30, dtype=torch.float64), atol=1e-12, rtol=0
    )
    expected = snr(level) * ((wrong - z_0) ** 2).mean(-1)
    torch.testing.assert_close(ddpm_epsilon_loss(wrong, noise, z_t, level), expected)


def test_the_weights_are_what_they_are_called():
    level = torch.tensor([0.5, 0.9, 0.99])
    torch.testing.assert_close(loss_weight(level, "unit"), torch.ones(3))
    torch.testing.assert_close(loss_weight(level, "snr_plus_one"), torch.tensor([2.0, 10.0, 100.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss_weight(level, "min_snr"), torch.tensor([1.0, 5.0, 5.0]), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="must be 'unit', 'snr_plus_one' or 'min_snr'"):
        loss_weight(level, "none")
    with pytest.raises(ValueError, match="needs at least 2"):
        sampled_form(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), TABLE.float(), 1)


def plain_and_chunked(n: int, vocab: int, in_memory: int, monkeypatch):
    """Losses and gradients of latents and head; a third of the positions without a label."""
    monkeypatch.setattr("mdm_hf.score_entropy.LOGITS_IN_MEMORY", in_memory)
    torch.manual_seed(0)
    labels = torch.randint(0, vocab, (2, n))
    labels[torch.rand(2, n) < 0.3] = -100
    weights = torch.rand(2, n)
    results = []
    for is_chunked in (False, True):
        torch.manual_seed(1)
        head = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, vocab)).double()
        latents = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
        if is_chunked:
            losses = chunked_text_score_entropy(head, latents, labels, vocab)
        else:
            losses = text_score_entropy(head(latents), labels)
        (losses * weights).sum().backward()
        results.append([losses.detach(), latents.grad, *(p.grad for p in head.parameters())])
    return results


@pytest.mark.parametrize(("n", "in_memory"), [(1, 1), (7, 50), (64, 400), (64, 2**24)])
def test_the_chunked_cross_entropy_equals_the_plain_one_and_all_its_gradients(n, in_memory, monkeypatch):
    plain, chunked = plain_and_chunked(n, 33, in_memory, monkeypatch)
    for expected, got in zip(plain, chunked, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)  # the logits are cast to fp32


def test_positions_without_a_label_are_never_decoded():
    seen = []

    def decode(latents):
        seen.append(len(latents))
        return torch.zeros(len(latents), 9)

    losses = chunked_text_score_entropy(decode, torch.randn(3, 4, 2), torch.tensor([[1, -100, -100, -100]] * 3), 9)
    assert seen == [3]
    assert losses[:, 1:].abs().max() == 0
    assert losses[:, 0].min() > 0
    none = chunked_text_score_entropy(decode, torch.randn(1, 2, 2), torch.full((1, 2), -100), 9)
    assert none.tolist() == [[0, 0]]
