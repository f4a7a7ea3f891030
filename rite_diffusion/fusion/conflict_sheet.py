"""A picture of a fusion's conflict report: crosstalk, errors, and the worst layers."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from rite_diffusion.fusion.report import ConflictReport
from rite_diffusion.generation.grid import FAINT, INK, PAPER

BEFORE, AFTER = (196, 154, 108), (52, 101, 164)  # colours of the plain sum and of the fusion
RULE = (222, 222, 218)
QUIET, LOUD = (243, 243, 239), (178, 34, 52)
WIDTH, MARGIN = 1120, 40  # pixels
CELL, BAR, STRIP = 64, 16, 14
PICTURE = 112


@dataclass(frozen=True)
class ConceptPictures:
    """Pictures of a concept by its adapter alone, by the sum of all adapters, and by the fused."""

    alone: list[Image.Image]
    summed: list[Image.Image]
    fused: list[Image.Image]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _blend(share: float) -> tuple[int, int, int]:
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(q + share * (r - q)) for q, r in zip(QUIET, LOUD, strict=True))
    return red, green, blue


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _short(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, shortened with "…" where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def layer_label(name: str) -> str:
    """A layer's name without the parts that all names have."""
    words = name.removeprefix("lora_unet_").removeprefix("lora_te_text_model_encoder_")
    text = words.replace("transformer_blocks_0_", "").replace("_to_out_0", "_to_out")
    return f"text {text}" if name.startswith("lora_te") else text


class _Sheet:
    """A page on which panels are drawn from top to bottom."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 15,
        colour: tuple[int, int, int] = INK,
        anchor: str = "lm",
    ) -> None:
        self.draw.text((x, y), words, colour, _font(size), anchor=anchor)

    def heading(self, x: float, words: str, note: str) -> None:
        self.text(x, self.y + 10, words, 19)
        self.text(x, self.y + 34, note, 14, FAINT)


def conflict_sheet(report: ConflictReport, pictures: list[ConceptPictures]) -> Image.Image:
    """The picture of a report; `pictures` has an entry per concept, or is empty."""
    count = len(report.concepts)
    top = 92 + max(count * CELL, count * (2 * BAR + 20) + 48) + 40
    strips = 78 + 2 * count * (STRIP + 3) + 50
    worst = 92 + 24 * len(report.worst_layers())
    drawn = 110 + count * (PICTURE + 12) if pictures else 0
    sheet = _Sheet(MARGIN + 70 + top + strips + worst + drawn + MARGIN)
    _title(sheet, report)
    _crosstalk(sheet, report)
    _errors(sheet, report)
    sheet.y += top
    _strips(sheet, report)
    sheet.y += strips
    _worst(sheet, report)
    sheet.y += worst
    if pictures:
        _pictures(sheet, report, pictures)
    return sheet.image


def _title(sheet: _Sheet, report: ConflictReport) -> None:
    sheet.text(MARGIN, sheet.y + 8, f"{len(report.concepts)} concepts fused by {report.method}", 28)
    sheet.text(WIDTH - MARGIN, sheet.y + 12, f"{len(report.layers)} layers", 15, FAINT, "rm")
    sheet.y += 46
    sheet.draw.line((MARGIN, sheet.y, WIDTH - MARGIN, sheet.y), RULE, 2)
    sheet.y += 24


def _crosstalk(sheet: _Sheet, report: ConflictReport) -> None:
    sheet.heading(
        MARGIN,
        "Crosstalk",
        "size of a column's update on a row's inputs, relative to the row's own",
    )
    left, top = MARGIN + 120, sheet.y + 92
    for j, name in enumerate(report.concepts):
        label = _short(name, _font(14), CELL - 4)
        sheet.text(left + (j + 0.5) * CELL, top - 14, label, 14, FAINT, "mm")
    for i, name in enumerate(report.concepts):
        y = top + i * CELL
        sheet.text(left - 12, y + CELL / 2, _short(name, _font(15), 116), 15, INK, "rm")
        for j, value in enumerate(report.crosstalk[i]):
            x = left + j * CELL
            own = i == j
            share = 0.0 if own or math.isnan(value) else value
            fill = (232, 232, 228) if own else _blend(share)
            sheet.draw.rectangle((x + 1, y + 1, x + CELL - 3, y + CELL - 3), fill)
            colour = PAPER if share > 0.6 else FAINT if own else INK
            centre = (x + CELL / 2 - 1, y + CELL / 2 - 1)
            sheet.text(*centre, "own" if own else _number(value), 15, colour, "mm")


def _errors(sheet: _Sheet, report: ConflictReport) -> None:
    x = WIDTH // 2 + 30
    sheet.heading(x, "Error of each concept's outputs", "0: as alone, 1: as good as lost")
    left, right = x + 120, WIDTH - MARGIN - 50
    most = max([1.0, *(v for v in report.before + report.after if not math.isnan(v))])
    y = sheet.y + 76
    bottom = y + len(report.concepts) * (2 * BAR + 20)
    for mark in (0.0, 0.5, 1.0):
        at = left + mark / most * (right - left)
        sheet.draw.line((at, y - 6, at, bottom - 10), RULE, 1)
        sheet.text(at, y - 16, f"{mark:g}", 13, FAINT, "mm")
    for name, before, after in zip(report.concepts, report.before, report.after, strict=True):
        sheet.text(left - 12, y + BAR, _short(name, _font(15), 116), 15, INK, "rm")
        for row, (value, colour) in enumerate(((before, BEFORE), (after, AFTER))):
            end = left + (0 if math.isnan(value) else value) / most * (right - left)
            top = y + row * (BAR + 2)
            sheet.draw.rectangle((left, top, max(end, left + 1), top + BAR - 1), colour)
            sheet.text(max(end, left) + 8, top + BAR / 2, _number(value), 13, INK)
        y += 2 * BAR + 20
    sums = BEFORE, "plain sum", report.drift_before
    fused = AFTER, report.method, report.drift_after
    for row, (colour, words, drift) in enumerate((sums, fused)):
        at = y + 14 + 24 * row
        sheet.draw.rectangle((left, at - 6, left + 12, at + 6), colour)
        sheet.text(left + 22, at, f"{words}, drift of ordinary prompts {_number(drift)}", 14, FAINT)


def _strips(sheet: _Sheet, report: ConflictReport) -> None:
    sheet.heading(
        MARGIN, "Error by layer", "one column per layer in the order of their names; red: lost"
    )
    left, right = MARGIN + 180, WIDTH - MARGIN
    step = (right - left) / len(report.layers)
    y = sheet.y + 66
    for i, name in enumerate(report.concepts):
        for words in ("before", "after"):
            sheet.text(left - 12, y + STRIP / 2, words, 13, FAINT, "rm")
            if words == "before":
                sheet.text(MARGIN, y + STRIP / 2, _short(name, _font(15), 110), 15)
            for index, layer in enumerate(report.layers):
                value = (layer.before if words == "before" else layer.after)[i]
                colour = PAPER if math.isnan(value) else _blend(value)
                x = left + index * step
                sheet.draw.rectangle((x, y, x + max(step - 1, 1), y + STRIP - 1), colour)
            y += STRIP + 1
        y += 6


def _worst(sheet: _Sheet, report: ConflictReport) -> None:
    sheet.heading(MARGIN, "Worst layers", "the largest error of any concept, after fusion")
    y = sheet.y + 62
    for layer in report.worst_layers():
        length = 240 * min(layer.worst, 1.5) / 1.5
        sheet.draw.rectangle((MARGIN, y - 6, MARGIN + length, y + 6), _blend(layer.worst))
        sheet.text(MARGIN + 254, y, _number(layer.worst), 14)
        sheet.text(MARGIN + 310, y, _short(layer_label(layer.name), _font(14), 720), 14, FAINT)
        y += 24


def _pictures(sheet: _Sheet, report: ConflictReport, pictures: list[ConceptPictures]) -> None:
    sheet.heading(MARGIN, "Pictures", "the same prompt and seeds three times")
    y = sheet.y + 92
    columns = ("its adapter alone", "plain sum", report.method)
    width = (WIDTH - 2 * MARGIN - 120) / 3
    for index, words in enumerate(columns):
        sheet.text(MARGIN + 120 + index * width, y - 16, words, 15, FAINT)
    for name, each in zip(report.concepts, pictures, strict=True):
        sheet.text(MARGIN, y + PICTURE / 2, _short(name, _font(15), 110), 15)
        for index, images in enumerate((each.alone, each.summed, each.fused)):
            for place, image in enumerate(images[:2]):
                small = image.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
                x = MARGIN + 120 + index * width + place * (PICTURE + 6)
                sheet.image.paste(small, (round(x), y))
        y += PICTURE + 12
