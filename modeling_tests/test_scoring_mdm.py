"""Claims about `score`: exact where the network is, equal to a slow oracle where it is not, and as sure as it says."""

import math
from pathlib import Path

import pytest
import torch
from tiny import IMAGE_TARGET, LATENT, TEXT_TARGET, batch, model_with, rgb_batch, save_autoencoder, tiny_model
from torch.distributions import Normal, kl_divergence

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline
from mdm_hf.noise_schedule import alpha_bar
from mdm_hf.scoring_mdm import _Scorer, noise_levels, stratified_error, time_of
from mdm_hf.training.digits import DIGIT_WORDS, load_digits_split


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def settled_model(**options) -> MDMForMultiModalGeneration:
    """A tiny model whose VAE tells its 64 tokens apart and is narrow: what a score of weights at random is ruled by is
    the error of a decoder that has learned nothing."""
    model = tiny_model(**options)
    vae, everything = model.model.vae, torch.arange(64)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        mean = vae.encode_tokens(everything).mean
        noisy = mean + 0.2 * torch.randn(mean.shape, generator=generator)
        loss = torch.nn.functional.cross_entropy(vae.decode_tokens(noisy), everything) + 0.01 * (mean**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        vae.encoder[-1].bias[LATENT:] -= 6
    return model


@pytest.fixture(scope="module")
def model():
    return settled_model()


@pytest.fixture(scope="module")
def pipe():
    made = MDMPipeline.from_pretrained(CARD, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


def test_with_the_exact_posterior_the_bound_on_text_is_its_log_probability(model, monkeypatch):
    """Five tokens from a known joint distribution: Bayes' rule in place of the network leaves no gap (Eq. S1)."""
    inputs = batch(["text"], is_training=True)
    texts = torch.tensor([[33, 34, 35, 2, 2], [33, 36, 35, 2, 2], [40, 34, 33, 35, 2]])
    log_p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()

    def bayes(self, z_t, rows, layout, time):
        at = layout.is_target.nonzero(as_tuple=True)
        a = alpha_bar(time[:, :1].double(), model.model.text_alpha_bar).unsqueeze(-1)
        z = z_t[at].view(len(z_t), 1, 5, LATENT).double()
        clean = self.codebook[texts].double()
        far = ((z - a.unsqueeze(-1).sqrt() * clean) ** 2).sum((-1, -2)) / (2 * (1 - a.squeeze(-1)))
        weight = (log_p - far).softmax(-1)
        expected = torch.einsum("pk,kld->pld", weight, clean).float()
        return z_t.index_put(at, expected.flatten(0, 1))

    monkeypatch.setattr(_Scorer, "predict", bayes)
    for text, truth in zip(texts, log_p, strict=True):
        labels = inputs["labels"].clone()
        labels[labels >= 0] = text
        scored = model.score(**(inputs | {"labels": labels}), num_samples=24000, seeds=seeds(0), batch_size=6000)
        assert scored.standard_error < 0.07
        assert scored.log_likelihood.item() == pytest.approx(truth.item(), abs=4 * scored.standard_error.item() + 0.01)


def test_with_the_best_linear_prediction_the_bound_on_images_is_the_bound_of_the_vae():
    """z0-hat = sqrt(a) z_t is exact for N(0, I), so the diffusion's part is -KL(q || N(0, I)), of closed form."""
    model = settled_model()
    torch.nn.init.zeros_(model.latent_head.weight)
    torch.nn.init.zeros_(model.latent_head.bias)
    inputs = batch(["class_to_image"], is_training=True)
    inputs.pop("labels")
    scored = model.score(**inputs, num_samples=2048, seeds=seeds(0), batch_size=512)
    posterior = model.model.vae.encode_images(inputs["pixel_values"])
    noise = torch.randn(4096, *posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    decoded = model.model.vae.decode_images(
        (posterior.mean + (0.5 * posterior.log_variance).exp() * noise).flatten(0, 1)
    )
    pixels = Normal(decoded.double(), 0.5**0.5).log_prob(inputs["pixel_values"].double()).sum((1, 2, 3))
    truth = pixels.mean() - posterior.kl().sum()
    spread = (pixels.std() / 64).item() + scored.standard_error.item()
    assert spread < 0.01 * abs(truth)
    assert scored.image_log_likelihood.item() == pytest.approx(truth.item(), abs=4 * spread)
    assert scored.text_log_likelihood.item() == 0


@torch.no_grad()
def oracle(model, inputs: dict, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bound in discrete time, as Sohl-Dickstein et al. and Ho et al. write it, in float64: one KL divergence of
    two Gaussians for each of 999 steps, whose z_t go through `forward`, one row a step, without any cache.
    Returns image's and text's mean over draws, and its standard error."""
    vae, ids = model.model.vae, inputs["input_ids"][0]
    mask = inputs["target_mask"][0].bool()
    kinds = (mask & (ids == 11), mask & (ids != 11))
    codes = vae.encode_tokens(torch.arange(vae.config.vocab_size)).mean
    times = torch.logspace(-3, 0, 1000, dtype=torch.float64)  # T steps of equal length would be few at small t
    levels = [alpha_bar(times, model.model.alpha_bar_of(name).double()) for name in ("image", "text")]
    a = torch.where(kinds[0], levels[0].unsqueeze(1), levels[1].unsqueeze(1)).unsqueeze(-1)  # (t, l, 1)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros(draws, 2, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for i in range(draws):
        mean = codes[ids].double()
        z_0 = mean.clone()
        if bool(kinds[0].any()):
            q = vae.encode_images(inputs["pixel_values"])
            q = Normal(q.mean.double(), (0.5 * q.log_variance).exp().double())
            sample = q.mean + q.stddev * normal(q.mean.shape)
            mean[kinds[0]], z_0[kinds[0]] = q.mean.flatten(0, 2), sample.flatten(0, 2)
            seen = Normal(vae.decode_images(sample.float()).double(), 0.5**0.5)
            total[i, 0] += seen.log_prob(inputs["pixel_values"].double()).sum() - q.log_prob(sample).sum()
        z_t = a.sqrt() * z_0 + (1 - a).sqrt() * normal(len(times), *z_0.shape)
        shift = (z_t - a.sqrt() * mean) / (1 - a).sqrt()  # the noise that takes `forward`, which knows means, to z_t
        hat = []
        for t, noise in zip(times.float().split(250), shift.float().split(250), strict=True):
            rows = {k: v.repeat(len(t), *[1] * (v.ndim - 1)) for k, v in inputs.items() if k != "labels"}
            hat.append(model(**rows, timesteps=t.unsqueeze(1).expand(-1, 2), noise=noise).predicted_latents)
        hat = torch.cat(hat).double()
        hat[:, kinds[1]] = vae.decode_tokens(hat[:, kinds[1]].float()).double().softmax(-1) @ codes.double()
        for j, kind in enumerate(kinds):
            s, t = levels[j][:-1].view(-1, 1, 1), levels[j][1:].view(-1, 1, 1)
            step = t / s
            variance = (1 - s) * (1 - step) / (1 - t)

            def earlier(clean, s=s, t=t, step=step, variance=variance, z=z_t[1:, kind]):
                mean = s.sqrt() * (1 - step) * clean + step.sqrt() * (1 - s) * z
                return Normal(mean / (1 - t), variance.sqrt())

            total[i, j] -= kl_divergence(earlier(z_0[kind]), earlier(hat[1:, kind])).sum()
            last = levels[j][-1]
            total[i, j] -= kl_divergence(Normal(last.sqrt() * z_0[kind], (1 - last).sqrt()), Normal(0.0, 1.0)).sum()
            width = ((1 - levels[j][0]) / levels[j][0]).sqrt()
            noise = width * normal(z_0[kind].shape)
            if j == 0:
                total[i, 0] += Normal(0.0, width).log_prob(noise).sum()
            else:
                log_p = vae.decode_tokens((z_0[kind] + noise).float()).double().log_softmax(-1)
                total[i, 1] += log_p.gather(1, ids[kind].unsqueeze(1)).sum()
    return total.mean(0), total.std(0) / draws**0.5


@pytest.mark.parametrize(
    ("kind", "options"),
    [("caption", {}), ("text_to_image", {}), ("both", {"text_beta_schedule": "scaled_linear"})],
    ids=["caption", "text-to-image", "both-with-two-schedules"],
)
def test_the_bound_equals_that_of_an_oracle_that_adds_up_every_step(kind, options):
    model = settled_model(**options)
    inputs = batch([kind], is_training=True)
    truth, spread = oracle(model, inputs, draws=4)
    scored = model.score(**inputs, num_samples=1024, seeds=seeds(0), batch_size=256)
    parts = torch.stack([scored.image_log_likelihood[0], scored.text_log_likelihood[0]])
    doubt = 4 * (spread**2 + scored.standard_error[0] ** 2).sqrt()
    is_there = truth != 0
    assert bool(((parts - truth).abs() <= doubt)[is_there].all()), (parts, truth, doubt)
    assert bool((doubt <= 0.12 * truth.abs().sum()).all()), (truth, doubt)
    assert bool((parts[~is_there] == 0).all())


def test_levels_are_drawn_with_the_density_that_their_weights_undo():
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for share in (0.25, 0.75):
        a, density = noise_levels(uniform, 0.01, 0.999, share)
        assert bool(((a >= 0.01) & (a <= 0.999)).all())
        for power in (0, 1, 2):
            assert (a**power / density).mean() == pytest.approx(
                (0.999 ** (power + 1) - 0.01 ** (power + 1)) / (power + 1), rel=1e-3
            )
        assert (1 / (1 - a) / density).mean() == pytest.approx(math.log(0.99 / 0.001), rel=1e-3)


def test_the_time_of_a_level_is_where_the_schedule_has_it(model):
    table, t = model.model.text_alpha_bar, torch.linspace(0.0012, 0.9987, 7, dtype=torch.float64)
    level = alpha_bar(t, table)
    back, slope = time_of(level, table)
    torch.testing.assert_close(back, t, atol=1e-7, rtol=0)
    numeric = (alpha_bar(t - 1e-6, table) - alpha_bar(t + 1e-6, table)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-3, atol=1e-7)


def test_the_standard_error_is_the_spread_over_seeds(model):
    row = batch(["text"], is_training=True)
    rows = {name: value.repeat(200, 1) if value.ndim == 2 else value.repeat(200) for name, value in row.items()}
    scored = model.score(**rows, num_samples=16, seeds=torch.arange(200), batch_size=400)
    spread = scored.log_likelihood.std()
    assert scored.standard_error.square().mean().sqrt() == pytest.approx(spread.item(), rel=0.2)
    torch.testing.assert_close(scored.draws.mean(1), scored.log_likelihood)
    assert stratified_error(torch.tensor([1.0, 3.0, 5.0, 5.0])) == pytest.approx(2 / 4)


def test_neither_batch_nor_padding_nor_what_is_drawn_at_once_changes_a_score(model):
    kinds = ["caption", "text", "both", "text_to_image", "class_to_image", "chat"]
    together = model.score(**batch(kinds, is_training=True), num_samples=8, seeds=torch.arange(6), batch_size=7)
    for i, kind in enumerate(kinds):
        alone = model.score(**batch([kind], is_training=True), num_samples=8, seeds=seeds(i))
        for name in ("draws", "standard_error", "text_log_likelihood", "image_log_likelihood"):
            torch.testing.assert_close(together[name][i], alone[name][0], rtol=2e-4, atol=2e-3)
        assert together.num_text_targets[i] == alone.num_text_targets[0]
    assert together.num_text_targets.tolist() == [5, 5, 5, 0, 0, 5]
    assert together.num_image_targets.tolist() == [0, 0, 6, 6, 6, 0]


def test_half_precision_changes_a_score_by_less_than_its_error(pipe):
    inputs = pipe.processor.apply_chat_template([said(picture, "a three") for picture in pictures(3)[:4]])
    exact = pipe.model.score(**inputs, num_samples=16, seeds=torch.arange(4))
    half = MDMForMultiModalGeneration.from_pretrained(CARD, dtype=torch.bfloat16).score(
        **inputs, num_samples=16, seeds=torch.arange(4)
    )
    assert bool(((half.log_likelihood - exact.log_likelihood).abs() < exact.standard_error).all())


def test_targets_behind_a_pixel_autoencoder_are_scored_as_its_latents(tmp_path):
    save_autoencoder(tmp_path)
    model, inputs = model_with(tmp_path), rgb_batch(["text_to_image", "text_to_image"], is_training=True)
    inputs["pixel_values"][1] *= -1
    scored = model.score(**inputs, num_samples=4, seeds=seeds(0, 1))
    latents = model.model.pixel_autoencoder.encode(inputs.pop("pixel_values"))
    again = model.score(**inputs, image_latents=latents, num_samples=4, seeds=seeds(0, 1))
    torch.testing.assert_close(scored.draws, again.draws, rtol=1e-4, atol=1e-3)


def test_conditions_are_encoded_once_however_many_answers_and_draws(model, monkeypatch):
    inputs = batch(["caption"] * 3 + ["text"], is_training=True)
    inputs["labels"][1][inputs["labels"][1] >= 0] = 40  # another answer to the same question
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][2] *= 0.5  # another picture
    lengths = []
    denoise = type(model.model).denoise

    def counted(self, latents, *args):
        lengths.append((len(latents), args[-1] is not None and args[-1][0].ssm is None))
        return denoise(self, latents, *args)

    monkeypatch.setattr(type(model.model), "denoise", counted)
    model.score(**inputs, num_samples=8, batch_size=16)
    assert lengths == [(3, True), (16, False), (16, False)]


def pictures(digit: int) -> list:
    images, labels = load_digits_split("heldout")
    return [image for image, label in zip(images, labels, strict=True) if label == digit]


def said(picture, text: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]


def test_of_ten_captions_the_right_one_is_likeliest(pipe):
    shown = [pictures(digit)[0] for digit in range(10)]
    captions = [f"this is {'an' if word == 'eight' else 'a'} {word}" for word in DIGIT_WORDS]
    scores = pipe.score_choices(images=shown, choices=[captions] * 10, num_samples=8)
    assert sum(one.best == digit for digit, one in enumerate(scores)) >= 9
    three = pipe.score_choices(images=shown[3], choices=captions, num_samples=16)[0]
    margin, error = min(three.margin(3, other) for other in range(10) if other != 3)
    assert margin > 3 * error
    assert three.num_targets.tolist() == [pipe.processor.max_new_tokens] * 10


def test_pictures_are_choices_too(pipe):
    shown = [pictures(digit)[1] for digit in (2, 3, 7)]
    assert pipe.score_choices(text="a handwritten three", choices=shown, num_samples=16)[0].best == 1


def test_equally_likely_answers_that_share_their_noise_differ_far_more_surely(pipe):
    captions, count = ("this is a four", "this is a 4"), 50
    inputs = pipe.processor.apply_chat_template([said(pictures(4)[0], text) for text in captions] * count)
    common = pipe.model.score(**inputs, num_samples=8, seeds=torch.arange(count).repeat_interleave(2), batch_size=240)
    x, y = common.log_likelihood.view(count, 2).T
    assert (x - y).var() < 0.3 * (x.var() + y.var())
    errors = stratified_error(common.draws.view(count, 2, -1).diff(dim=1).squeeze(1))
    assert errors.square().mean().sqrt() == pytest.approx((x - y).std().item(), rel=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 5}, "`num_samples` is 5; it must be an even number, 4 or more"),
        ({"batch_size": 0}, "`batch_size` is 0; it must be a whole number"),
        (
            {"target_mask": None},
            "marks no target in row 0, so there is nothing to score; mark what is to be scored, and put",
        ),
        ({"seeds": torch.tensor([1, 2])}, r"`seeds` is \[1, 2\]; it must be \(batch,\) = \(1,\)"),
    ],
    ids=["odd", "no-batch", "no-target", "seeds"],
)
def test_what_cannot_be_scored_is_refused(model, change, message):
    inputs = batch(["text"], is_training=True)
    inputs.pop("labels")
    with pytest.raises(ValueError, match=message):
        model.score(**(inputs | change))


def test_labels_at_conditions_are_refused_as_in_training(model):
    inputs = batch(["text"], is_training=True)
    inputs["labels"] = torch.full_like(inputs["input_ids"], 40)
    with pytest.raises(ValueError, match="`labels` gives an id to row 0, place 0, which is no text target"):
        model.score(**inputs)


@pytest.mark.parametrize(
    ("kind", "token", "name"), [("text", TEXT_TARGET, "text"), ("class_to_image", IMAGE_TARGET, "image")]
)
def test_conditions_without_what_is_to_be_scored_are_refused(model, kind, token, name):
    with pytest.raises(
        ValueError, match=f"holds the placeholder {token} at row 0, .*without the {name} to score; put it"
    ):
        model.score(**batch([kind]))


def test_choices_that_do_not_fit_their_prompts_are_refused(pipe):
    with pytest.raises(ValueError, match="Got 1 lists of choices for 2 prompts; need one list a prompt"):
        pipe.score_choices(text=["a", "b"], choices=[["yes", "no"]])
    with pytest.raises(ValueError, match=r"Got choices \[\] for prompt 1; need a list of one or more"):
        pipe.score_choices(text=["a", "b"], choices=[["yes"], []])
    for choices in (None, {"yes"}, "yes", 5):
        with pytest.raises(ValueError, match=f"Got choices of type {type(choices).__name__}; need a list of answers"):
            pipe.score_choices(text="a", choices=choices)
    with pytest.raises(ValueError, match="Got None among the choices for prompt 1; need texts or pictures"):
        pipe.score_choices(text=["a", "b"], choices=[["yes"], ["no", None]])
    with pytest.raises(
        ValueError, match="Got texts and pictures among the choices for prompt 0; need all of one kind"
    ):
        pipe.score_choices(text="a", choices=["yes", torch.zeros(1, 8, 8)])
    asked = {"text": "a", "choices": ["yes", "no"], "num_samples": 4}
    for options, message in (
        ({"seed": -1}, "`seed` is -1; it must be a whole number, 0 or more"),
        ({"seed": "x"}, "`seed` is 'x'; it must be a whole number"),
        ({"batch_size": 0}, "`batch_size` is 0; it must be a whole number, 1 or more"),
        ({"text": {"canvas": {"type": "text"}}}, "Got a prompt with a canvas to score answers to; need the answers"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.score_choices(**asked | options)
    [scores] = pipe.score_choices(**asked)
    for index in (2, -1, "yes"):
        with pytest.raises(ValueError, match=f"Got answer {index!r} of 2; need a whole number from 0 to 1, its place"):
            scores.margin(index, 0)
