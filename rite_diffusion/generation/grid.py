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
    font = ImageFont.load_default(17)
    columns = max(len(row) for row in rows)
    share = columns * (cell + GAP) / len(column_labels)
    head = ImageFont.load_default(22 if share > 120 else 14)
    heads = [_wrap(label, head, int(share) - GAP) for label in column_labels]
    line_height = round(1.3 * head.getlength("M")) + 4
    top = 48 + line_height * (max(len(lines) for lines in heads) - 1)
    width = label_width + columns * (cell + GAP) + GAP
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, lines in enumerate(heads):
        x = label_width + (index + 0.5) * share - GAP / 2
        for line, text in enumerate(lines):
            draw.text((x, 24 + line_height * line), text, INK, head, anchor="mm")
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (cell + GAP)
        for line, text in enumerate(_wrap(label, font, label_width - 24)):
            draw.text((12, y + 8 + 23 * line), text, FAINT, font)
        for c, picture in enumerate(row):
            scaled = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(scaled, (label_width + c * (cell + GAP), y))
    return sheet
