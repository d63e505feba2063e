"""The model as the denoising loop sees it: z_t of the target group in, z0-hat out.

- Conditions are read once, into a cache from which every network call starts.
- Guidance, in one batch of two, of which the unconditional half drops conditions: its prefix keeps only the class
  token ("none") and the assistant's role, and a modality that is done becomes noise at t = 1. What is known of a
  segment that is filled in stays in both. Calls in which no row is guided do without that half.
- What is frozen becomes a condition, in its place. With token selection (paper Sec. 3.2, Theorem 3) it is projected
  once more, clean, and from then on skipped: the scans read what was kept of it, so that later calls cost less.

Symbols
    l   positions of a row,    m   those of the target group, "active",    live   those that the network still sees
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from .noise_schedule import add_noise
from .score_entropy import image_score_entropy_exact, text_score_entropy
from .sequence_layout import SequenceLayout, image_of_each_row, pick, plan_scans, positions, rows_of


class Denoiser:
    """The model seen from the loop: z_t of the target group in, z0-hat out; conditions cached, guidance batched."""

    def __init__(self, model, layout, conditions, noise, class_ids, image_grid_hw, scales: dict, sampling, state):
        self.model, self.scales, self.full_layout = model, scales, layout
        self.interval = sampling.guidance_interval or (0.0, 1.0)
        self.text_temperature, use_cache = sampling.text_temperature, sampling.use_cache
        targets = {"image": layout.is_target & layout.is_patch, "text": layout.is_target & layout.is_text}
        self.guided = any(scale != 1 and bool(targets[name].any()) for name, scale in scales.items())
        config = model.config
        in_prefix = ~layout.in_target_group & ~layout.is_padding
        self.index = positions(~in_prefix & ~layout.is_padding) if use_cache else positions(~layout.is_padding)
        self.layout = layout.select(*self.index)
        self.conditions = conditions
        self.noise = pick(noise, self.index[0])
        self.clean = pick(conditions, self.index[0])
        self.frozen, self.skipped, self.is_done = (torch.zeros_like(self.layout.is_target) for _ in range(3))
        self.has_frozen = False
        self.tolerances = {"image": sampling.selection_tolerance, "text": sampling.selection_tolerance}
        if sampling.text_selection_tolerance is not None:
            self.tolerances["text"] = sampling.text_selection_tolerance
        self.tolerances = {name: None if value is False else value for name, value in self.tolerances.items()}
        self.selects = any(self.tolerances[name] is not None and bool(targets[name].any()) for name in targets)
        self.before: Tensor | None = None  # the last prediction, and the logits of the last one's text
        self.logits: Tensor | None = None
        self.codebook = model.model.vae.codebook(conditions.device) if bool(targets["text"].any()) else None
        self.said = torch.full_like(layout.input_ids, -1)  # tokens of frozen text

        both, class_pair, latents = layout, class_ids, conditions
        if self.guided:
            role = layout.input_ids == config.assistant_token_id
            last_role = role & (role.long().flip(1).cumsum(1).flip(1) == 1)
            dropped = in_prefix & ~last_role & (layout.input_ids != config.class_token_id)
            bare = copy.copy(layout)
            bare.is_padding = layout.is_padding | dropped
            both = _stack(layout, bare)
            none = torch.full_like(layout.input_ids[:, 0], -1)
            class_pair = torch.cat([none if class_ids is None else class_ids, none])
            latents = torch.cat([conditions, conditions])
        self.has_image = has_image = None if image_grid_hw is None else image_of_each_row(both)
        self.cache = model.new_condition_cache()
        if state is not None:
            b, has_image, state = len(layout.input_ids), image_of_each_row(both), state.to(conditions.device)
            has_image[:b] |= state.has_image
            self.has_image = has_image
            self.cache = state.cache(has_image[:b])
            if self.guided:  # the other half starts as every conversation does, without a class
                start = torch.full_like(layout.input_ids[:, :1], config.class_token_id)
                nothing = model.read_conversation(start).cache(has_image[b:])
                self.cache = [one.stacked_on(other) for one, other in zip(self.cache, nothing, strict=True)]
        self.class_ids = class_pair
        if use_cache:
            from_prefix = ~both.in_target_group & ~both.is_padding
            index, is_real = positions(from_prefix)
            prefix = both.select(index, is_real)
            model.model.read_conditions(pick(latents, index), prefix, has_image, class_pair, self.cache)
            for states in self.cache:
                states.is_open = False
        else:
            self.cache = None
        pair = self.index if not self.guided else tuple(torch.cat([part, part]) for part in self.index)
        self.pair_layout = both.select(*pair)
        self.pair_level, self.pair_target = self.pair_layout.level, self.pair_layout.is_target
        self.plan = plan_scans(config, self.pair_layout, self.has_image)
        self._look()

    def _look(self) -> None:
        """Settles which of the active positions the network projects: all but those that are skipped."""
        self.live, is_real = positions(~self.layout.is_padding & ~self.skipped)
        self.num_live = is_real.sum(1)
        live = self.layout.select(self.live, is_real)
        pairs = 2 if self.guided else 1
        # what is frozen stands at t = 0; the unconditional half drops it as a condition when its modality is done
        clean = torch.cat([self.frozen, self.frozen & ~self.is_done]) if self.guided else self.frozen
        self.pair_layout.level = self.pair_level.masked_fill(clean, 0)
        self.pair_layout.is_target = self.pair_target & ~clean
        self.live_pair = self.pair_layout.select(self.live.repeat(pairs, 1), is_real.repeat(pairs, 1))
        if self.selects:
            for states in self.cache:
                states.live, states.live_is_real = self.live.repeat(pairs, 1), is_real.repeat(pairs, 1).unsqueeze(-1)
        self.text = (live.is_text & live.is_target).nonzero(as_tuple=True)

    def start(self, tracks: list) -> Tensor:
        """z_t (b, m, d) before the first network call: noise, or what is known under as much of it as is left."""
        z = torch.where(self.layout.is_target.unsqueeze(-1), self.noise, self.clean)
        for track in tracks:
            if track.skipped:
                t = torch.full((len(z), 2), track.times[0], device=z.device)
                level = self.model.model.alpha_bar_at(self.layout, t)[track.at]
                z = z.index_put(track.at, add_noise(self.clean[track.at], self.noise[track.at], level))
        return z

    def freeze(self, mask: Tensor | None, input_ids: Tensor | None, z_0: Tensor, z: Tensor) -> Tensor:
        """z (b, m, d) with the targets in `mask` (b, l) fixed at z0-hat, text at its likeliest tokens or those of
        `input_ids`; from now on they are conditions, in their place."""
        if mask is None:
            return z
        model, index = self.model, self.index[0]
        new = mask.gather(1, index) & self.layout.is_target
        text = new & self.layout.is_text
        if input_ids is None:
            tokens = model.likeliest_tokens(z_0[text], self.layout.must_be_word[text])
        else:
            tokens = input_ids.gather(1, index)[text]
        row, place = text.nonzero(as_tuple=True)
        self.said[row, index[row, place]] = tokens
        fixed = z_0.clone()
        fixed[text] = model.model.vae.encode_tokens(tokens.unsqueeze(0)).mean[0].float()
        self.clean = torch.where(new.unsqueeze(-1), fixed, self.clean)
        self.frozen, self.has_frozen = self.frozen | new, True
        self.layout.is_target = self.layout.is_target & ~new
        self.layout.level = self.layout.level.masked_fill(new, 0)
        self._look()
        return self.with_frozen(z)

    def select(self, z_0: Tensor, z: Tensor, tracks: list, step: int) -> Tensor:
        """Freezes the targets whose score has come to its fixed point, se = 0 up to the tolerance (Eq. 8).

        The fixed point of a text token is its likeliest token. That of a patch is where its prediction would come to
        at alpha_bar = 1, if it went on as it did since the call before. A modality that is done stands still, too,
        while the other goes on. A modality without a tolerance is left alone. Returns z (b, m, d).
        """
        moves, is_done = (torch.zeros_like(self.layout.is_target) for _ in range(2))
        goes_on = step < max(track.last for track in tracks) - 1
        for track in tracks:
            if self.tolerances[track.modality] is None:
                continue
            moves[track.at] = track.first <= step < track.last - 1
            is_done[track.at] = goes_on and step >= track.last - 1
        levels = [self.model.model.alpha_bar_at(self.layout, self._times(tracks, calls)) for calls in (step, step - 1)]
        entropy = torch.full(z.shape[:2], torch.inf, device=z.device)
        if self.before is not None:
            left = (1 - levels[0]) / (levels[0] - levels[1]).clamp(min=1e-9)
            entropy = image_score_entropy_exact(self.before, z_0, left**2)
        entropy = torch.where(self.layout.is_text, torch.inf, entropy)
        if self.logits is not None:
            row, place = self.text
            entropy[row, self.live[row, place]] = text_score_entropy(self.logits, self.logits.argmax(-1))
        self.before = z_0
        self.skipped = self.frozen  # this call has seen them as they are
        image, text = (-1.0 if one is None else one for one in (self.tolerances["image"], self.tolerances["text"]))
        new = self.layout.is_target & (is_done | (moves & (entropy <= torch.where(self.layout.is_text, text, image))))
        z_0 = torch.where(is_done.unsqueeze(-1), z, z_0)
        row, place = new.nonzero(as_tuple=True)
        mask = torch.zeros_like(self.full_layout.is_target)
        mask[row, self.index[0][row, place]] = True
        return self.freeze(mask, None, z_0, z)

    def with_frozen(self, z: Tensor) -> Tensor:
        return torch.where(self.frozen.unsqueeze(-1), self.clean, z)

    def _times(self, tracks: list, calls: int) -> Tensor:
        """t of image and text (b, 2) when `calls` network calls are done; 0 where a row has no such target."""
        t = torch.zeros(len(self.live), 2, device=self.live.device)
        for track in tracks:
            column = ("image", "text").index(track.modality)
            t[:, column] = torch.where(track.rows, track.time_after(calls), t[:, column])
        return t

    def _guided(self, tracks: list, step: int) -> Iterator:
        """The tracks that are guided in the call after `step`."""
        low, high = self.interval
        for track in tracks if self.guided else ():
            moves = track.first <= step < track.last
            if moves and self.scales[track.modality] != 1 and low <= track.time_after(step) <= high:
                yield track

    def _conditional(self, layout: SequenceLayout) -> tuple:
        """Layout, plan, classes and cache of the first half of each pair."""
        half = slice(len(self.live))
        cache = None if self.cache is None else [states.take(half) for states in self.cache]
        return rows_of(layout, half), rows_of(self.plan, half), self.class_ids[half], cache

    def _end_guidance(self) -> None:
        """Leaves the unconditional half, for good."""
        half = slice(len(self.live))
        self.pair_layout, self.plan, self.class_ids, self.cache = self._conditional(self.pair_layout)
        self.pair_level, self.pair_target, self.guided = self.pair_level[half], self.pair_target[half], False
        self._look()

    def predict(self, z: Tensor, tracks: list, step: int) -> Tensor:
        """z0-hat (b, m, d) after `step` network calls are done."""
        model, vae = self.model, self.model.model.vae
        end = max(track.last for track in tracks)
        if self.guided and not any(any(self._guided(tracks, later)) for later in range(step, end)):
            self._end_guidance()
        t, ended = self._times(tracks, step), [track for track in tracks if track.last == step]
        for track in ended:
            self.is_done[track.at] = True
        if ended and self.guided and self.has_frozen:  # what is frozen of them is noise now, to be projected once more
            self.skipped = self.skipped & ~self.is_done
            self._look()
        whole, live = z, self.live
        z, is_done, noise = pick(z, live), self.is_done.gather(1, live), pick(self.noise, live)
        guided = [*self._guided(tracks, step)]
        is_pair = self.guided and (bool(guided) or self.selects)  # selection keeps account of both halves
        z_pair, t_pair, given = z, t, (self.live_pair, self.plan, self.class_ids, self.cache)
        if is_pair:
            z_pair = torch.cat([z, torch.where(is_done.unsqueeze(-1), noise, z)])
            t_pair = torch.cat([t, torch.where(t == 0, torch.ones_like(t), t)])
        elif self.guided:
            given = self._conditional(self.live_pair)
        layout, plan, class_ids, cache = given
        hidden = model.model.denoise(z_pair, layout, plan, t_pair, class_ids, cache)
        z_0 = model.predict_latents(hidden, z_pair, model.model.alpha_bar_at(layout, t_pair))
        with_conditions, without = z_0.chunk(2) if is_pair else (z_0, z_0)
        mixed = with_conditions
        for track in guided:
            if track.modality == "image":
                extrapolated = without + self.scales["image"] * (with_conditions - without)
                mixed = torch.where(track.rows.view(-1, 1, 1), extrapolated, mixed)
        if len(self.text[0]):
            logits = vae.decode_tokens(with_conditions[self.text].to(model.dtype)).float()
            for track in guided:
                if track.modality == "text":
                    bare = vae.decode_tokens(without[self.text].to(model.dtype)).float()
                    extrapolated = bare + self.scales["text"] * (logits - bare)
                    logits = torch.where(track.rows[self.text[0]].unsqueeze(-1), extrapolated, logits)
            self.logits = logits if self.selects else None
            latent = (logits / self.text_temperature).softmax(-1) @ self.codebook
            mixed = mixed.index_put(self.text, latent)
        else:
            self.logits = None
        seen = ~self.live_pair.is_padding[: len(live)].unsqueeze(-1)
        places = live.unsqueeze(-1).expand_as(mixed)
        return whole.scatter(1, places, torch.where(seen, mixed, pick(whole, live)))

    def restore(self, z: Tensor) -> Tensor:
        """Latents of the active positions (b, m, d) back into the whole sequence (b, l, d)."""
        index, is_real = self.index
        b, l, d = self.conditions.shape
        rows = torch.arange(b, device=z.device).unsqueeze(1).expand_as(index)
        whole = self.conditions.clone()
        whole[rows[is_real], index[is_real]] = z[is_real]
        return torch.where(self.full_layout.is_target.unsqueeze(-1), whole, self.conditions)


def _stack(first: SequenceLayout, second: SequenceLayout) -> SequenceLayout:
    pairs = {name: torch.cat([value, getattr(second, name)]) for name, value in vars(first).items()}
    return SequenceLayout(**pairs)
