"""Pictures of results: a grid of images with their captions."""

import textwrap

from PIL import Image, ImageDraw, ImageFont


def picture_grid(
    cells: list[tuple[Image.Image | None, str]],
    columns: int,
    cell_size: int = 96,
    caption_lines: int = 3,
    headings: dict[int, str] | None = None,
) -> Image.Image:
    """Draws images, enlarged or shrunk without smoothing to fit a cell, each with its caption below.

    Args:
        cells: (image, caption) in reading order; an image of None leaves its place empty.
        columns: Cells in a row.
        cell_size: Side of a cell in pixels.
        caption_lines: Lines reserved for captions.
        headings: Row number -> text above that row.

    Returns:
        One picture of them all.
    """
    headings = headings or {}
    font, head_font = ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    gap, line, head = 10, 14, 30
    rows = -(-len(cells) // columns)
    row_height = cell_size + caption_lines * line + gap
    width = columns * (cell_size + gap) + gap
    height = rows * row_height + head * len(headings) + gap
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    top = gap
    for row in range(rows):
        if row in headings:
            pen.text((gap, top), headings[row], fill="black", font=head_font)
            top += head
        for column, (image, caption) in enumerate(cells[row * columns : (row + 1) * columns]):
            left = gap + column * (cell_size + gap)
            if image is not None:
                share = cell_size / max(image.size)
                sides = [max(1, round(side * share)) for side in image.size]
                scaled = image.convert("RGB").resize(sides, Image.Resampling.NEAREST)
                canvas.paste(scaled, (left + (cell_size - sides[0]) // 2, top + (cell_size - sides[1]) // 2))
            width_in_letters = max(1, int(cell_size / font.getlength("n")))
            lines = textwrap.wrap(caption, width_in_letters)[:caption_lines]
            pen.multiline_text((left, top + cell_size + 2), "\n".join(lines), fill="black", font=font, spacing=2)
        top += row_height
    return canvas
