"""The network of transfusion_baseline.py: transfusion-pytorch's Transformer with MDM's inputs and outputs."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mdm_hf import MDMGenerateOutput, MDMGenerationConfig, MDMProcessor
from mdm_hf.modeling_mdm_vae import MDMVAEModel, patchify, unpatchify


try:
    from transfusion_pytorch import Transfusion
except ImportError:
    Transfusion = None


ROUND = 16  # lengths of batches are multiples of it


@dataclass
class Sizes:
    """What a Transfusion model is built from: its width and depth, what the processor decides, and the numbers that a
    patch is made of."""

    dim: int
    depth: int
    dim_head: int
    vocab_size: int
    num_classes: int
    patch_size: int
    patch_dim: int

    def build(self) -> nn.Module:
        if Transfusion is None:
            raise ImportError('Got no transfusion-pytorch; need it for the baseline; pip install -e ".[baselines]".')
        heads = max(1, round(self.dim / self.dim_head))
        return Transfusion(
            num_text_tokens=self.vocab_size + self.num_classes,  # a token for each class
            dim_latent=self.patch_dim,
            modality_num_dim=2,
            add_pos_emb=True,
            prob_uncond=0.0,
            modality_processing="grouped",  # the default times the ways, and no two runs would be the same
            transformer={"dim": self.dim, "depth": self.depth, "dim_head": self.dim_head, "heads": heads},
        )

    def parameters(self) -> int:
        return sum(p.numel() for p in self.build().parameters())


def sizes_for(
    processor: MDMProcessor, parameters: int, depth: int, dim_head: int = 32, vae: MDMVAEModel | None = None
) -> Sizes:
    """The width at which a model has nearest to `parameters` parameters, with what of a VAE serves its images.

    Raises:
        ValueError: none has within 5%.
    """
    images = processor.image_processor
    side = processor.patch_size
    patch_dim = images.num_channels * side**2 if vae is None else vae.config.latent_size
    known = (len(processor.tokenizer), processor.num_classes or 0, side, patch_dim)
    wanted = parameters - (0 if vae is None else image_parameters(vae))
    widths = range(16, 18 + math.isqrt(max(wanted, 0) // (24 * depth)), 2)  # AdaLN alone has 24 width^2 a block
    place = bisect_left(widths, wanted, key=lambda dim: Sizes(dim, depth, dim_head, *known).parameters())
    counts = {d: Sizes(d, depth, dim_head, *known).parameters() for d in widths[max(0, place - 1) : place + 1]}
    dim = min(counts, key=lambda one: abs(counts[one] - wanted))
    if abs(counts[dim] - wanted) > 0.05 * parameters:
        raise ValueError(
            f"Got {parameters:,} parameters to match with {depth} blocks; need a width with within 5% of them, the "
            f"nearest has {counts[dim]:,}; take another depth."
        )
    return Sizes(dim, depth, dim_head, *known)


def image_parameters(vae: MDMVAEModel) -> int:
    """Those of a unified VAE that an image passes through."""
    parts = (vae.patch_embedding, vae.encoder, vae.decoder, vae.pixel_head)
    return sum(p.numel() for part in parts for p in part.parameters())


@dataclass
class Row:
    """What an MDM row holds: `prompt` of token ids and known images (h, w, d) in order; then what is to be made."""

    prompt: list = field(default_factory=list)
    text: list[int] | None = None  # to be made, `</s>` at its end; empty where it is not known
    image: Tensor | tuple[int, int] | None = None  # to be made: its patches, or where they are not known their grid


class TransfusionModel(nn.Module):
    """Transfusion with MDM's inputs: `forward` for training, `generate` as MDMForMultiModalGeneration has it."""

    def __init__(self, sizes: Sizes, processor: MDMProcessor, vae: MDMVAEModel | None = None):
        super().__init__()
        self.sizes, self.net = sizes, sizes.build()
        self.vae = None if vae is None else vae.requires_grad_(False)
        self.generation_config = MDMGenerationConfig(text_temperature=0.7)
        names = ("class", "assistant", "time_image", "time_text", "image_start", "image_end", "text_start", "text_end")
        names += ("image", "text_target")
        ids = {name: processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
        self.ids = ids | {"eos": processor.tokenizer.eos_token_id}
        is_text = torch.ones(self.net.text_embed.num_embeddings, dtype=torch.bool)
        is_text[sizes.vocab_size :] = False
        is_text[[i for i in processor.tokenizer.all_special_ids if i != self.ids["eos"]]] = False
        self.register_buffer("is_text", is_text, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.is_text.device

    def encode(self, pixels: Tensor) -> Tensor:
        """(n, channels, height, width) -> patches (n, h, w, d)."""
        return patchify(pixels, self.sizes.patch_size) if self.vae is None else self.vae.encode_images(pixels).mean

    def decode(self, patches: Tensor) -> Tensor:
        """The inverse of `encode`, within [-1, 1]."""
        pixels = unpatchify(patches, self.sizes.patch_size) if self.vae is None else self.vae.decode_images(patches)
        return pixels.clamp(-1, 1)

    def rows(self, inputs: dict) -> list[Row]:
        """The rows of MDMProcessor's batch.

        Raises:
            ValueError: a row with several images or several texts to be made.
        """
        pixels = inputs.get("pixel_values")
        patches = iter(()) if pixels is None else iter(self.encode(pixels))
        grids = iter(inputs["image_grid_hw"].tolist()) if "image_grid_hw" in inputs else iter(())
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = []
        for tokens, length, category in zip(
            inputs["input_ids"].tolist(), lengths, inputs["class_ids"].tolist(), strict=True
        ):
            rows.append(self._row(tokens[:length], category, patches, grids))
        return rows

    def _row(self, tokens: list[int], category: int, patches, grids) -> Row:
        row, ids, i, in_targets = Row(), self.ids, 0, False
        while i < len(tokens):
            token = tokens[i]
            if token == ids["class"]:
                row.prompt += [self.sizes.vocab_size + category] if category >= 0 else []
            elif token == ids["image_start"]:
                h, w = next(grids)
                is_known = tokens[i + 1] == ids["image"]
                image = next(patches)[:h, :w] if is_known else (h, w)
                i = tokens.index(ids["image_end"], i)
                if not in_targets:
                    row.prompt.append(image)
                elif row.image is None:
                    row.image = image
                else:
                    raise ValueError("Got a row with two images to be made; need at most one; leave its task out.")
            elif token == ids["text_start"]:
                end = tokens.index(ids["text_end"], i)
                if not in_targets:
                    row.prompt += tokens[i : end + 1]
                elif row.text is None:
                    body = tokens[i + 1 : end]
                    is_known = body[0] != ids["text_target"]
                    row.text = [*(one for one in body if one != ids["eos"]), ids["eos"]] if is_known else []
                else:
                    raise ValueError("Got a row with two texts to be made; need at most one; leave its task out.")
                i = end
            else:
                in_targets = in_targets or token in (ids["time_image"], ids["time_text"])
                row.prompt.append(token)
            i += 1
        return row

    def forward(self, inputs: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch with targets, and its parts, text and flow (2,). Torch's generator draws noise and t."""
        rows = self.rows(inputs)
        samples, times, lengths = [], [], []
        for row in rows:
            prompt = self._parts(row.prompt)
            sample: list = [(part, 0.0) if part.dtype == torch.long else (0, part, 0.0) for part in prompt]
            times.append([1.0 for item in sample if len(item) == 3])
            if row.text is not None:
                sample.append(self._tokens([self.ids["text_start"], *row.text]))
            if row.image is not None:
                sample.append((0, row.image))
                times[-1].append(-1.0)
            samples.append(sample)
            lengths.append(2 + sum(self._length(item) for item in sample))
        self._round_up(samples, lengths)
        most = max(1, *(len(one) for one in times))
        t = torch.tensor([one + [1.0] * (most - len(one)) for one in times], device=self.device)
        t = torch.where(t < 0, torch.rand(len(t), 1, device=self.device).expand_as(t), t)
        loss, parts = self.net(samples, times=t, return_breakdown=True)
        flow = sum(parts.flow) if parts.flow else torch.zeros_like(parts.text)
        return loss, torch.stack([parts.text.detach(), torch.as_tensor(flow).detach()])

    def _tokens(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _parts(self, prompt: list) -> list[Tensor]:
        """Runs of token ids as tensors (n,), between images (h, w, d)."""
        parts: list = [[]]
        for one in prompt:
            parts[-1].append(one) if isinstance(one, int) else parts.extend([one, []])
        return [self._tokens(part) if isinstance(part, list) else part for part in parts if len(part)]

    def _length(self, item) -> int:
        """Positions that the package makes of an item of a sample in training."""
        if isinstance(item, Tensor) or isinstance(item[0], Tensor):
            return len(item if isinstance(item, Tensor) else item[0])
        h, w = item[1].shape[:2]
        return len(self._opening((h, w))) + h * w + 1

    def _round_up(self, samples: list[list], lengths: list[int]) -> None:
        """Puts padding that nothing asks for after the longest sample, up to a multiple of `ROUND` positions.

        The package's einx works out its shapes anew for each length, for a quarter of a second.
        """
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if extra := -lengths[longest] % ROUND:
            samples[longest].append((self._tokens([0] * extra), 0.0))

    def _opening(self, grid: tuple[int, int]) -> list[int]:
        """What the package puts before an image of `grid` in training."""
        shape = self.net.char_tokenizer(",".join(map(str, grid)), device=self.device).tolist()
        return [self.net.meta_id, *shape, self.net.som_ids[0]]

    def _embed(self, prompts: list[list], t: float = 1.0) -> tuple[Tensor, list[int]]:
        """Hidden states (b, l, dim) of prompts and their lengths; the last image of each stands at t, others at 1."""
        samples, lengths, times = [], [], []
        for prompt in prompts:
            opened: list = [self.net.sos_id]
            for one in prompt:
                is_image = not isinstance(one, int)
                opened += [*self._opening(tuple(one.shape[:2])), one, self.net.eom_ids[0]] if is_image else [one]
            parts = self._parts(opened)
            samples.append([part if part.dtype == torch.long else (0, part) for part in parts])
            lengths.append(sum(len(part) if part.dtype == torch.long else part[..., 0].numel() for part in parts))
            images = sum(part.dtype != torch.long for part in parts)
            times.append([1.0] * (images - 1) + [t] * min(images, 1))
        self._round_up(samples, lengths)
        most = max(len(one) for one in times)
        padded = torch.tensor([one + [1.0] * (most - len(one)) for one in times], device=self.device)
        embed, _ = self.net(samples, times=padded, return_loss=False, return_embed=True)
        return embed, lengths

    @torch.no_grad()
    def generate(self, input_ids: Tensor, generator: list[torch.Generator], **given) -> MDMGenerateOutput:
        """As MDMForMultiModalGeneration.generate; options that are not of this model are not heeded.

        Text is drawn token by token from the softmax at `text_temperature`; guidance is of images alone. Each row
        draws from its own generator.
        """
        self.eval()
        names = ("num_inference_steps", "guidance_scale", "guidance_interval", "text_temperature")
        options = {n: getattr(self.generation_config, n) if given.get(n) is None else given[n] for n in names}
        rows = self.rows({"input_ids": input_ids} | given)
        sequences = input_ids.clone()
        canvas = input_ids == self.ids["text_target"]
        writers = [i for i, row in enumerate(rows) if row.text is not None]
        prompts = [rows[i].prompt for i in writers]
        length = int(canvas.sum(1).max())
        texts = self._write(prompts, length, options["text_temperature"], [generator[i] for i in writers])
        for i, text in zip(writers, texts, strict=True):
            filled = text + [self.ids["eos"]] * (int(canvas[i].sum()) - len(text))
            sequences[i, canvas[i]] = self._tokens(filled)
            rows[i].prompt += [self.ids["text_start"], *text, self.ids["eos"]]
        images: list[list[Tensor]] = [[] for _ in rows]
        drawers = [i for i, row in enumerate(rows) if row.image is not None]
        for grid in sorted({rows[i].image for i in drawers}):
            alike = [i for i in drawers if rows[i].image == grid]
            guidance = options["guidance_scale"], *(options["guidance_interval"] or (0.0, 1.0))
            of_rows = [rows[i].prompt for i in alike], [generator[i] for i in alike]
            drawn = self._draw(*of_rows, grid, options["num_inference_steps"], *guidance)
            for i, image in zip(alike, drawn, strict=True):
                images[i].append(image)
        return MDMGenerateOutput(sequences=sequences, images=images)

    def _write(self, prompts: list[list], length: int, heat: float, generators: list) -> list[list[int]]:
        """A text after each prompt, of at most `length` tokens, without its `</s>`."""
        texts: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for _ in range(length):
            if not active:
                break
            rows = [[*prompt, self.ids["text_start"], *text] for prompt, text in zip(prompts, texts, strict=True)]
            embed, lengths = self._embed(rows)  # also of those that are done: a batch of another size is another shape
            last = embed[torch.arange(len(rows)), torch.tensor(lengths) - 1]
            logits = self.net.to_text_logits(last).float().masked_fill(~self.is_text, -torch.inf)
            weights = (logits / heat).softmax(-1).cpu()
            drawn = {i: int(torch.multinomial(weights[i], 1, generator=generators[i])) for i in active}
            active = [i for i in active if drawn[i] != self.ids["eos"]]
            for i in active:
                texts[i].append(drawn[i])
        return texts

    def _draw(
        self,
        prompts: list[list],
        generators: list,
        grid: tuple[int, int],
        steps: int,
        guidance: float,
        low: float,
        high: float,
    ) -> Tensor:
        """An image of `grid` patches after each prompt: (b, channels, height, width) in [-1, 1].

        There is guidance where low <= 1 - t <= high: the package's t is 1 without noise.
        """
        size, count = self.sizes.patch_dim, grid[0] * grid[1]
        bare = [self.ids["assistant"], self.ids["time_image"]]

        def flow(z: Tensor, t: float) -> Tensor:
            scale = guidance if low <= 1 - t <= high else 1
            rows = [[*prompt, one] for prompt, one in zip(prompts, z, strict=True)]
            rows += [[*bare, one] for one in z] if scale != 1 else []
            embed, lengths = self._embed(rows, t)
            first = torch.tensor(lengths, device=z.device) - 1 - count  # an image closes with a token of its own
            at = (first.unsqueeze(1) + torch.arange(count, device=z.device)).unsqueeze(-1)
            found = self.net.model_to_latent_projs[0](embed.gather(1, at.expand(-1, -1, embed.shape[-1])))
            found = found.view(-1, *z.shape)
            return found[0] if scale == 1 else found[1] + scale * (found[0] - found[1])

        z = torch.stack([torch.randn(*grid, size, generator=one) for one in generators]).to(self.device)
        moves = max(1, steps // 2)
        for k in range(moves):
            middle = z + flow(z, k / moves) / (2 * moves)
            z = z + flow(middle, (k + 0.5) / moves) / moves
        return self.decode(z)
