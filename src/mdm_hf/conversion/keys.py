"""Two-way tables of weights' names, and the comparison of weights with the model that is to have them."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


SHOWN = 5  # names in a message
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class KeyTable:
    """Names of weights in another format and in ours, as pairs of patterns: `{i}` is a number, `{rest}` anything.

    Each pair is read both ways. The first that fits counts.
    """

    def __init__(self, *pairs: tuple[str, str]):
        self.pairs = pairs

    def to_ours(self, names: Iterable[str]) -> dict[str, str]:
        """Their names -> ours.

        Raises:
            ValueError: names that no pattern fits, or two that become one.
        """
        return self._renamed(names, [(theirs, ours) for theirs, ours in self.pairs])

    def to_theirs(self, names: Iterable[str]) -> dict[str, str]:
        """Our names -> theirs; see `to_ours`."""
        return self._renamed(names, [(ours, theirs) for theirs, ours in self.pairs])

    def _renamed(self, names: Iterable[str], pairs: list[tuple[str, str]]) -> dict[str, str]:
        rules = [(re.compile(_as_pattern(source)), target) for source, target in pairs]
        found, unknown = {}, []
        for name in names:
            match, target = next(((m, target) for rule, target in rules if (m := rule.fullmatch(name))), (None, ""))
            if match is None:
                unknown.append(name)
            else:
                found[name] = target.format(**match.groupdict())
        if unknown:
            raise ValueError(
                f"Got weights with unknown names: {some(unknown)}; need those of {', '.join(p[0] for p in pairs[:4])} "
                "and the like; check that the checkpoint is of this format."
            )
        if len(set(found.values())) < len(found):
            twice = [name for name in found.values() if list(found.values()).count(name) > 1]
            raise ValueError(f"Got weights of which several become {some(twice)}; need one each.")
        return found


def _as_pattern(text: str) -> str:
    escaped = re.escape(text)
    return escaped.replace(r"\{i\}", r"(?P<i>\d{1,4})").replace(r"\{rest\}", r"(?P<rest>.+)")


def some(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    listed = sorted(set(map(str, names)))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def check_weights(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of a model, by name.

    Args:
        weights: What there is.
        wanted: The model's state dict; its values only for their shapes.

    Raises:
        ValueError: a weight is missing, unknown, of another shape, no floating-point tensor, or not finite.
    """
    if missing := set(wanted) - set(weights):
        raise ValueError(f"Got weights without {some(missing)}; need all of the model's; check config and checkpoint.")
    if unknown := set(weights) - set(wanted):
        raise ValueError(f"Got weights that the model does not have: {some(unknown)}; check config and checkpoint.")
    for name, weight in weights.items():
        if weight.shape != wanted[name].shape:
            raise ValueError(
                f"Got {name} of shape {list(weight.shape)}; the config makes it {list(wanted[name].shape)}; need the "
                "config that the checkpoint was trained with."
            )
        is_plain = weight.layout == torch.strided and not weight.is_meta
        if weight.dtype not in DTYPES or not is_plain:
            kind = weight.dtype if is_plain else "meta" if weight.is_meta else weight.layout
            raise ValueError(f"Got {name} of {kind}; need a dense floating-point weight of 16, 32 or 64 bits.")
        if not torch.isfinite(weight).all():
            raise ValueError(f"Got {name} with values that are not finite; need a checkpoint of before they came up.")
