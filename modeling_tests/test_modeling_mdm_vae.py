"""Claims about the unified VAE."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from mdm_hf import MDMVAEConfig, MDMVAEModel
from mdm_hf.modeling_mdm_vae import MDMLatentPosterior, patchify, reconstruction_loss, unpatchify


def tiny_vae() -> MDMVAEModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "num_channels": 2, "patch_size": 2, "latent_size": 5, "hidden_size": 32}
    return MDMVAEModel(MDMVAEConfig(**sizes, num_hidden_layers=1)).eval()


def test_unpatchify_inverts_patchify():
    images = torch.randn(3, 2, 6, 4)
    patches = patchify(images, 2)
    assert patches.shape == (3, 3, 2, 8)
    torch.testing.assert_close(patches[1, 2, 1], images[1, :, 4:6, 2:4].flatten())
    torch.testing.assert_close(unpatchify(patches, 2), images)


def test_an_image_that_the_patch_does_not_divide_is_refused_with_the_nearest_sizes():
    with pytest.raises(ValueError, match="7x8 pixels, not a multiple of patch_size 4; resize to 4x8 or pad to 8x8"):
        patchify(torch.zeros(1, 1, 7, 8), 4)


def test_the_kl_term_is_the_divergence_from_the_standard_normal():
    mean, log_variance = torch.randn(2, 7, 5, dtype=torch.float64).unbind(0)
    posterior = MDMLatentPosterior(mean=mean, log_variance=log_variance)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(posterior.kl(), expected)


def test_the_kl_term_keeps_its_sign_in_half_precision():
    """Near the prior its terms cancel to a hundredth of what bfloat16 can tell apart."""
    noise = torch.randn(2, 4096, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    half = MDMLatentPosterior(*noise.bfloat16().unbind(0))
    exact = MDMLatentPosterior(*noise.bfloat16().double().unbind(0))
    assert bool((half.kl() > 0).all())
    torch.testing.assert_close(half.kl().double(), exact.kl(), rtol=1e-4, atol=0)


def test_samples_have_the_posteriors_mean_and_variance():
    mean, log_variance = torch.full((50_000, 1), 2.0), torch.full((50_000, 1), -1.0)
    noise = torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0))
    z = MDMLatentPosterior(mean=mean, log_variance=log_variance).sample(noise)
    assert abs(float(z.mean()) - 2) < 0.01
    assert abs(float(z.var()) - 0.3679) < 0.01


def test_the_reconstruction_loss_is_the_squared_error_of_a_patch():
    a, b = torch.randn(2, 3, 4, 8).unbind(0)
    torch.testing.assert_close(reconstruction_loss(a, b), ((a - b) ** 2).sum(-1))


def test_both_modalities_share_one_latent_space_and_one_encoder():
    vae = tiny_vae()
    out = vae(pixel_values=torch.randn(2, 2, 4, 6), input_ids=torch.arange(7))
    assert out.image_latents.shape == (2, 2, 3, 5)
    assert out.text_latents.shape == (7, 5)
    assert out.reconstruction.shape == (2, 2, 4, 6)
    assert out.logits.shape == (7, 40)
    for loss in (out.image_latents.sum(), out.text_latents.sum()):
        vae.zero_grad()
        loss.backward(retain_graph=True)
        assert all(p.grad is not None for p in vae.encoder.parameters())


def test_it_learns_to_give_back_pixels_and_tokens():
    vae = tiny_vae().train()
    pixels, ids = torch.rand(8, 2, 4, 4) * 2 - 1, torch.randint(0, 40, (64,))
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(300):
        out = vae(pixel_values=pixels, input_ids=ids)
        loss = F.mse_loss(out.reconstruction, pixels) + F.cross_entropy(out.logits, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.mse_loss(out.reconstruction, pixels) < 0.02
    assert float((out.logits.argmax(-1) == ids).float().mean()) == 1


def test_the_codebook_holds_the_mean_of_every_token_in_float32():
    vae = tiny_vae()
    torch.testing.assert_close(vae.codebook("cpu")[5:8], vae.encode_tokens(torch.tensor([5, 6, 7])).mean)
    assert vae.bfloat16().codebook("cpu").dtype == torch.float32
    assert vae.codebook("cpu").shape == (40, 5)


def test_nothing_to_encode_is_refused():
    with pytest.raises(ValueError, match="Got neither `pixel_values` nor `input_ids`"):
        tiny_vae()()


def test_save_and_load_give_the_same_latents(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    pixels = torch.randn(1, 2, 4, 4)
    loaded = MDMVAEModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixels).reconstruction, vae(pixels).reconstruction, atol=0, rtol=0)
