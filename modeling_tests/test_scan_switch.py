"""Claims about the scan switch (paper Fig. 2f-g)."""

import pytest
import torch

from mdm_hf.scan_switch import image_scan_order, invert_order, scan, scan_orders, text_scan_order, unscan


def conversation(prefix, target, directions=(4, 2), padding=0, first=0):
    """Orders of one sequence given as segments: ("text", n) or ("image", h, w); a time token heads the targets."""
    fields = {name: [] for name in ("segment", "offset", "row", "column", "grid", "is_patch", "is_image")}
    fields |= {"in_target_group": [], "is_header": [], "is_padding": []}

    def position(**values):
        for name, default in (("row", 0), ("column", 0), ("grid", [1, 1])):
            fields[name].append(values.get(name, default))
        for name in ("segment", "offset"):
            fields[name].append(values[name])
        for name in ("is_patch", "is_image", "in_target_group", "is_header", "is_padding"):
            fields[name].append(values.get(name, False))

    number = first
    for is_target, segments in ((False, prefix), (True, [("time",), *target] if target else [])):
        for kind, *size in segments:
            shared = {"segment": number, "in_target_group": is_target}
            if kind == "time":
                position(**shared, offset=0, is_header=True)
            elif kind == "text":
                for n in range(size[0]):
                    position(**shared, offset=n)
            else:
                h, w = size
                image = shared | {"grid": [h, w], "is_image": True}
                position(**image, offset=0)
                for n in range(h * w):
                    position(**image, offset=n + 1, row=n // w, column=n % w, is_patch=True)
                position(**image, offset=h * w + 1)
            number += 1
    for _ in range(padding):
        position(segment=number, offset=0, is_padding=True)
    tensors = {name: torch.tensor([value]) for name, value in fields.items()}
    return scan_orders(**tensors, directions=directions)[0]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("direction", range(4))
def test_image_order_visits_every_patch_once(size, direction):
    assert image_scan_order(*size, direction).sort().values.tolist() == list(range(size[0] * size[1]))


def test_image_orders_are_rows_and_columns_and_their_reverses():
    assert image_scan_order(2, 3, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert image_scan_order(2, 3, 1).tolist() == [5, 4, 3, 2, 1, 0]
    assert image_scan_order(2, 3, 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert image_scan_order(2, 3, 3).tolist() == [5, 2, 4, 1, 3, 0]
    assert text_scan_order(3, 0).tolist() == [0, 1, 2]
    assert text_scan_order(3, 1).tolist() == [2, 1, 0]


def test_unknown_orders_are_refused():
    with pytest.raises(ValueError, match="images have orders 0 to 3"):
        image_scan_order(2, 2, 4)
    with pytest.raises(ValueError, match="text has orders 0"):
        text_scan_order(2, 2)


@pytest.mark.parametrize("direction", range(4))
def test_a_lone_image_is_read_in_its_image_order(direction):
    order = conversation([], [("image", 2, 3)])[:, direction].tolist()
    patches = [i - 2 for i in order if 2 <= i < 8]  # positions: time, start, six patches, end
    assert patches == image_scan_order(2, 3, direction).tolist()


@pytest.mark.parametrize("direction", range(4))
def test_conditions_come_first_in_every_direction(direction):
    order = conversation([("text", 3), ("image", 2, 2)], [("image", 2, 2), ("text", 4)])[:, direction].tolist()
    assert sorted(order[:9]) == list(range(9))
    assert order[9] == 9, "the time token heads the target group"


def test_prefix_segments_keep_their_order_and_are_permuted_inside():
    order = conversation([("text", 3), ("image", 1, 2)], [("text", 2)])[:, 1].tolist()
    assert order[:7] == [2, 1, 0, 6, 5, 4, 3]


def test_the_target_group_is_reversed_as_a_whole():
    order = conversation([("text", 1)], [("image", 1, 2), ("text", 2)])[:, 1].tolist()
    assert order == [0, 1, 7, 6, 5, 4, 3, 2]


def test_each_modality_sees_the_other_in_some_direction():
    order = conversation([], [("image", 2, 2), ("text", 3)])
    rank = invert_order(order[None])[0]
    image, text = rank[2:6], rank[7:10]
    assert any((image[:, k].max() < text[:, k].min()) for k in range(4))
    assert any((text[:, k].max() < image[:, k].min()) for k in range(4))


def test_with_one_text_order_text_is_never_reversed_but_images_are():
    order = conversation([], [("image", 1, 2), ("text", 3)], directions=(2, 1))
    assert [i for i in order[:, 1].tolist() if i >= 5] == [5, 6, 7]
    assert [i for i in order[:, 1].tolist() if 1 <= i < 5] == [4, 3, 2, 1]


def test_padding_stands_together_at_the_end():
    order = conversation([("text", 2)], [("text", 2)], padding=3)
    for k in range(4):
        assert sorted(order[-3:, k].tolist()) == [5, 6, 7]


def test_a_stretch_of_a_longer_sequence_is_read_as_if_it_stood_alone():
    segments = [("text", 2)], [("image", 2, 2), ("text", 3)]
    assert torch.equal(conversation(*segments, padding=3, first=1000), conversation(*segments, padding=3))


def test_unscan_inverts_every_scan_order():
    order = conversation([("text", 3)], [("image", 3, 2), ("text", 2)])[None]
    rank = invert_order(order)
    x = torch.randn(1, order.shape[1], 5)
    seen = scan(x, order, rank)
    for k in range(4):
        torch.testing.assert_close(seen[:, :, k], x[:, order[0, :, k]])
        alone = torch.zeros_like(seen)
        alone[:, :, k] = seen[:, :, k]
        torch.testing.assert_close(unscan(alone, order, rank), x)
    torch.testing.assert_close(unscan(seen, order, rank), 4 * x)


def test_scan_and_unscan_are_each_others_gradient():
    order = torch.stack([torch.stack([torch.randperm(7) for _ in range(3)], -1) for _ in range(2)])
    rank = invert_order(order)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: scan(v, order, rank), x)
    assert torch.autograd.gradcheck(lambda v: unscan(v, order, rank), y)
    reference = x.detach().clone().requires_grad_()
    gathered = torch.stack([reference[b, order[b]] for b in range(2)])
    weight = torch.randn_like(gathered)
    (gathered * weight).sum().backward()
    (scan(x, order, rank) * weight).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
