"""Labelled sheets of pictures."""

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 250, 248), (28, 28, 32), (120, 120, 128)
GAP = 8  # pixels between pictures


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def labelled_grid(
    rows: list[list[Image.Image]],
    row_labels: list[str],
    column_labels: list[str],
    cell: int = 192,
    label_width: int = 200,
) -> Image.Image:
    """A sheet with one row of pictures per label, each `cell` pixels wide.

    `column_labels` are spread evenly over the columns, so two labels head two halves.
    """
    font, head = ImageFont.load_default(17), ImageFont.load_default(22)
    columns = max(len(row) for row in rows)
    top = 48
    width = label_width + columns * (cell + GAP) + GAP
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    share = columns * (cell + GAP) / len(column_labels)
    for index, label in enumerate(column_labels):
        draw.text((label_width + (index + 0.5) * share, top / 2), label, INK, head, anchor="mm")
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (cell + GAP)
        for line, text in enumerate(_wrap(label, font, label_width - 24)):
            draw.text((12, y + 8 + 23 * line), text, FAINT, font)
        for c, picture in enumerate(row):
            scaled = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(scaled, (label_width + c * (cell + GAP), y))
    return sheet
