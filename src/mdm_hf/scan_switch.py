"""Scan switch: in which order the Mamba-2 layers read a sequence (paper Sec. 3.2, Sec. 4.2.1, Fig. 2f-g).

Symbols
    k          scan direction, 0 <= k < K. Direction k uses image order k and text order k mod (text directions).
    order      (b, l, k) long: `order[b, i, k]` is the position that direction k reads at its step i.
    rank       (b, l, k) long: its inverse, `rank[b, order[b, i, k], k] = i`.

Image orders: 0 rows, 1 rows reversed, 2 columns, 3 columns reversed. Text orders: 0 forward, 1 reversed.

What the paper leaves open is settled as *conditions first*: every direction reads the prefix (segments without any
target) before the target group. Inside the prefix the segments keep their order and each is permuted in itself; the
target group is reversed as a whole, so that in joint generation each modality sees the other; the time tokens head
the target group in every direction; padding comes last.
"""

import torch
from torch import Tensor

from .custom_ops import namespace_of, refuse_tangents


NUM_IMAGE_ORDERS = 4
NUM_TEXT_ORDERS = 2
NAMESPACE = namespace_of(__name__)
LONGEST = 2**24  # more than a sequence has segments, and a segment places


def image_scan_order(height: int, width: int, direction: int) -> Tensor:
    """Row-major patch indices in the order in which image direction `direction` visits them: (height * width,).

    Examples:
        >>> [image_scan_order(2, 3, direction).tolist() for direction in (0, 2, 3)]
        [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]
    """
    if not 0 <= direction < NUM_IMAGE_ORDERS:
        raise ValueError(f"`direction` is {direction}; images have orders 0 to 3 (rows, columns, each also reversed).")
    patches = torch.arange(height * width).view(height, width)
    order = (patches if direction < 2 else patches.T).flatten()
    return order.flip(0) if direction % 2 else order


def text_scan_order(length: int, direction: int) -> Tensor:
    """Token indices in the order in which text direction `direction` visits them: (length,)."""
    if not 0 <= direction < NUM_TEXT_ORDERS:
        raise ValueError(f"`direction` is {direction}; text has orders 0 (forward) and 1 (reversed).")
    order = torch.arange(length)
    return order.flip(0) if direction else order


def invert_order(order: Tensor) -> Tensor:
    """The inverse permutation along dimension 1: `order.gather(1, invert_order(order))` counts 0, 1, 2, ..."""
    return torch.argsort(order, dim=1)


def scan_orders(
    segment: Tensor,
    offset: Tensor,
    row: Tensor,
    column: Tensor,
    grid: Tensor,
    is_patch: Tensor,
    is_image: Tensor,
    in_target_group: Tensor,
    is_header: Tensor,
    is_padding: Tensor,
    directions: tuple[int, int] = (NUM_IMAGE_ORDERS, NUM_TEXT_ORDERS),
) -> Tensor:
    """The order in which each direction reads each sequence.

    Args:
        segment: (b, l) index of the segment a position belongs to, counted from the start of its sequence; the
            positions may be a part of it, of which whole segments are missing.
        offset: (b, l) place of the position in its segment, opening token included.
        row, column: (b, l) patch coordinates; read only where `is_patch`.
        grid: (b, l, 2) height and width in patches of the image the position belongs to; read only where `is_patch`.
        is_patch: (b, l) bool, the position holds an image patch.
        is_image: (b, l) bool, the position belongs to an image segment, its opening and closing tokens included.
        in_target_group: (b, l) bool, the position's segment holds at least one target.
        is_header: (b, l) bool, time tokens: first of the target group in every direction.
        is_padding: (b, l) bool.
        directions: how many image orders and how many text orders are in use.

    Returns:
        order (b, l, k) with k = `directions[0]`.
    """
    length, size = LONGEST, LONGEST**2  # a position's place in its sequence, segment * length + place, is below size
    row_major = torch.where(is_patch, row * grid[..., 1] + column + 1, offset)  # + 1: the opening token is place 0
    column_major = torch.where(is_patch, column * grid[..., 0] + row + 1, offset)
    keys = []
    for k in range(directions[0]):
        place = column_major if k >= 2 else row_major
        is_reversed = torch.where(is_image, k % 2, k % directions[1] % 2).bool()
        prefix = segment * length + torch.where(is_reversed, length - 1 - place, place)
        target = torch.where(is_reversed, 2 * size - segment * length - place, segment * length + place)
        key = torch.where(in_target_group, 2 * size + target, prefix)
        key = torch.where(is_header, size + segment, key)
        keys.append(torch.where(is_padding, 5 * size, key))
    return torch.argsort(torch.stack(keys, dim=-1), dim=1, stable=True)


@torch.library.custom_op(f"{NAMESPACE}::scan", mutates_args=())
def _scan(x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    b, l, k = order.shape
    rows = order + torch.arange(b, device=x.device).view(b, 1, 1) * l
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(b, l, k, x.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::unscan", mutates_args=())
def _unscan(y: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    b, l, k = rank.shape
    offsets = torch.arange(k, device=y.device) + torch.arange(b, device=y.device).view(b, 1, 1) * l * k
    rows = (rank * k + offsets).view(b * l, k)
    summed = torch.nn.functional.embedding_bag(
        rows, y.reshape(-1, y.shape[-1]), mode="sum"
    )  # gathers and adds at once
    return summed.view(b, l, y.shape[-1])


@_scan.register_fake
def _(x, order, rank):
    return x.new_empty(*order.shape, x.shape[-1])


@_unscan.register_fake
def _(y, order, rank):
    return y.new_empty(y.shape[0], y.shape[1], y.shape[3])


def _save_orders(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


# A permutation's transpose is its inverse, so each of the two operations is the other's gradient.
_scan.register_autograd(lambda ctx, grad: (_unscan(grad, *ctx.saved_tensors), None, None), setup_context=_save_orders)
_unscan.register_autograd(lambda ctx, grad: (_scan(grad, *ctx.saved_tensors), None, None), setup_context=_save_orders)


def scan(x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """`x` (b, l, c), read in every direction: out[b, i, k] = x[b, order[b, i, k]]: (b, l, k, c).

    `rank` is the inverse of `order`, what the gradient is gathered by.

    Examples:
        >>> order = torch.stack([text_scan_order(3, direction) for direction in (0, 1)], dim=-1)[None]
        >>> read = scan(torch.tensor([[[1.0], [2.0], [3.0]]]), order, invert_order(order))
        >>> read[0, :, 1, 0], unscan(read, order, invert_order(order)).flatten()  # backwards; twice what was read
        (tensor([3., 2., 1.]), tensor([2., 4., 6.]))
    """
    refuse_tangents("scan", x)
    return _scan(x, order, rank)


def unscan(y: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """`y` (b, l, k, c), put back in place and summed over the directions: out[b, j] = sum_k y[b, rank[b, j, k], k].

    `order` is the inverse of `rank`.
    """
    refuse_tangents("unscan", y)
    return _unscan(y, order, rank)
